"""Which files stand still: pure, with time and looks handed in."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from itertools import count

from daemon.index import Fact


@dataclass(slots=True)
class _Waiting:
    fact: Fact
    due: float
    ticket: int | None
    """Its place in the queue; None once it was given as due."""


class Settler:
    """Paths that were seen to change and wait until they stand still.

    A path is due once its last change is ``settle_seconds`` ago. The caller then looks again: an equal fact has settled
    (``forget`` it once it is handed on), another one is given to ``observe`` and waits anew. So a path that keeps
    growing is looked at once per ``settle_seconds`` and never taken. A path at which nothing is
    (``daemon.index.absent``) settles like any other. An operation costs at most the logarithm of the number of paths.

    Args:
        settle_seconds: how long a path has to look the same.
    """

    def __init__(self, settle_seconds: float) -> None:
        self._settle_seconds = settle_seconds
        self._waiting: dict[str, _Waiting] = {}
        self._queue: list[tuple[float, int, str]] = []
        self._tickets = count()

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, path: object) -> bool:
        return path in self._waiting

    def observe(self, fact: Fact, now: float) -> bool:
        """Take one look at a path into account.

        Args:
            fact: what the look showed.
            now: monotonic seconds.

        Returns:
            Whether the path is new here or looks different from last time.
        """
        waiting = self._waiting.get(fact.path)
        if waiting is None:
            waiting = self._waiting[fact.path] = _Waiting(fact, now + self._settle_seconds, None)
            moved = True
        else:
            moved = waiting.fact != fact
            if moved or waiting.ticket is None:
                waiting.fact = fact
                waiting.due = now + self._settle_seconds
        if waiting.ticket is None:
            waiting.ticket = next(self._tickets)
            heapq.heappush(self._queue, (waiting.due, waiting.ticket, fact.path))
        return moved

    def forget(self, path: str) -> None:
        """Wait no longer for a path: it was handed on, or is what it was before."""
        # Its place in the queue is dropped when it comes up.
        self._waiting.pop(path, None)

    def clear(self) -> None:
        """Wait for nothing any more."""
        self._waiting.clear()
        self._queue.clear()

    def due(self, now: float) -> list[Fact]:
        """The last looks that are old enough. Each is given once, until it is observed again or forgotten."""
        facts = []
        while (first := self._first()) is not None and first.due <= now:
            heapq.heappop(self._queue)
            first.ticket = None
            facts.append(first.fact)
        return facts

    def next_due(self, now: float) -> float | None:
        """Seconds from ``now`` on until ``due`` gives something (0: at once); None when it would never."""
        first = self._first()
        return None if first is None else max(0.0, first.due - now)

    def _first(self) -> _Waiting | None:
        """Whoever is due first, with the places of those that left or wait anew put in order."""
        while self._queue:
            due, ticket, path = self._queue[0]
            waiting = self._waiting.get(path)
            if waiting is None or waiting.ticket != ticket:
                heapq.heappop(self._queue)
            elif waiting.due > due:
                heapq.heapreplace(self._queue, (waiting.due, ticket, path))
            else:
                return waiting
        return None

    def paths(self) -> list[str]:
        """Every path that is waited for."""
        return list(self._waiting)


class Movements:
    """When something last moved below each folder, four levels deep: for those who wait until a session is quiet.

    Args:
        at_most: how many folders are remembered; past that, the older half share one time.
    """

    _DEPTH = 4

    def __init__(self, at_most: int = 4096) -> None:
        self._at_most = at_most
        self._times: dict[str, float] = {}
        self._forgotten: float | None = None

    def note(self, path: str, now: float) -> None:
        """Something at a path moved (appeared, changed, vanished, was handed on) at a monotonic time."""
        self._times[""] = now
        end = path.find("/")
        for _ in range(self._DEPTH):
            if end < 0:
                break
            self._times[path[:end]] = now
            end = path.find("/", end + 1)
        if len(self._times) > self._at_most:
            ordered = sorted(self._times.items(), key=lambda item: item[1])
            middle = len(ordered) // 2
            self._forgotten = ordered[middle - 1][1]
            self._times = dict(ordered[middle:])

    def quiet_for(self, folder: str, now: float) -> float:
        """Seconds since anything moved below a folder ("" is the root); infinite when nothing has since the start."""
        moved = self._times.get("/".join(folder.split("/")[: self._DEPTH]), self._forgotten)
        return float("inf") if moved is None else max(0.0, now - moved)
