"""One-off work: payloads of one kind through worker processes, with no queue and no daemon.

For ``fastsd crop``, ``caption``, ``train`` and ``convert``: the same handlers in the same workers as the daemon's.
"""

from __future__ import annotations

import asyncio
import math
import signal
import threading
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Any

from daemon.slots import Slot, WorkerSettings, make_slots
from daemon.workers import Ended
from handlers.kinds import Kind
from handlers.outcome import Outcome

OnProgress = Callable[[int, Mapping[str, Any]], None]
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_MOST_GIVEN_BACK = 3


def run_payloads(
    kind: Kind,
    payloads: Sequence[Mapping[str, Any]],
    settings: WorkerSettings,
    *,
    workers: int = 1,
    devices: Sequence[str] = (),
    on_progress: OnProgress = lambda _index, _report: None,
) -> Generator[tuple[int, Outcome]]:
    """Run payloads of one kind and give (index, outcome) as they end, each index once.

    Call it from the main thread. A first Ctrl-C or SIGTERM asks the jobs to save and stop (``stopping``) and starts no
    more; a second kills them. Closing the generator kills them, too.

    Args:
        kind: the kind of all jobs.
        payloads: one a job.
        settings: cache, logs and environment of the workers.
        workers: how many at once, at most one a payload.
        devices: the device of each worker; the CPU where there is none.
        on_progress: called with (index, ``done``/``total``/``note``/``facts``).

    Raises:
        KeyboardInterrupt: after the last outcome, when it was interrupted.
        OSError: no worker can be started.
    """
    slots = make_slots({"gpu": max(1, min(workers, len(payloads)))}, devices, settings)["gpu"]
    crew = _Crew(kind, payloads, slots, on_progress)
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        in_main_thread = threading.current_thread() is threading.main_thread()
        before = {number: signal.getsignal(number) for number in _SIGNALS} if in_main_thread else {}
        for number in before:
            loop.add_signal_handler(number, crew.interrupt)
        stream = crew.outcomes()
        try:
            while (end := runner.run(_next(stream))) is not None:
                yield end
        finally:
            runner.run(stream.aclose())
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)
    if crew.interrupted:
        raise KeyboardInterrupt


async def _next(stream: AsyncGenerator[tuple[int, Outcome]]) -> tuple[int, Outcome] | None:
    return await anext(stream, None)


class _Crew:
    """The slots that share the payloads out among them."""

    def __init__(
        self,
        kind: Kind,
        payloads: Sequence[Mapping[str, Any]],
        slots: Sequence[Slot],
        on_progress: OnProgress,
    ) -> None:
        self.interrupted = False
        self._kind = kind
        self._payloads = payloads
        self._left = deque(range(len(payloads)))
        # Jobs whose worker died while it did several at once: alone, each shows whether it is to blame.
        self._suspects: deque[int] = deque()
        self._given_back: Counter[int] = Counter()
        self._slots = slots
        self._on_progress = on_progress
        self._ends: asyncio.Queue[tuple[int, Outcome] | None] = asyncio.Queue()

    def interrupt(self) -> None:
        """The first time: save and stop; the second time: stop now."""
        for slot in self._slots:
            if self.interrupted:
                slot.kill()
            else:
                slot.request_stop()
        self.interrupted = True

    async def outcomes(self) -> AsyncGenerator[tuple[int, Outcome]]:
        """(index, outcome) as they end."""
        work = asyncio.gather(*(self._work(slot) for slot in self._slots))
        work.add_done_callback(lambda _: self._ends.put_nowait(None))
        try:
            while (end := await self._ends.get()) is not None:
                yield end
            await work
        finally:
            work.cancel()
            with suppress(asyncio.CancelledError, OSError):
                await work
            if self.interrupted or not work.done() or work.cancelled():
                for slot in self._slots:
                    slot.kill()
            await asyncio.gather(*(slot.rest() for slot in self._slots))

    async def _work(self, slot: Slot) -> None:
        while not self.interrupted and (indexes := self._take()):
            slot.begin()
            async with aclosing(slot.run(self._kind, {index: self._payloads[index] for index in indexes})) as events:
                async for event in events:
                    if not isinstance(event, Ended):
                        self._on_progress(event.job, event.report)
                    elif event.died and not self.interrupted and len(indexes) > 1:
                        self._suspects.append(event.job)
                    elif event.outcome.state == "stopping" and not self.interrupted and self._may_come_back(event.job):
                        # Nobody stopped it: a worker that ended over another job gave it back.
                        self._suspects.append(event.job)
                    else:
                        self._ends.put_nowait((event.job, event.outcome))

    def _may_come_back(self, job: int) -> bool:
        self._given_back[job] += 1
        return self._given_back[job] <= _MOST_GIVEN_BACK

    def _take(self) -> list[int]:
        if self._left:
            share = math.ceil(len(self._left) / len(self._slots))
            return [self._left.popleft() for _ in range(min(self._kind.batch, share))]
        return [self._suspects.popleft()] if self._suspects else []
