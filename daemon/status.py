"""What people see of the daemon: STATUS.txt in each session, and the snapshot that ``fastsd status`` shows."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

from daemon.intermediates import notes_on
from daemon.jobs import Job
from daemon.planner import Plan
from daemon.promotion import is_superseded, promoted
from daemon.refusals import standing_errors
from daemon.searching import KIND as EMBED
from daemon.session import Session
from daemon.sheet import KIND as SHEET
from sessions import layout
from sessions.files import write_text
from sessions.status import SessionStatus, duration, held_out, pace, render, same_but_time, size

log = logging.getLogger(__name__)
STALE_AFTER = timedelta(minutes=10)
# Measured on a miniature: docs/architecture.md.
_DORA = "a DoRA: ComfyUI and Forge draw about as it was trained, A1111 does not"
_DOING = {
    "crop": "cropping",
    "caption": "captioning",
    "train": "training",
    "convert": "converting the model into one file",
    "publish": "bringing the model into the WebUI",
}


def describe_session(
    session: Session,
    jobs: Sequence[Job],
    plan: Plan,
    pictures: int,
    *,
    gates: Mapping[str, str],
    others: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> SessionStatus:
    """What is to be said of a session.

    Args:
        session: the session.
        jobs: its jobs that have not ended, and those that failed.
        plan: what it wants and waits for.
        pictures: how many it has.
        gates: kinds of jobs that cannot start now → why.
        others: files in it that are no pictures and were left alone.
        notes: other lines.
    """
    # Nobody waits for the contact sheet, or misses it; nor for the search, which may want to be told what it lacks.
    looks = [job for job in jobs if job.kind == EMBED and job.state != "failed"]
    jobs = [job for job in jobs if job.kind != SHEET and job not in looks]
    running = [job for job in jobs if job.state == "running"]
    pending = [job for job in jobs if job.state in ("ready", "waiting")]
    waits = list(plan.waits)
    for job in pending:
        reason = gates.get(job.kind) or str(job.problem.get("reason", ""))
        if reason and reason not in waits:
            waits.append(reason)
    waits += [f"The search: {gates[EMBED]}" for _job in looks[:1] if EMBED in gates]
    waits += [
        f"{job.kind} of {job.subject} failed and is tried again: {job.problem['message']}"
        for job in pending
        if job.attempts and "message" in job.problem
    ]
    errors = standing_errors(session)
    trouble = [what if what.startswith(f"{name} ") else f"{name}: {what}" for name, what in errors]
    told = {name for name, _ in errors}
    trouble += [
        f"{job.kind} of {job.subject} failed: {job.problem.get('message', '')}"
        for job in jobs
        if job.state == "failed" and job.subject not in told
    ]
    facts = next((job.progress.get("facts") or {} for job in running if job.kind == "train"), {})
    extra = [*notes, *notes_on(session)]
    if others:
        shown = ", ".join(others[:5]) + (" …" if len(others) > 5 else "")
        verb = "file is" if len(others) == 1 else "files are"
        extra.append(f"{len(others)} {verb} no picture and left alone: {shown}")
    return SessionStatus(
        name=session.name,
        state=_state_line(session, running, pending, plan, gates),
        pictures=pictures,
        cropped=len(session.manifest.of_kind("crop")),
        captioned=len(session.manifest.of_kind("caption")),
        waits=waits,
        models=[_model_line(session, record) for record in session.manifest.of_kind("convert")],
        trouble=trouble,
        hints=plan.hints,
        notes=extra,
        run=[line for line in (", ".join(pace(facts)), held_out(facts)) if line],
        decided=[str(line) for line in facts.get("decided") or ()],
    )


def _state_line(
    session: Session,
    running: Sequence[Job],
    pending: Sequence[Job],
    plan: Plan,
    gates: Mapping[str, str],
) -> str:
    if running:
        kinds = sorted({job.kind for job in running}, key=list(_DOING).index)
        first = next(job for job in running if job.kind == kinds[-1])
        others = sum(1 for job in pending if job.kind == first.kind)
        return describe_progress(first, others)
    startable = [job for job in pending if job.kind not in gates and job.state == "ready"]
    if startable:
        return f"{len(startable)} {'job' if len(startable) == 1 else 'jobs'} to do"
    if pending or plan.waits:
        return "waiting (see below)"
    ended = session.manifest.of_kind("train")
    if ended and ended[-1].get("state") in ("failed", "refused", "cancelled"):
        return f"run {ended[-1]['run']} {ended[-1]['state']}: {ended[-1].get('reason', '')}".rstrip(": ")
    if any(layout.is_spec_name(name) for name, _ in standing_errors(session)):
        return "idle: train.yaml cannot be used (see Trouble)"
    if session.manifest.of_kind("convert"):
        return "done: the model is ready"
    return "idle: a train.yaml starts training (rename train.example.yaml)"


def describe_progress(job: Job, others: int = 0) -> str:
    """A running job in a line: what, how far, how long still."""
    progress = job.progress
    doing = _DOING.get(job.kind, job.kind)
    subject = "" if job.kind in ("train", "convert", "publish") else f" {job.subject}"
    parts = [f"{doing}{subject}"]
    done, total = progress.get("done"), progress.get("total")
    if progress.get("note"):
        parts.append(str(progress["note"]))
    if total:
        parts.append(f"{done:,.0f} of {total:,.0f}")
    facts = progress.get("facts") or {}
    if isinstance(facts.get("loss"), int | float):
        parts.append(f"loss {facts['loss']:.4f}")
    if isinstance(facts.get("eta"), int | float):
        parts.append(f"about {duration(facts['eta'])} left")
    if others:
        parts.append(f"{others} more to do")
    return ", ".join(parts)


def _model_line(session: Session, record: Mapping[str, Any]) -> str:
    name = record["outputs"][0] if record.get("outputs") else f"run {record['run']}"
    published = session.manifest.get("publish", str(record["run"]))
    where = "proven"
    if record.get("model_kind") == "lora":
        return f"{name}  {size(record.get('bytes', 0))}, {_lora_words(name, record, published)}{_rank(session, record)}"
    if published:
        proofs = {"picture": "in the WebUI, proven by a picture", "name": "in the WebUI, chosen by its name"}
        where = proofs.get(str(published.get("proof")), "in the WebUI's folder, not chosen")
        if published.get("sd_model_hash"):
            where = f"{where} ({published['sd_model_hash']})"
    return f"{name}  {size(record.get('bytes', 0))}, {where}{_rank(session, record)}"


def _rank(session: Session, record: Mapping[str, Any]) -> str:
    """Whether a model was promoted, or gave way to one that was."""
    if promoted(session.manifest).get("run") == record["run"]:
        return "; promoted"
    return "; another was promoted in its place" if is_superseded(session.manifest, str(record["run"])) else ""


def _lora_words(name: str, record: Mapping[str, Any], published: Mapping[str, Any] | None) -> str:
    """How far a LoRA is proven, and what draws with it."""
    stem = name.rpartition("/")[2].removesuffix(".safetensors")
    prompt = layout.lora_prompt(stem, str(record.get("trigger") or ""))
    where = "proven"
    if published:
        proofs = {
            "picture": f"in the WebUI, proven by a picture ({published.get('lora_hash')})",
            "name": "in the WebUI, drawn with by its name",
            "listed": f"in the WebUI's list, not drawn with: {published.get('note')}",
        }
        where = proofs.get(str(published.get("proof")), "in the WebUI's folder, not drawn with")
        prompt = str(published.get("prompt") or prompt)
    caution = f" ({_DORA})" if record.get("variant") == "dora" else ""
    return f"{where}. Write into the prompt: {prompt}{caution}"


def write_status(session: Session, status: SessionStatus, now: datetime) -> None:
    """Write STATUS.txt, unless it says the same already and is not about to be stale.

    Raises:
        OSError: the folder cannot be written.
    """
    if layout.read_session_id(session.folder) != session.id:
        return  # renamed or removed a moment ago: nothing is written where it lay
    file = session.folder / layout.STATUS
    text = render(status, now, STALE_AFTER)
    with suppress(OSError, UnicodeDecodeError):
        fresh = now.timestamp() - file.stat().st_mtime < STALE_AFTER.total_seconds() / 2
        busy = not status.state.startswith(("idle", "done"))
        if same_but_time(file.read_text(encoding="utf-8"), text) and (fresh or not busy):
            return
    write_text(file, text)


def session_json(session: Session, status: SessionStatus) -> dict[str, Any]:
    """A session as ``fastsd status --json`` shows it."""
    return {
        "name": session.name,
        "id": session.id,
        "folder": os.fspath(session.folder),
        "state": status.state,
        "run": list(status.run),
        "decided": list(status.decided),
        "pictures": status.pictures,
        "cropped": status.cropped,
        "captioned": status.captioned,
        "waits": list(status.waits),
        "models": list(status.models),
        "trouble": list(status.trouble),
        "hints": list(status.hints),
        "notes": list(status.notes),
    }


def local_now() -> datetime:
    """The time with this machine's zone."""
    return datetime.now(UTC).astimezone()
