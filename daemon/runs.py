"""The runs of a session as its folder tells of them: ``runs/*/run.json`` and the manifest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from daemon.routing import RecordedRun, SpecRecord
from daemon.session import Session
from sessions.layout import RUNS


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
    """All runs that the session's folder records, in no order. A run.json that cannot be read is passed over."""
    runs: dict[str, RecordedRun] = {}
    for file in sorted((session.folder / RUNS).glob("*/run.json")):
        value = read_json(file)
        if value is not None and isinstance(value.get("spec_record"), dict):
            identity = str(value.get("run") or file.parent.name)
            runs[identity] = RecordedRun(identity, SpecRecord.from_json(value["spec_record"]))
    for record in session.manifest.of_kind("train"):
        identity = str(record["run"])
        spec = record.get("spec_record")
        if identity in runs:
            runs[identity] = RecordedRun(identity, runs[identity].spec, str(record.get("state", "")))
        elif isinstance(spec, dict):
            runs[identity] = RecordedRun(identity, SpecRecord.from_json(spec), str(record.get("state", "")))
    return list(runs.values())


def read_json(file: Path) -> dict[str, Any] | None:
    """A JSON object in a file; None where there is none that can be read."""
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
