"""What a session knows of itself: its identity, and one line for everything that was made in it.

The manifest is the memory that travels with the folder: a new machine with an empty database reads it and knows what
is done. Lines are only appended; the last line of a kind and subject counts; a torn line is skipped.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sessions import __version__, layout
from sessions.files import append_lines, write_json

Record = dict[str, Any]
INTERMEDIATE = "intermediate"
"""Records of intermediate models that have their file; ``run`` is the model's name, ``of`` its run."""


def manifest_path(folder: Path) -> Path:
    """Where the manifest of a session lies."""
    return folder / layout.PRIVATE / "manifest.jsonl"


def subject_of(record: Mapping[str, Any]) -> str:
    """What a record is about: the picture, or the run."""
    return str(record.get("source") or record.get("run") or "")


@dataclass
class Manifest:
    """The newest record of each kind and subject of one session.

    Attributes:
        folder: the session's folder.
        records: (kind, subject) → record.
    """

    folder: Path
    records: dict[tuple[str, str], Record] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read the manifest of a session; an absent one is empty.

        Raises:
            OSError: it is there and cannot be read.
        """
        manifest = cls(folder)
        try:
            with manifest_path(folder).open("rb") as file:
                for line in file:
                    try:
                        record = json.loads(line)
                    except ValueError:
                        continue
                    if isinstance(record, dict) and isinstance(record.get("kind"), str):
                        manifest._take(record)
        except FileNotFoundError:
            pass
        return manifest

    def _take(self, record: Record) -> None:
        key = (record["kind"], subject_of(record))
        if record.get("gone"):
            self.records.pop(key, None)
        else:
            self.records[key] = record

    def get(self, kind: str, subject: str) -> Record | None:
        """The newest record of a kind about a subject."""
        return self.records.get((kind, subject))

    def of_kind(self, kind: str) -> list[Record]:
        """All newest records of a kind, oldest first."""
        return [record for (name, _), record in self.records.items() if name == kind]

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write records, durably, and remember them.

        Raises:
            OSError: the folder cannot be written.
        """
        now = datetime.now(UTC).isoformat(timespec="seconds")
        complete = [{**record, "at": now, "version": __version__} for record in records]
        if not complete:
            return
        append_lines(manifest_path(self.folder), [json.dumps(record, ensure_ascii=True) for record in complete])
        for record in complete:
            self._take(record)

    def stems(self) -> dict[str, str]:
        """Output stems in use: source → stem."""
        return {
            str(record["source"]): str(record["stem"])
            for (kind, _), record in self.records.items()
            if kind in ("crop", "caption") and "stem" in record
        }


@dataclass(frozen=True)
class Identity:
    """Who a session is, whatever its folder is called.

    Attributes:
        id: eight hex digits.
        name: the folder's name when the identity was given or last confirmed.
    """

    id: str
    name: str


def read_identity(folder: Path) -> Identity | None:
    """The identity in ``.fastsd/session.json``, or None when there is none that can be read."""
    try:
        value = json.loads((folder / layout.PRIVATE / "session.json").read_bytes())
        return Identity(str(value["id"]), str(value.get("name", "")))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_identity(folder: Path, identity: Identity) -> None:
    """Write ``.fastsd/session.json``.

    Raises:
        OSError: the folder cannot be written.
    """
    created = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(folder / layout.PRIVATE / "session.json", {"id": identity.id, "name": identity.name, "since": created})


def new_identity(folder: Path) -> Identity:
    """A fresh identity for a folder; nothing is written."""
    return Identity(secrets.token_hex(4), folder.name)


def outputs_present(folder: Path, record: Mapping[str, Any]) -> bool:
    """Whether every output that a record names still lies in the session."""
    outputs: Sequence[str] = record.get("outputs", ())
    return all(os.path.lexists(folder / output) for output in outputs)
