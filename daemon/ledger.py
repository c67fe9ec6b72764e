"""The ledger of what runs: outcomes on record before a row ends, leases renewed, progress written down."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from daemon.holds import Holds
from daemon.jobs import Job
from daemon.queue import LeaseLost, Queue
from daemon.slots import Slot
from handlers.outcome import Outcome

LEASE_SECONDS = 60.0
_KEEP_SECONDS = 2.0
_logger = logging.getLogger(__name__)


class Hooks:
    """What the dispatcher asks and tells; the composition overrides what it needs."""

    async def prepare(self, job: Job) -> Mapping[str, Any] | None:
        """The payload to hand out, or None when the job is not wanted any more (its row goes).

        May raise what a handler may: ``Refusal``, ``Waiting``.
        """
        return job.payload

    def may_start(self, kind: str) -> bool:  # noqa: ARG002 - for those who override it
        """False holds a kind back; asked again every second while jobs of it are due."""
        return True

    async def before_start(self, kind: str) -> None:
        """Make room for jobs of a kind that are about to start. May raise ``Waiting``."""

    async def on_outcome(self, job: Job, outcome: Outcome) -> None:
        """Record an outcome durably; only after it the row is ended.

        If it raises, the job waits and runs again. ``job.last_attempt`` tells whether a failure is final.
        """

    def on_progress(self, job: Job, progress: Mapping[str, Any]) -> None:
        """Hear how far a job is (``done``, ``total``, ``note``, ``facts``)."""


@dataclass
class Running:
    """A job in a slot's hands.

    Attributes:
        job: its row when it was claimed.
        slot: where it runs.
        progress: what was heard last.
        told: True once ``progress`` is in the queue's file.
        forgotten: True when its session is gone: its row goes, too.
    """

    job: Job
    slot: Slot
    progress: Mapping[str, Any] = field(default_factory=dict)
    told: bool = True
    cancelled: bool = False
    forgotten: bool = False


class Ledger:
    """Keeps the queue's rows in step with what the workers do.

    Args:
        queue: the queue.
        hooks: where outcomes and progress are told.
        holds: learns which kinds wait.
        clock: wall-clock seconds.
    """

    def __init__(self, queue: Queue, hooks: Hooks, holds: Holds, clock: Callable[[], float]) -> None:
        self._queue = queue
        self._hooks = hooks
        self._holds = holds
        self._clock = clock
        self._leases_renewed = float("-inf")
        self.running: dict[int, Running] = {}

    def begin(self, jobs: Sequence[Job], slot: Slot) -> None:
        """These jobs are in a slot's hands."""
        self.running.update({job.id: Running(job, slot) for job in jobs})

    def hear(self, identity: int, report: Mapping[str, Any]) -> None:
        """A job told how far it is."""
        entry = self.running[identity]
        entry.progress, entry.told = report, False
        try:
            self._hooks.on_progress(entry.job, report)
        except Exception:
            _logger.exception("The progress of job %d was not told", identity)

    async def finish(self, identity: int, outcome: Outcome) -> None:
        """Record an outcome, then end the row. A job that was finished before is passed over."""
        entry = self.running.get(identity)
        if entry is None:
            return
        job = entry.job
        if not entry.forgotten:
            try:
                await self._hooks.on_outcome(job, outcome)
            except Exception as error:
                _logger.exception("The outcome of job %d could not be recorded", identity)
                reason = f"What became of {job.subject or job.kind} could not be written down ({error})."
                outcome = Outcome("waiting", reason=f"{reason} fastsd tries again.")
        self.running.pop(identity, None)
        if entry.forgotten:
            self._change(job, lambda: self._queue.drop(job))
        else:
            self._change(job, lambda: self._end(job, outcome))

    def drop(self, identity: int) -> None:
        """A job is not wanted any more; its row goes."""
        job = self.running.pop(identity).job
        self._change(job, lambda: self._queue.drop(job))

    def _end(self, job: Job, outcome: Outcome) -> None:
        now = self._clock()
        if outcome.state == "waiting":
            self._holds.waited(job.kind, job.id, outcome.reason, outcome.retry_after, now)
        elif outcome.state not in {"stopping", "cancelled"}:
            self._holds.went(job.kind)
        match outcome.state:
            case "done":
                self._queue.done(job, now)
            case "refused" if outcome.refusal is not None:
                self._queue.refuse(job, outcome.refusal, now)
            case "waiting":
                self._queue.wait(job, outcome.reason, outcome.retry_after, now)
            case "cancelled":
                self._queue.end_cancelled(job, now)
            case "stopping":
                self._queue.give_back(job)
            case _:
                self._queue.fail(job, outcome.error, now)

    @staticmethod
    def _change(job: Job, change: Callable[[], None]) -> None:
        """Change a row. If that fails, its lease runs out and the job comes again; its outcome is on record."""
        try:
            change()
        except LeaseLost:
            _logger.warning("Job %d (%s %s) was no longer ours when it ended", job.id, job.kind, job.subject)
        except sqlite3.Error:
            _logger.exception("The end of job %d was not written to the queue", job.id)

    async def keep(self) -> None:
        """Renew the leases of what runs, and write down how far it is. Never returns."""
        while True:
            await asyncio.sleep(_KEEP_SECONDS)
            try:
                self.renew_leases(self._clock())
                news = [entry for entry in self.running.values() if not entry.told]
                if news:
                    self._queue.progress((entry.job, entry.progress) for entry in news)
                for entry in news:
                    entry.told = True
            except sqlite3.Error:
                _logger.exception("The queue cannot be written")

    def renew_leases(self, now: float) -> None:
        """Renew the leases, when a third of their time has passed; a job that lost its own is cancelled.

        Call it before every claim: after the machine slept, all leases look lost.
        """
        if not self.running or abs(now - self._leases_renewed) < LEASE_SECONDS / 3:
            return
        lost = self._queue.heartbeat([entry.job for entry in self.running.values()], now, LEASE_SECONDS)
        self._leases_renewed = now
        for job in lost:
            _logger.warning("Job %d (%s %s) is no longer ours; cancelling it", job.id, job.kind, job.subject)
            self.running[job.id].slot.cancel([job.id])
