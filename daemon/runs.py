"""The runs of a session as its folder tells of them: ``runs/*/run.json`` and the manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from daemon.routing import RecordedRun, SpecRecord
from daemon.session import Session
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
    """The finished run that ``continue:`` names: its ``run`` and ``model``, the model's file in the session.

    Args:
        session: the session.
        wanted: ``last``, a run's id, or the name of a run's model, with or without its ending.

    Raises:
        Refusal: code ``spec``: there is none, or its file is gone.
    """
    made = [
        {"run": str(record["run"]), "model": str(record["outputs"][0])}
        for record in session.manifest.of_kind("convert")
        if record.get("run") and record.get("outputs")
    ]
    here = [each for each in made if (session.folder / each["model"]).is_file()]
    found = here if wanted == "last" else [each for each in here if wanted in _names(each)]
    if found:
        return found[-1]
    gone = [each["model"] for each in made if wanted == "last" or wanted in _names(each)]
    known = ", ".join(each["run"] for each in here)
    what = f"The run's model {gone[-1]} is gone." if gone else f"There is no finished run {wanted} in this session."
    raise Refusal(
        "spec",
        what,
        f"Finished are: {known}." if known else "Leave continue out: the first run starts from a base.",
    )


def lacks_model(session: Session, run: RecordedRun) -> bool:
    """Whether a run is finished and its file not made yet."""
    return run.ended == "finished" and session.manifest.get("convert", run.id) is None


def _names(made: Mapping[str, str]) -> tuple[str, ...]:
    return made["run"], made["model"], Path(made["model"]).stem


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
