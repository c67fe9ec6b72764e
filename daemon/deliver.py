"""From a path to look at to a settled fact in the consumer's hands: look, wait, look again, hand on, remember."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import TypeVar

from daemon.index import Fact, Index, RootIdentity, absent
from daemon.scan import Report, Scanner
from daemon.settle import Movements, Settler

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


class Deliveries:
    """What was seen to change in one tree and is not handed on yet.

    Disk and database are asked in a thread; the consumer is called in the event loop's thread.

    Args:
        scanner: looks at paths.
        index: what was handed on before.
        settler: who waits, and how long.
        thread: runs what may block.
        on_settled, on_vanished, counts_as_movement: see ``daemon.tree.TreeWatch``.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        scanner: Scanner,
        index: Index,
        settler: Settler,
        thread: Executor,
        *,
        on_settled: Callable[[list[Fact]], None],
        on_vanished: Callable[[list[str]], None],
        counts_as_movement: Callable[[str], bool],
        clock: Callable[[], float],
    ) -> None:
        self._scanner = scanner
        self._index = index
        self._settler = settler
        self._thread = thread
        self._on_settled = on_settled
        self._on_vanished = on_vanished
        self._counts_as_movement = counts_as_movement
        self._clock = clock
        self._movements = Movements()
        self._awaited: set[str] = set()

    def __len__(self) -> int:
        return len(self._settler)

    def quiet_for(self, folder: str, now: float) -> float:
        """Seconds since anything moved below a folder; see ``Movements``."""
        return self._movements.quiet_for(folder, now)

    def next_due(self) -> float | None:
        """Seconds until something may be due; None when nothing waits."""
        return self._settler.next_due(self._clock())

    def clear(self) -> None:
        """Wait for nothing any more: the tree is lost, a scan will find what there is."""
        self._settler.clear()
        self._awaited.clear()

    def await_all(self) -> None:
        """From now on ``has_awaited`` tells when all that waits now was handed on."""
        self._awaited = set(self._settler.paths())

    @property
    def has_awaited(self) -> bool:
        """Whether nothing of what waited when ``await_all`` was called waits any more."""
        return not self._awaited

    def observe(self, facts: Sequence[Fact]) -> None:
        """Take looks into account that differ from the index."""
        now = self._clock()
        for fact in facts:
            if self._settler.observe(fact, now):
                self._note_movement(fact.path, now)

    async def look(self, paths: Sequence[str], crowds: Sequence[str]) -> None:
        """Look at paths one by one, and into folders (not below them), and observe what differs from the index.

        Raises:
            daemon.scan.Unreachable: the tree is lost.
        """
        differing, unchanged = await self._in_thread(lambda: self._look_at(paths, crowds))
        for path in unchanged:
            self._forget(path)
        self.observe(differing)

    async def hand_on_due(self, trusted: RootIdentity | None) -> bool:
        """Look again at what is due, and hand on what stood still.

        Args:
            trusted: which folder the root was when it was last believed.

        Returns:
            False when another folder lies there now; then nothing waits any more, and a scan has to tell.

        Raises:
            daemon.scan.Unreachable: the tree is lost.
        """
        candidates = self._settler.due(self._clock())
        if not candidates:
            return True
        if await self._in_thread(self._scanner.identity) != trusted:
            self._settler.clear()
            return False
        differing, _ = await self._in_thread(lambda: self._look_at([fact.path for fact in candidates], ()))
        looks = {fact.path: fact for fact in differing}
        still = []
        for fact in candidates:
            again = looks.get(fact.path)
            if again == fact:
                still.append(fact)
            elif again is not None:
                self.observe([again])
            else:
                self._forget(fact.path)  # it is what it was before, or nobody can tell
        settled = [fact for fact in still if fact.exists]
        vanished = [fact for fact in still if not fact.exists]
        await self._deliver(settled, lambda: self._on_settled(settled), lambda: self._index.record(settled))
        paths = [fact.path for fact in vanished]
        await self._deliver(vanished, lambda: self._on_vanished(paths), lambda: self._index.forget(paths))
        return True

    async def _deliver(self, facts: list[Fact], consume: Callable[[], None], remember: Callable[[], None]) -> None:
        if not facts:
            return
        try:
            consume()
            # Only now: a kill in between means that they are handed on again, not that they are lost.
            await self._in_thread(remember)
        except Exception:
            _log.exception("%d files could not be handed on; they will be again", len(facts))
            self.observe(facts)
            return
        now = self._clock()
        for fact in facts:
            self._forget(fact.path)
            self._note_movement(fact.path, now)

    def _look_at(self, paths: Sequence[str], crowds: Sequence[str]) -> tuple[list[Fact], list[str]]:
        """Facts that differ from the index, and paths that are what they were. In the thread."""
        differing: list[Fact] = []
        unchanged: list[str] = []
        for path in paths:
            fact = self._scanner.look(path) if self._scanner.takes(path) else None
            if fact is None:
                continue
            if fact == (self._index.lookup(path) or absent(path)):
                unchanged.append(path)
            else:
                differing.append(fact)
        for folder in crowds:
            if not self._scanner.is_left_out(folder):
                changes = self._scanner.folder(folder, Report())
                differing += changes.changed
                differing += map(absent, changes.vanished)
        return differing, unchanged

    def _note_movement(self, path: str, now: float) -> None:
        if self._counts_as_movement(path):
            self._movements.note(path, now)

    def _forget(self, path: str) -> None:
        self._settler.forget(path)
        self._awaited.discard(path)

    async def _in_thread(self, work: Callable[[], _Result]) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
