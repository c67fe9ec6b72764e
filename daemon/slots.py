"""A slot: a place in a lane where one worker at a time lives, warm between the jobs of its kind."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from daemon.workers import MARK, Ended, Plan, Progress, WorkerProcess, start_worker
from handlers.kinds import Kind
from handlers.outcome import Outcome

# An idle worker has nothing to save.
_IDLE_GRACE = 5.0


@dataclass(frozen=True)
class WorkerSettings:
    """What all workers have in common.

    Attributes:
        cache: a folder on a local disk for downloads and scratch files.
        logs: the folder of their logs, one file a slot.
        environment: their environment; ``OMP_NUM_THREADS`` and the like belong here.
        mark: names the daemon's state folder in their environment (see ``workers.end_orphans``); "" for one-off work.
        idle_seconds: how long a worker stays warm with nothing to do.
        cancel_seconds: how long a cancelled job may take to end before its worker is killed.
    """

    cache: Path
    logs: Path
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    mark: str = ""
    idle_seconds: float = 120.0
    cancel_seconds: float = 30.0

    def plan(self, kind: Kind, device: str, name: str) -> Plan:
        """How the worker of a slot is started."""
        environment = {**self.environment, MARK: self.mark} if self.mark else self.environment
        return Plan(kind, device, self.cache, self.logs / f"worker-{name}.log", environment)


class Slot:
    """Runs jobs of one kind at a time, in a worker that it keeps, replaces and ends.

    Attributes:
        name: ``cpu-0``; also in the name of its log.
        device: a torch device string.
        idle_since: when its last job ended, on the event loop's clock.
    """

    def __init__(self, name: str, device: str, settings: WorkerSettings) -> None:
        self.name = name
        self.device = device
        self.idle_since = 0.0
        self._settings = settings
        self._worker: WorkerProcess | None = None
        self._cancelled: set[int] = set()
        self._taken_away = asyncio.Event()
        self._timers: dict[int, asyncio.TimerHandle] = {}

    @property
    def warm_kind(self) -> str | None:
        """The kind that its worker is ready for."""
        return self._worker.plan.kind.name if self._worker is not None and self._worker.usable else None

    @property
    def has_worker(self) -> bool:
        """True while a worker process belongs to it."""
        return self._worker is not None

    @property
    def resident_bytes(self) -> int:
        """The memory that its worker holds."""
        return 0 if self._worker is None else self._worker.resident_bytes

    def begin(self) -> None:
        """Forget what was said about the jobs before."""
        self._cancelled.clear()
        self._taken_away.clear()

    async def run(self, kind: Kind, jobs: Mapping[int, Mapping[str, Any]]) -> AsyncGenerator[Progress | Ended]:
        """Run jobs (number → payload); each has one ``Ended``. Call ``begin`` before.

        Jobs whose worker this slot itself ended are ``cancelled`` if they were, else ``stopping``.

        Raises:
            OSError: no worker can be started.
        """
        worker = None if self._taken_away.is_set() else await self._worker_for(kind)
        if worker is None or self._taken_away.is_set():
            for job in jobs:
                yield self._own_verdict(job)
            return
        events = worker.run(jobs)
        left = set(jobs)
        try:
            for job in self._cancelled:
                self._cancel(worker, job)
            async for event in events:
                if isinstance(event, Ended):
                    left.discard(event.job)
                    self._give_time(event.job)
                    if event.died and self._taken_away.is_set():
                        event = self._own_verdict(event.job)
                yield event
        finally:
            if left:
                worker.kill()  # nobody listens any more
            for job in jobs:
                self._give_time(job)
            self.idle_since = asyncio.get_running_loop().time()

    def _own_verdict(self, job: int) -> Ended:
        return Ended(job, Outcome("cancelled" if job in self._cancelled else "stopping"), died=True)

    async def _worker_for(self, kind: Kind) -> WorkerProcess:
        if self._worker is None or self.warm_kind != kind.name:
            await self.rest()
            self._worker = await start_worker(self._settings.plan(kind, self.device, self.name))
        return self._worker

    def cancel(self, jobs: Iterable[int]) -> None:
        """Cancel running jobs; if they do not end in time, the worker is killed."""
        for job in jobs:
            self._cancelled.add(job)
            if self._worker is not None:
                self._cancel(self._worker, job)

    def _cancel(self, worker: WorkerProcess, job: int) -> None:
        worker.cancel(job)
        self._give_time(job)
        self._timers[job] = asyncio.get_running_loop().call_later(self._settings.cancel_seconds, self.kill)

    def _give_time(self, job: int) -> None:
        if timer := self._timers.pop(job, None):
            timer.cancel()

    def request_stop(self) -> None:
        """Ask the running jobs to save and come back."""
        self._taken_away.set()
        if self._worker is not None:
            self._worker.request_stop()

    def kill(self) -> None:
        """End the worker now; its jobs come back."""
        self._taken_away.set()
        if self._worker is not None:
            self._worker.kill()

    async def rest(self) -> None:
        """End the idle worker, and free what it held."""
        if (worker := self._worker) is not None:
            await worker.stop(_IDLE_GRACE)
            if self._worker is worker:
                self._worker = None


def make_slots(lanes: Mapping[str, int], devices: Iterable[str], settings: WorkerSettings) -> dict[str, list[Slot]]:
    """The slots of each lane. Slot i of lane ``gpu`` gets the i-th device, the others the CPU."""
    named = dict(enumerate(devices))
    return {
        lane: [
            Slot(f"{lane}-{index}", named.get(index, "cpu") if lane == "gpu" else "cpu", settings)
            for index in range(number)
        ]
        for lane, number in lanes.items()
    }
