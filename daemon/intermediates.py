"""Intermediate models of runs (``save_every``): from the folders that training leaves to one file each.

A folder in ``.fastsd/finished/`` with an ``intermediate.json`` is whole, and wants its file in ``runs/<run>/``; once
the manifest knows that file, the folder is of no more use.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from daemon.jobs import JobRequest, job_key
from daemon.runs import read_json
from daemon.session import Session
from sessions import layout
from sessions.manifest import INTERMEDIATE, Record
from sessions.status import size

_CARRIED = ("run", "of", "step", "metadata", "spec_record", "preview")


def intermediate_requests(session: Session) -> list[JobRequest]:
    """A conversion for each intermediate model that has no file yet."""
    return [
        JobRequest(
            job_key("convert", f"{session.id}/{facts['run']}", {}),
            "convert",
            session.id,
            f"model of step {facts['step']} of run {facts['of']}",
            {**{key: facts[key] for key in _CARRIED if facts.get(key)}, "finished": session.inside(folder)},
        )
        for folder, facts in _left(session)
        if session.manifest.get(INTERMEDIATE, facts["run"]) is None
        and (session.folder / layout.RUNS / facts["of"]).is_dir()
    ]


def tidy_intermediates(session: Session) -> None:
    """Remove the folders of models whose files are on record: a kill may have come before that."""
    for folder, facts in _left(session):
        if session.manifest.get(INTERMEDIATE, facts["run"]) is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _left(session: Session) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The folders of intermediate models that still stand, in the order of their steps."""
    found = []
    for file in (session.folder / layout.FINISHED).glob(f"*/{layout.KEPT_FACTS}"):
        facts = read_json(file) or {}
        try:
            named = layout.kept_name(str(facts["of"]), int(facts["step"]))
        except (KeyError, TypeError, ValueError):
            continue
        # Temp folders hold one, too.
        if file.parent.name == named == facts.get("run"):
            found.append((file.parent, facts))
    yield from sorted(found, key=lambda each: (each[1]["of"], each[1]["step"]))


def output_of(session: Session, stored: Mapping[str, Any]) -> Path:
    """Where the file of an intermediate model comes to lie."""
    title = (stored.get("metadata") or {}).get("title") or session.name
    name = f"{layout.model_stem(title, stored['run'])}.safetensors"
    return session.folder / layout.RUNS / str(stored["of"]) / name


def notes_on(session: Session) -> list[str]:
    """A line a run that has intermediate models in its folder."""
    runs: defaultdict[str, list[Record]] = defaultdict(list)
    for record in session.manifest.of_kind(INTERMEDIATE):
        if session.manifest.get("convert", str(record["run"])) is None:
            runs[str(record["of"])].append(record)
    lines = []
    for run, records in runs.items():
        steps = ", ".join(str(record["step"]) for record in sorted(records, key=lambda record: int(record["step"])))
        each = size(max(int(record.get("bytes") or 0) for record in records))
        lines.append(
            f"Intermediate models lie in {layout.RUNS}/{run}: {'step' if len(records) == 1 else 'steps'} {steps} "
            f"({each} each). Make one the session's model with: fastsd models promote FOLDER --step N"
        )
    return lines
