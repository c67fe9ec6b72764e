"""The search of a tree, where fastsd.yaml switches it on: which sessions its index has to look at, and what it tells.

What the index holds is asked of the index itself, which lies in the state folder: delete it, and all is wanted anew.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daemon.jobs import JobRequest, job_key
from daemon.routing import fingerprint
from daemon.session import Session
from handlers.search import store
from sessions.manifest import Record

KIND = "embed"


def index_folder(state: Path, model: str) -> Path:
    """Where the index of a model lies in the state folder of a tree."""
    return state / "search" / (re.sub(r"[^A-Za-z0-9._-]+", "_", model).strip(".") or "model")


@dataclass(frozen=True)
class Searching:
    """The index of a tree as the daemon sees it.

    Attributes:
        model: the name of the model that looks at pictures.
        folder: where the index lies.
    """

    model: str
    folder: Path

    def request(self, session: Session, crops: Iterable[Record]) -> JobRequest | None:
        """The job that brings the index to the pictures of a session; None where it knows them as they are.

        Args:
            session: the session.
            crops: the records of the crops of its pictures that are there: what could be read, with its hash.
        """
        digest = digest_of(session, crops)
        if store.digest_of(self.folder, session.path) == digest:
            return None
        parameters = {"digest": digest, "search": self.model}
        key = job_key(KIND, session.id, parameters)
        return JobRequest(key, KIND, session.id, "pictures for the search", {"params": parameters})

    def payload(self, session: Session, crops: Sequence[Record], root: Path) -> dict[str, Any]:
        """What the job is given, but for ``models`` and ``pixel_limit``."""
        pictures = [
            {
                "path": session.tree_path(str(record["source"])),
                "size": record["size"],
                "mtime_ns": record["mtime_ns"],
                "sha256": record["sha256"],
            }
            for record in crops
        ]
        return {
            "index": os.fspath(self.folder),
            "search": self.model,
            "root": os.fspath(root),
            "scope": session.path,
            "pictures": pictures,
            "digest": digest_of(session, crops),
        }

    def twins(self, session: Session) -> list[tuple[str, str]]:
        """The pictures of a session that look nearly the same to the model, as pairs of their paths in it."""
        found = store.twins_of(self.folder, session.path)
        return [(session.relative(pair.one), session.relative(pair.other)) for pair in found]


def digest_of(session: Session, crops: Iterable[Record]) -> str:
    """Another one for other pictures, and in another place."""
    keys = ("source", "size", "mtime_ns", "sha256")
    return fingerprint([session.path, sorted([record.get(key) for key in keys] for record in crops)])
