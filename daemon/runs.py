"""The runs of a session as its folder tells of them: ``runs/*/run.json`` and the manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from daemon.promotion import Candidate, candidates
from daemon.routing import RecordedRun, SpecRecord
from daemon.session import Session
from handlers.context import Waiting
from sessions import layout
from sessions.layout import RUNS
from sessions.refusal import Refusal


def read_spec_record(session: Session, relative: str) -> tuple[SpecRecord, bytes]:
    """A train.yaml as it is now: its record, and its bytes.

    Raises:
        OSError: it cannot be read.
    """
    file = session.folder / relative
    with file.open("rb") as reader:
        content = reader.read()
        modified = file.stat().st_mtime_ns
    return SpecRecord(relative, hashlib.sha256(content).hexdigest(), modified), content


def recorded_runs(session: Session) -> list[RecordedRun]:
    """All runs that the session's folder records, in no order. A run.json that cannot be read is passed over.

    Those that have not ended have begun: their run.json is there.
    """
    runs: dict[str, RecordedRun] = {}
    for file in sorted((session.folder / RUNS).glob("*/run.json")):
        value = read_json(file) or {}
        spec = _spec_record(value)
        if spec is not None:
            identity = str(value.get("run") or file.parent.name)
            is_ours = value.get("session") in (None, session.id)
            runs[identity] = RecordedRun(identity, spec, "" if is_ours else "elsewhere")
    for record in session.manifest.of_kind("train"):
        identity, state = str(record.get("run", "")), str(record.get("state", ""))
        spec = runs[identity].spec if identity in runs else _spec_record(record)
        if spec is not None and state:
            runs[identity] = RecordedRun(identity, spec, state)
    return list(runs.values())


def failed_runs(session: Session, relative: str) -> list[str]:
    """The runs that a train.yaml, as it is now, asked for and that failed or were refused."""
    try:
        record, _ = read_spec_record(session, relative)
    except OSError:
        return []
    ended = (run for run in recorded_runs(session) if run.ended in ("failed", "refused"))
    return [run.id for run in ended if run.spec.matches(record)]


def former_run(session: Session, wanted: str) -> dict[str, str]:
    """The model that ``continue:`` names: its ``run``, and ``model``, the model's file in the session.

    A session of fast-stable-diffusion has no runs, but a model that was made of it: its ``run`` is "".

    Args:
        session: the session.
        wanted: ``last`` (the last finished run, or a model with the session's name that people brought), a run's id,
            ``<run>-step-N`` or ``<run>/step-N`` for an intermediate model, or the name of a model's file, with or
            without its ending.

    Raises:
        Refusal: code ``spec``: there is none, or its file is gone.
        Waiting: it is an intermediate model that has no file yet.
    """
    # Another trainer's models have no run that says how they were trained.
    foreign = {str(record["run"]) for record in session.manifest.of_kind("convert") if record.get("source")}
    made = [each for each in candidates(session.manifest) if each.name not in foreign]

    def is_meant(each: Candidate) -> bool:
        return each.step is None if wanted == "last" else each.answers_to(wanted)

    here = [each for each in made if (session.folder / each.file).is_file()]
    found = [each for each in here if is_meant(each)]
    if found:
        return {"run": found[-1].run, "model": found[-1].file}
    if (session.folder / layout.FINISHED / wanted.replace("/", "-") / layout.KEPT_FACTS).is_file():
        raise Waiting(f"continue: {wanted} waits for the file of that model.", retry_after=30.0)
    if (brought := _brought(session, wanted, {each.file for each in made})) is not None:
        return {"run": "", "model": brought}
    gone = [each.file for each in made if is_meant(each)]
    known = ", ".join(each.name for each in here)
    what = f"The run's model {gone[-1]} is gone." if gone else f"There is no finished run {wanted} in this session."
    raise Refusal(
        "spec",
        what,
        f"Finished are: {known}." if known else "Leave continue out: the first run starts from a base.",
    )


def _brought(session: Session, wanted: str, made: Collection[str]) -> str | None:
    """A model that lies in the session's folder and that fastsd did not make."""
    name = session.name if wanted == "last" else wanted
    for file in (name, *(f"{name}{ending}" for ending in sorted(layout.MODEL_SUFFIXES))):
        path = session.folder / file
        if Path(file).name == file and path.suffix in layout.MODEL_SUFFIXES and file not in made and path.is_file():
            return file
    return None


def lacks_model(session: Session, run: RecordedRun) -> bool:
    """Whether a run is finished and its file not made yet."""
    return run.ended == "finished" and session.manifest.get("convert", run.id) is None


def _spec_record(value: Mapping[str, Any]) -> SpecRecord | None:
    try:
        return SpecRecord.from_json(value["spec_record"])
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def read_json(file: Path) -> dict[str, Any] | None:
    """A JSON object in a file; None where there is none that can be read."""
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
