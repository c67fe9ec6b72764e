"""Which of a session's models is *the* model: what ``fastsd models promote`` says, kept in the manifest.

A promotion is one record about the session itself (source ``.``); the last one counts. What follows from it is asked
of the tree: an intermediate model moves from ``runs/<run>/`` to where finished models lie, and the model is published
(again), in place of those that were not published yet. So a kill at any point is mended by the next plan.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sessions.manifest import INTERMEDIATE, Manifest, Record
from sessions.refusal import Refusal

KIND = "promoted"
_SESSION = "."
_OF_THE_LINE = ("kind", "at", "version")


@dataclass(frozen=True)
class Candidate:
    """A model of a session that has its file.

    Attributes:
        name: a run's id, or ``<run>-step-N``.
        run: the run's id.
        step: of stage 2, for an intermediate model.
        file: its path in the session.
    """

    name: str
    run: str
    step: int | None
    file: str

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Candidate:
        """From a record of a conversion."""
        name = str(record["run"])
        step = record.get("step")
        return cls(name, str(record.get("of") or name), None if step is None else int(step), str(record["outputs"][0]))

    def answers_to(self, word: str) -> bool:
        """Whether it is called so: by its name, its file's path or name, with or without the ending, or run/step-N."""
        names = {self.name, self.file, Path(self.file).name, Path(self.file).stem}
        return word in names or (self.step is not None and word == f"{self.run}/step-{self.step}")

    def told(self) -> str:
        """For lists of what there is."""
        return self.name if self.step is None else f"{self.name} (--step {self.step})"


def candidates(manifest: Manifest) -> list[Candidate]:
    """Every model of a session that has a file on record: those of runs and what other trainers left, then others."""
    made = [record for record in manifest.of_kind("convert") if record.get("run") and record.get("outputs")]
    placed = {str(record["run"]) for record in made}
    kept = [
        record
        for record in manifest.of_kind(INTERMEDIATE)
        if record.get("outputs") and str(record["run"]) not in placed
    ]
    return [Candidate.of(record) for record in (*made, *kept)]


def choose(manifest: Manifest, file: str | None, step: int | None) -> Candidate:
    """The model that a person means.

    Args:
        manifest: of the session.
        file: a path in the session; None: the newest run's.
        step: of which step, where no file is named.

    Raises:
        Refusal: code ``model``: there is none such.
    """
    every = candidates(manifest)
    found = [each for each in every if (each.answers_to(file) if file is not None else each.step == step is not None)]
    if found:
        return found[-1]
    known = ", ".join(each.told() for each in every)
    what = f"{file} is no model of this session." if file is not None else f"There is no model of step {step} here."
    raise Refusal("model", what, f"There are: {known}." if known else "It has no model yet.")


def promote(manifest: Manifest, name: str) -> Candidate:
    """Make a model the one of its session; published by whoever publishes.

    Args:
        manifest: of the session, which nobody else writes meanwhile.
        name: of a ``Candidate``.

    Raises:
        Refusal: code ``model``: its file is gone, or another file lies where it shall come to lie.
        OSError: the folder cannot be written.
    """
    chosen = choose(manifest, name, None)
    _require_movable(manifest, chosen)
    others = [str(record["run"]) for record in manifest.of_kind("convert") if record.get("run") != chosen.name]
    unpublished = [other for other in others if manifest.get("publish", other) is None]
    records: list[Record] = [
        {
            "kind": KIND,
            "source": _SESSION,
            "run": chosen.name,
            "promotion": secrets.token_hex(4),
            "supersedes": unpublished,
        }
    ]
    if manifest.get("publish", chosen.name) is not None:
        records.insert(0, {"kind": "publish", "run": chosen.name, "gone": True})
    manifest.append(records)
    place(manifest)
    return choose(manifest, chosen.name, None)


def promoted(manifest: Manifest) -> Record:
    """The promotion that counts; empty where nothing was promoted."""
    return manifest.get(KIND, _SESSION) or {}


def is_superseded(manifest: Manifest, name: str) -> bool:
    """Whether another model was promoted while this one waited for its publication."""
    return name in promoted(manifest).get("supersedes", ())


def place(manifest: Manifest) -> None:
    """Move a promoted intermediate model to where finished models lie, as far as that has not happened.

    Raises:
        OSError: the folder cannot be written.
    """
    name = str(promoted(manifest).get("run", ""))
    record = manifest.get(INTERMEDIATE, name)
    if record is None or manifest.get("convert", name) is not None or not record.get("outputs"):
        return
    outputs = [str(output) for output in record["outputs"]]
    # The model last: whoever sees it sees what belongs beside it.
    for output in (*outputs[1:], outputs[0]):
        source, target = manifest.folder / output, manifest.folder / Path(output).name
        if os.path.lexists(source) and not os.path.lexists(target):
            source.rename(target)
    moved = [Path(output).name for output in outputs]
    if not os.path.lexists(manifest.folder / moved[0]):
        return  # a person took the file away: there is nothing to publish
    facts = {key: value for key, value in record.items() if key not in _OF_THE_LINE}
    manifest.append([{"kind": "convert", **facts, "outputs": moved}])


def _require_movable(manifest: Manifest, chosen: Candidate) -> None:
    file, target = manifest.folder / chosen.file, manifest.folder / Path(chosen.file).name
    if not file.is_file():
        raise Refusal("model", f"The model {chosen.file} is gone.", "Put it back, or promote another.")
    is_moved = chosen.step is not None and file != target
    record = manifest.get(INTERMEDIATE, chosen.name) or {}
    for output in record.get("outputs", ()) if is_moved else ():
        there = manifest.folder / Path(str(output)).name
        if os.path.lexists(there):
            raise Refusal("model", f"{there.name} lies in the session already.", "Move it away, and promote again.")
