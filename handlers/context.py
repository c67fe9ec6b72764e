"""What a handler is given while it works on a job, and how it says how the job ended.

A handler runs in a worker process (``handlers.worker``). It never sees the queue, the database or the daemon: it
gets one ``JobContext`` a job, reports progress through it, and returns a ``JobResult`` or raises one of the
exceptions below. Everything else that it raises is a failure, which is tried again with back-off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True)
class JobResult:
    """What a finished job leaves behind.

    Attributes:
        facts: what the manifest should keep of it (JSON values; the handler's page of the architecture names them).
        outputs: the files that were made, absolute paths, each complete and under its final name.
    """

    facts: Mapping[str, Any] = field(default_factory=dict)
    outputs: Sequence[Path] = ()


class Cancelled(Exception):  # noqa: N818 - it is no error
    """Someone cancelled this job; what was half made has been cleaned up."""


class Stopping(Exception):  # noqa: N818 - it is no error
    """The daemon stops: the job saved what it could and goes back to the queue; this is no attempt."""


class Waiting(Exception):  # noqa: N818 - it is no error
    """The job cannot run yet through no fault of its files: weights are missing, the WebUI is absent.

    Args:
        reason: one sentence for STATUS.txt that says what is missing and which command or setting helps.
        retry_after: seconds until it is worth another look.
    """

    def __init__(self, reason: str, retry_after: float = 30.0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after = retry_after


@dataclass
class JobContext:
    """One job, as its handler sees it.

    Attributes:
        job: the job's number, for logs.
        kind: ``crop``, ``caption``, ``train``, ``convert``, ``publish`` or ``sync``.
        payload: the job's parameters (JSON values; paths are absolute strings).
        device: a torch device string: ``cpu``, ``cuda:0``.
        cache: a folder on a local disk for downloads and scratch files.
        report: called with (done, total, note, facts); the worker sends it to the daemon.
        is_cancelled: True once someone cancelled the job.
        is_stopping: True once the daemon wants to stop; long jobs save and raise ``Stopping``.
        limit: see ``within``.
    """

    job: int
    kind: str
    payload: Mapping[str, Any]
    device: str
    cache: Path
    report: Callable[[float, float, str, Mapping[str, Any]], None]
    is_cancelled: Callable[[], bool]
    is_stopping: Callable[[], bool]
    limit: Callable[[float, Exception], AbstractContextManager[None]] = lambda _seconds, _end: nullcontext()

    def progress(self, done: float, total: float, note: str = "", **facts: Any) -> None:
        """Tell how far the job is, and give it a place to be cancelled.

        Args:
            done: units done.
            total: units in all; 0 when not known.
            note: a few words for the status line ("stage 2 of 2: UNet").
            facts: numbers worth showing: ``loss``, ``seconds_per_step``, ``eta`` (seconds) …

        Raises:
            Cancelled: the job was cancelled.
        """
        self.report(done, total, note, facts)
        self.check_cancelled()

    def within(self, seconds: float, end: Exception) -> AbstractContextManager[None]:
        """A block that may take so many seconds. If it takes longer, the job has ended by ``end``, a refusal say.

        For native code that cannot be interrupted: the worker process ends with it, and the rest of its batch goes back
        to the queue. Where the block never lets go of the interpreter, the daemon's patience counts (``Kind.silence``).
        """
        return self.limit(seconds, end)

    def check_cancelled(self) -> None:
        """Raise ``Cancelled`` if the job was cancelled."""
        if self.is_cancelled():
            raise Cancelled


class Handler(Protocol):
    """A kind of job. One instance lives as long as its worker process and may keep a model warm."""

    def run(self, context: JobContext) -> JobResult:
        """Do one job.

        Raises:
            sessions.refusal.Refusal: the input is at fault; it will not be tried again until the file changes.
            Waiting: something outside is missing; the job is looked at again later, and it is no attempt.
            Stopping: the daemon stops; the job's state is saved.
            Cancelled: the job was cancelled.
        """
        ...


@runtime_checkable
class BatchHandler(Protocol):
    """A handler that does several jobs of its kind together faster than one by one."""

    def run_batch(self, contexts: Sequence[JobContext]) -> Sequence[JobResult | BaseException]:
        """Do all jobs; one entry a context, in order: its result, or the exception that ended it."""
        ...
