"""How a job ended: made from what a handler returned or raised, and carried over the pipe to the daemon."""

from __future__ import annotations

import errno
import os
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from handlers.context import Cancelled, JobResult, Stopping, Waiting
from sessions.refusal import Refusal

OutcomeState = Literal["done", "refused", "failed", "waiting", "cancelled", "stopping"]
_TRACEBACK_CHARACTERS = 20_000
_OWN_PACKAGES = {"daemon", "handlers", "sessions"}
# Someone installs the missing package: worth a look every few minutes.
_RETRY_MISSING_PACKAGE = 300.0
_RETRY_DISK_FULL = 10.0


@dataclass(frozen=True)
class Outcome:
    """The end of one start of a job.

    Attributes:
        state: ``done``, ``refused``, ``failed``, ``waiting``, ``cancelled``, ``stopping`` (it goes back).
        facts: of a done job, for the manifest.
        outputs: of a done job, absolute paths.
        refusal: of a refused job.
        error: of a failed job: ``type``, ``message``, ``traceback``.
        reason: of a waiting job, one sentence.
        retry_after: of a waiting job, seconds.
    """

    state: OutcomeState
    facts: Mapping[str, Any] = field(default_factory=dict)
    outputs: tuple[Path, ...] = ()
    refusal: Refusal | None = None
    error: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""
    retry_after: float = 30.0

    @classmethod
    def of(cls, end: JobResult | BaseException) -> Outcome:
        """The outcome that a handler's result or exception stands for."""
        match end:
            case JobResult():
                return cls("done", facts=end.facts, outputs=tuple(end.outputs))
            case Refusal():
                return cls("refused", refusal=end)
            case Waiting():
                return cls("waiting", reason=end.reason, retry_after=end.retry_after)
            case Stopping():
                return cls("stopping")
            case Cancelled():
                return cls("cancelled")
            case ImportError() if (end.name or "").partition(".")[0] not in _OWN_PACKAGES:
                # The environment is at fault, not the file: thousands of files would fail alike.
                reason = f"A Python package cannot be loaded ({end}): install it with pip install 'fastsd[all]'."
                return cls("waiting", reason=reason, retry_after=_RETRY_MISSING_PACKAGE)
            case OSError() if end.errno in (errno.ENOSPC, errno.EDQUOT):
                # No file is at fault, and all jobs of the kind would fail alike.
                reason = "The disk is full. Make room on it: the work then goes on by itself."
                return cls("waiting", reason=reason, retry_after=_RETRY_DISK_FULL)
            case MemoryError():
                text = str(end) or "There was not enough memory. Close other programs, or use smaller pictures."
                return cls.failure("MemoryError", text, _traceback_of(end))
            case _:
                return cls.failure(type(end).__name__, str(end) or type(end).__name__, _traceback_of(end))

    @classmethod
    def failure(cls, kind: str, message: str, trace: str = "") -> Outcome:
        """A failure in words: the error's type, a sentence, and where it happened or what the log said last."""
        return cls("failed", error={"type": kind, "message": message, "traceback": trace})

    def to_json(self) -> dict[str, Any]:
        """The outcome as the fields of its message."""
        match self.state:
            case "done":
                return {"state": "done", "facts": self.facts, "outputs": [os.fspath(path) for path in self.outputs]}
            case "refused":
                return {"state": "refused", "refusal": self.refusal.to_json() if self.refusal else None}
            case "failed":
                return {"state": "failed", "error": self.error}
            case "waiting":
                return {"state": "waiting", "reason": self.reason, "retry_after": self.retry_after}
            case _:
                return {"state": self.state}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Outcome:
        """The inverse of ``to_json``. Raises ``KeyError`` or ``TypeError`` where the message is none."""
        refusal = value.get("refusal")
        return cls(
            value["state"],
            facts=value.get("facts", {}),
            outputs=tuple(Path(path) for path in value.get("outputs", ())),
            refusal=None if refusal is None else Refusal.from_json(refusal),
            error=value.get("error", {}),
            reason=value.get("reason", ""),
            retry_after=value.get("retry_after", 30.0),
        )


def _traceback_of(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-_TRACEBACK_CHARACTERS:]
