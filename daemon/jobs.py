"""Jobs: what is asked for, and what stands in the queue."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

JobState = Literal["ready", "running", "waiting", "done", "failed", "refused", "cancelled"]
STATES: tuple[JobState, ...] = get_args(JobState)
ENDED: frozenset[JobState] = frozenset({"done", "failed", "refused", "cancelled"})


@dataclass(frozen=True)
class JobRequest:
    """Work that is wanted.

    Attributes:
        key: from ``job_key``; a key stands in the queue once.
        kind: a name of ``handlers.kinds.KINDS``.
        session: the session's identity, or "" for work that belongs to none.
        subject: what people call it: the file's name, the session's name.
        payload: JSON values kept for the hand-out.
        priority: smaller goes first; None takes the kind's.
        run_at: not before this wall-clock time (seconds since the epoch).
    """

    key: str
    kind: str
    session: str = ""
    subject: str = ""
    payload: Mapping[str, Any] = field(default_factory=dict)
    priority: int | None = None
    run_at: float = 0.0


@dataclass(frozen=True)
class Job:
    """One row of the queue. Times are wall-clock seconds since the epoch.

    Attributes:
        attempts: starts that count, the present one included.
        interruptions: starts that a dead daemon cut short.
        progress: ``done``, ``total``, ``note``, ``facts`` of the present or last run, or empty.
        problem: why it failed (``type``, ``message``, ``traceback``), was refused (``Refusal.to_json``) or waits
            (``reason``, ``retry_after``); empty where nothing is wrong.
    """

    id: int
    key: str
    kind: str
    lane: str
    session: str
    subject: str
    payload: Mapping[str, Any]
    state: JobState
    priority: int
    attempts: int
    max_attempts: int
    interruptions: int
    run_at: float
    lease_until: float | None
    lease_token: str | None
    progress: Mapping[str, Any]
    problem: Mapping[str, Any]
    created: float
    started: float | None
    ended: float | None

    @property
    def last_attempt(self) -> bool:
        """True when a failure of the present run is final."""
        return self.attempts >= self.max_attempts

    def to_json(self) -> dict[str, Any]:
        """The job as JSON values for ``fastsd jobs --json``; the lease's token stays inside."""
        value = asdict(self)
        del value["lease_token"]
        return value


def job_key(kind: str, content: str, parameters: Mapping[str, Any]) -> str:
    """The key of a piece of work: the same kind, content and parameters give the same 64 hex digits, always.

    Args:
        kind: the job's kind.
        content: what it works on, by content (a hash) or by identity (path, size, modification time).
        parameters: JSON values that change the outcome; the order of keys does not matter.
    """
    text = json.dumps([kind, content, parameters], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def to_row(value: Any) -> str:
    """JSON in ASCII: SQLite's text must be UTF-8, and names of files need not be."""
    return json.dumps(value, separators=(",", ":"))


def from_row(row: sqlite3.Row) -> Job:
    """A row as a ``Job``."""
    value = dict(row)
    for name in ("subject", "payload", "progress", "problem"):
        value[name] = json.loads(value[name])
    return Job(**value)
