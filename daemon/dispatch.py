"""The dispatcher: hands due jobs to the slots of their lane, and ends each job's row after its outcome was recorded.

One pass (``_assign``) fills the free slots; it runs when somebody calls ``wake``, when a slot gets free, and when the
next job's time has come. What is known about the tree comes in through ``Hooks``.
"""

from __future__ import annotations

import asyncio
import logging
import math
import sqlite3
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

from daemon.holds import Holds
from daemon.jobs import Job
from daemon.ledger import LEASE_SECONDS, Hooks, Ledger, Running
from daemon.queue import Queue
from daemon.slots import Slot, WorkerSettings, make_slots
from daemon.workers import Ended, end_orphans
from handlers.context import Cancelled, Stopping
from handlers.kinds import KINDS, Kind
from handlers.outcome import Outcome

# A gate tells nobody that it opened; and a wall clock may jump.
_GATE_SECONDS = 1.0
_LONGEST_SLEEP = 60.0
_TROUBLE_SECONDS = 5.0
_KILL_SECONDS = 10.0
# A batch that gathers is handed out early when none has joined it for this part of its time.
_QUIET_PART = 4
_logger = logging.getLogger(__name__)


class Dispatcher:
    """Runs the queue's jobs. Its methods belong to the event loop's thread (the main thread), except ``wake``.

    Args:
        queue: the queue; nobody else claims from it.
        lanes: lane → number of slots.
        settings: what the workers have in common.
        hooks: what the tree says.
        devices: device of each slot of lane ``gpu``; the CPU where there is none.
        kinds: the kinds of jobs, by name.
        clock: wall-clock seconds.
    """

    def __init__(
        self,
        queue: Queue,
        lanes: Mapping[str, int],
        settings: WorkerSettings,
        hooks: Hooks,
        *,
        devices: Sequence[str] = (),
        kinds: Mapping[str, Kind] = KINDS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._queue = queue
        self._settings = settings
        self._hooks = hooks
        self._kinds = kinds
        self._clock = clock
        self._lanes = make_slots(lanes, devices, settings)
        self._tasks: dict[Slot, asyncio.Task[None]] = {}
        self._holds = Holds()
        self._ledger = Ledger(queue, hooks, self._holds, clock)
        self._paused: set[str] = set()
        self._stopping = False
        self._awake = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    # What others see and say

    @property
    def running(self) -> list[Running]:
        """The jobs that run now."""
        return list(self._ledger.running.values())

    @property
    def paused(self) -> frozenset[str]:
        """The lanes that hand nothing out."""
        return frozenset(self._paused)

    def held(self) -> dict[str, str]:
        """The kinds that wait as a whole, and why."""
        return {kind: hold.reason for kind, hold in self._holds.held(self._clock()).items()}

    def wake(self) -> None:
        """Look at the queue soon. May be called from any thread."""
        if self._loop is None or self._loop.is_closed():
            self._awake.set()
        else:
            self._loop.call_soon_threadsafe(self._awake.set)

    def pause(self, lanes: Collection[str] | None = None) -> None:
        """Hand nothing more out, in all lanes or these; what runs goes on (see ``take_back``)."""
        self._paused.update(self._lanes if lanes is None else lanes)

    def resume(self, lanes: Collection[str] | None = None) -> None:
        """Hand out again."""
        self._paused.difference_update(self._lanes if lanes is None else lanes)
        self.wake()

    def take_back(self, lane: str) -> None:
        """Ask what runs in a lane to save and come back to the queue. Pause the lane first."""
        for slot in self._lanes[lane]:
            if slot in self._tasks:
                slot.request_stop()

    async def rest(self, lane: str) -> None:
        """End the idle workers of a lane, so that they hold no memory."""
        await asyncio.gather(*(slot.rest() for slot in self._lanes[lane] if slot not in self._tasks))

    def cancel(self, identity: int) -> bool:
        """Cancel a job: at once where it waits; where it runs, it is asked to, and killed if it does not.

        Returns:
            False where there is nothing to cancel.
        """
        entry = self._ledger.running.get(identity)
        if entry is None:
            return self._queue.cancel(identity, self._clock())
        entry.cancelled = True
        entry.slot.cancel([identity])
        return True

    def drop_session(self, session: str) -> None:
        """A session is gone: its jobs go, and those that run are cancelled."""
        for identity in self._queue.drop_session(session):
            if identity in self._ledger.running:
                self._ledger.running[identity].forgotten = True
                self.cancel(identity)

    def retry(self, identities: Collection[int] | None = None) -> list[int]:
        """Start jobs anew that failed, were refused or cancelled, or wait; all of them without numbers."""
        found = self._queue.retry(identities, self._clock())
        self._holds.clear()
        self.wake()
        return found

    # Life

    async def run(self) -> None:
        """Work until ``stop``. Whatever a dead daemon left running is taken over first."""
        self._loop = asyncio.get_running_loop()
        if self._settings.mark:
            end_orphans(self._settings.mark)
        self._queue.release_all(self._clock())
        keeper = asyncio.create_task(self._ledger.keep())
        try:
            while not self._stopping:
                self._awake.clear()
                try:
                    delay = self._assign()
                except sqlite3.Error:
                    _logger.exception("The queue cannot be used; trying again in %g s", _TROUBLE_SECONDS)
                    delay = _TROUBLE_SECONDS
                try:
                    async with asyncio.timeout(delay):
                        await self._awake.wait()
                except TimeoutError:
                    await self._end_idle_workers()
        finally:
            keeper.cancel()
            if not self._stopping:
                self.kill()

    async def stop(self, grace: float) -> None:
        """Stop: running jobs save and go back; after ``grace`` seconds, or at a second call, they are killed.

        Returns when all workers are gone.
        """
        if self._stopping:
            self.kill()
        self._stopping = True
        self._awake.set()
        slots = [slot for lane in self._lanes.values() for slot in lane]
        for slot in slots:
            slot.request_stop()
        if self._tasks:
            await asyncio.wait(self._tasks.values(), timeout=grace)
        if self._tasks:
            self.kill()
            _, stuck = await asyncio.wait(self._tasks.values(), timeout=_KILL_SECONDS)
            for task in stuck:
                task.cancel()
        await asyncio.gather(*(slot.rest() for slot in slots))

    def kill(self) -> None:
        """End all workers now; their jobs go back to the queue."""
        self._stopping = True
        self._awake.set()
        for lane in self._lanes.values():
            for slot in lane:
                slot.kill()

    # The hand-out

    def _assign(self) -> float:
        """Give due jobs to free slots. Returns the seconds until it is worth another look."""
        now = self._clock()
        self._ledger.renew_leases(now)
        held = self._holds.held(now)
        for name, hold in held.items():
            self._queue.postpone(name, hold.reason, hold.retry_after, now)
        sleeps = [_LONGEST_SLEEP, *(hold.until - now for hold in held.values())]
        for lane, slots in self._lanes.items():
            if lane in self._paused:
                continue
            kinds = [kind.name for kind in self._kinds.values() if kind.lane == lane and kind.name not in held]
            open_kinds = [kind for kind in kinds if self._hooks.may_start(kind)]
            sleeps.append(self._fill(lane, [slot for slot in slots if slot not in self._tasks], open_kinds, now))
            if (gated := set(kinds).difference(open_kinds)) and self._queue.due(lane, gated, now, 1):
                sleeps.append(_GATE_SECONDS)
            if (next_run_at := self._queue.next_run_at(open_kinds, after=now)) is not None:
                sleeps.append(next_run_at - now)
        sleeps += self._idle_sleeps()
        return max(min(sleeps), 0.005)

    def _fill(self, lane: str, free: list[Slot], kinds: Sequence[str], now: float) -> float:
        """Give due jobs of a lane to its free slots. Returns the seconds until those that gather have gathered."""
        most = max((self._kinds[kind].batch for kind in kinds), default=1) * len(self._lanes[lane])
        while free and (due := self._queue.due(lane, kinds, now, most)):
            kind, count = self._kinds[due[0]], due[1]
            # Nothing of less priority goes first: a training that began now would hold them up for an hour.
            if (gathers := self._gathers(kind, lane, count, now)) > 0:
                return gathers
            # Shared out, rather than one worker with all and the others idle.
            limit = 1 if self._holds.is_probe(kind.name) else min(kind.batch, math.ceil(count / len(free)))
            jobs = self._queue.claim(lane, [kind.name], limit, now, LEASE_SECONDS)
            if not jobs:
                continue
            slot = min(free, key=lambda slot: (slot.warm_kind != kind.name, slot.has_worker, slot.idle_since))
            free.remove(slot)
            slot.begin()
            self._ledger.begin(jobs, slot)
            task = asyncio.create_task(self._work(slot, kind, jobs))
            self._tasks[slot] = task
            task.add_done_callback(partial(self._over, slot))
        return _LONGEST_SLEEP

    def _gathers(self, kind: Kind, lane: str, count: int, now: float) -> float:
        """Seconds that the due jobs of a kind still wait for company: to fill a batch, and while others keep coming."""
        if not kind.gather or count >= kind.batch:
            return 0.0
        first, last = self._queue.due_since(lane, kind.name, now)
        return min(first + kind.gather, last + kind.gather / _QUIET_PART) - now

    def _over(self, slot: Slot, task: asyncio.Task[None]) -> None:
        del self._tasks[slot]
        if not task.cancelled() and (error := task.exception()):
            _logger.error("Slot %s failed", slot.name, exc_info=error)
        self._awake.set()

    def _idle_sleeps(self) -> list[float]:
        now = asyncio.get_running_loop().time()
        idle = [slot for lane in self._lanes.values() for slot in lane if slot.has_worker and slot not in self._tasks]
        return [slot.idle_since + self._settings.idle_seconds - now for slot in idle]

    async def _end_idle_workers(self) -> None:
        latest = asyncio.get_running_loop().time() - self._settings.idle_seconds
        for lane in self._lanes.values():
            for slot in lane:
                if slot.has_worker and slot not in self._tasks and slot.idle_since <= latest:
                    await slot.rest()

    # One slot's work

    async def _work(self, slot: Slot, kind: Kind, jobs: Sequence[Job]) -> None:
        try:
            payloads = {}
            for job in jobs:
                if (payload := await self._prepare(job)) is not None:
                    payloads[job.id] = payload
            if payloads and await self._make_room(kind, list(payloads)):
                async with aclosing(slot.run(kind, payloads)) as events:
                    async for event in events:
                        if isinstance(event, Ended):
                            await self._ledger.finish(event.job, event.outcome)
                        else:
                            self._ledger.hear(event.job, event.report)
        except OSError as error:
            reason = f"No worker could be started ({error})."
            for job in jobs:
                await self._ledger.finish(job.id, Outcome("waiting", reason=reason, retry_after=_TROUBLE_SECONDS))
        finally:
            for job in jobs:
                self._ledger.running.pop(job.id, None)

    async def _prepare(self, job: Job) -> Mapping[str, Any] | None:
        try:
            payload = await self._hooks.prepare(job)
        except Exception as error:
            await self._ledger.finish(job.id, Outcome.of(error))
            return None
        entry = self._ledger.running[job.id]
        if payload is None:
            self._ledger.drop(job.id)
        elif entry.cancelled or self._stopping:
            await self._ledger.finish(job.id, Outcome.of(Cancelled() if entry.cancelled else Stopping()))
            payload = None
        return payload

    async def _make_room(self, kind: Kind, jobs: Sequence[int]) -> bool:
        try:
            await self._hooks.before_start(kind.name)
        except Exception as error:
            for job in jobs:
                await self._ledger.finish(job, Outcome.of(error))
            return False
        return True
