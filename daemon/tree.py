"""One tree, watched: events and scans become settled facts, handed on once each.

A single task does everything in turn: follow hints, hand on what stands still, take one step of a scan. Disk and
database work happens in one thread, in steps of a few milliseconds; the callbacks run in the event loop's thread. When
nothing is to be done it sleeps until the next thing is due.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Literal

from daemon.deliver import Deliveries
from daemon.events import EventSource
from daemon.index import Fact, Index, RootIdentity, absent
from daemon.scan import Changes, Report, Scanner, Unreachable
from daemon.settle import Settler
from daemon.verdict import Trust, judge
from daemon.watch import HintBox, file_system_type, numbers_files_for_good, read_mounts, sends_events
from sessions.ignore import IgnoreRules

_log = logging.getLogger(__name__)

_STEP_SECONDS = 0.01
_CROWD = 128
# A scan that found so many new files pauses until some have settled: memory, once taken, is not all given back.
_WAITING_AT_MOST = 10_000
_CONFIRM_SECONDS = 2.0
_RESCAN_SECONDS = 300.0
# A rescan costs at most a thousandth of a core where events come, a twentieth where none do.
_RESCAN_FACTOR = 1000.0
_POLL_FACTOR = 20.0


class State(StrEnum):
    """What a watched tree is at."""

    STARTING = "starting"
    SCANNING = "scanning"
    WATCHING = "watching"
    UNREACHABLE = "unreachable"


@dataclass(frozen=True, slots=True)
class WatchSettings:
    """``watch:`` of fastsd.yaml.

    Attributes:
        events: ``native``, ``scan``, or ``auto``: native where the file system tells of every change.
        poll: seconds between two scans where no events come.
        settle: seconds that a file has to stand still.
        rescan: seconds between two scans where events come; None: by how long a scan takes.
        ignore: the person's patterns (``sessions.ignore``).
    """

    events: Literal["auto", "native", "scan"] = "auto"
    poll: float = 10.0
    settle: float = 2.0
    rescan: float | None = None
    ignore: tuple[str, ...] = ()


@dataclass
class _Walk:
    """A scan on its way."""

    start: str
    steps: Iterator[Changes]
    report: Report
    known: int
    identity: RootIdentity
    same_root: bool
    found: list[Fact] = field(default_factory=list)
    """Held back until it is clear that this is our tree."""
    vanished: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def some_steps(self) -> tuple[list[Changes], bool]:
        """Walk for a few milliseconds; returns what differs, and whether the walk is complete. In the thread."""
        began = time.perf_counter()
        changes: list[Changes] = []
        is_complete = True
        for change in self.steps:
            if change.changed or change.vanished:
                changes.append(change)
            if time.perf_counter() - began > _STEP_SECONDS:
                is_complete = False
                break
        self.seconds += time.perf_counter() - began
        return changes, is_complete


class TreeWatch:
    """Watches one tree until it is cancelled.

    Args:
        root: the tree.
        index: what was handed on before; only this object may write to it.
        settings: how to watch.
        skip_folder: folders (paths relative to the root) that are of no interest, with all below them.
        on_settled: gets every fact that is due, at once. Facts are recorded after it returned: if the process ends
            before, they are handed on again; if it raises, too, after another settle time.
        on_vanished: gets known paths that are gone and stayed gone for the settle time; after ``on_settled`` where both
            are due, so that a move is seen to arrive before it is seen to leave.
        counts_as_movement: whether a path matters for ``quiet_for`` (the daemon's own outputs do not).
        clock: monotonic seconds.

    Attributes:
        state: what the tree is at.
        held_back: how many files are missed by the last full scan and not forgotten (see ``daemon.verdict``).
        last_scan_seconds: what the last full scan cost.
        first_scan: set once a full scan is complete and all that it found was handed on.
    """

    def __init__(
        self,
        root: Path,
        index: Index,
        settings: WatchSettings,
        skip_folder: Callable[[str], bool],
        *,
        on_settled: Callable[[list[Fact]], None],
        on_vanished: Callable[[list[str]], None],
        counts_as_movement: Callable[[str], bool] = lambda _path: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._root = os.path.realpath(root)
        self._index = index
        self._settings = settings
        self._clock = clock
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="watch")

        file_system = file_system_type(self._root, read_mounts())
        self._tells_all = sends_events(file_system)
        self._wants_events = settings.events == "native" or (settings.events == "auto" and self._tells_all)
        self._scanner = Scanner(
            self._root,
            index,
            IgnoreRules(settings.ignore),
            skip_folder,
            inodes_mean_something=numbers_files_for_good(file_system),
        )
        self._box = HintBox(self._wake_from_thread)
        self._events = EventSource(self._root, self._box, self._scanner, self._thread)
        # Without events two looks are a poll apart: attributes of a network file system may be seconds old.
        settle = settings.settle if self._wants_events else max(settings.settle, settings.poll)
        self._deliveries = Deliveries(
            self._scanner,
            index,
            Settler(settle),
            self._thread,
            on_settled=on_settled,
            on_vanished=on_vanished,
            counts_as_movement=counts_as_movement,
            clock=clock,
        )

        self._trusted: RootIdentity | None = None
        self._walk: _Walk | None = None
        self._wanted: set[str] = {""}
        self._next_scan = 0.0
        self._confirm = False
        self._accept_losses = False
        self._found_all = False
        self._report = Report()
        self._doubt = ""

        self.state = State.STARTING
        self.held_back = 0
        self.last_scan_seconds = 0.0
        self.first_scan = asyncio.Event()

    # What others may ask.

    @property
    def reason(self) -> str:
        """What is not as it should be, in sentences for the person; "" when all is well."""
        return " ".join(filter(None, (self._doubt, self._events.reason(self.folders))))

    @property
    def has_events(self) -> bool:
        """Whether events come, so that a change is noticed at once."""
        return self._events.is_running

    @property
    def unsettled(self) -> int:
        """Paths that changed and were not handed on yet."""
        return len(self._deliveries)

    @property
    def folders(self) -> int:
        """Folders of the last full scan."""
        return self._report.folders

    @property
    def files(self) -> int:
        """Files of the last full scan, ignored ones left out."""
        return self._report.files

    @property
    def skipped(self) -> Mapping[str, str]:
        """What the last full scan passed over (at most a hundred): path → what it is, "symbolic link" say."""
        return self._report.skipped

    @property
    def unreadable(self) -> Mapping[str, str]:
        """Folders that the last full scan could not read: path → the system's words."""
        return self._report.unreadable

    def quiet_for(self, folder: str, now: float) -> float:
        """Seconds since anything moved below a folder ("" is the root); infinite when nothing has since the start."""
        return self._deliveries.quiet_for(folder, now)

    def request_scan(self, folder: str | None = None) -> None:
        """Scan a folder with all below it, or the whole tree, soon. From the event loop's thread."""
        self._wanted.add(folder or "")
        self._wake.set()

    def accept_losses(self) -> None:
        """The person says that what is missing was deleted: the next scan believes it, whatever it looks like."""
        self._accept_losses = True
        self.request_scan()

    # The task.

    async def run(self) -> None:
        """Watch until cancelled. Call it once."""
        self._loop = asyncio.get_running_loop()
        try:
            if self._wants_events:
                await self._events.start()
            while True:
                self._wake.clear()
                try:
                    is_scanning = await self._round()
                except Unreachable as lost:
                    await self._lose(lost.reason)
                    is_scanning = False
                if not is_scanning:
                    await self._sleep()
        finally:
            self._loop = None
            self._events.stop_now()
            # Waits for a step of a few milliseconds, so that the index can be closed after it.
            self._thread.shutdown(cancel_futures=True)

    async def _round(self) -> bool:
        """Do what is to be done now; returns whether a scan is under way or asked for, and can go on at once."""
        await self._follow_hints()
        if not await self._deliveries.hand_on_due(self._trusted):
            self._found_all = False
            self._wanted.add("")
        if self._walk is None:
            self._walk = await self._begin_walk()
        has_room = len(self._deliveries) < _WAITING_AT_MOST
        if self._walk is not None and has_room and await self._step(self._walk):
            walk, self._walk = self._walk, None
            await self._finish(walk)
        if self._found_all and self._deliveries.has_awaited:
            self.first_scan.set()
        return has_room and (self._walk is not None or bool(self._wanted))

    async def _sleep(self) -> None:
        seconds = self._next_scan - self._clock()
        due = self._deliveries.next_due()
        if due is not None:
            seconds = min(seconds, due)
        if seconds > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._wake.wait()

    def _wake_from_thread(self) -> None:
        loop = self._loop
        if loop is not None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._wake.set)

    async def _follow_hints(self) -> None:
        hints = self._box.take()
        if not hints or self.state is State.UNREACHABLE:
            return
        if hints.overflow:
            # While watchdog sets up its watches anew, more may be missed: look again a little later.
            self._confirm = True
            self._wanted.add("")
        self._wanted.update(folder for folder in hints.outermost_folders() if not self._scanner.is_left_out(folder))
        files, crowds = hints.crowded(_CROWD)
        # What was a folder may be a file by now.
        await self._deliveries.look([*files, *filter(None, hints.folders)], crowds)

    # Scans.

    async def _begin_walk(self) -> _Walk | None:
        """Start the scan that is asked for or due: folders first, they are short."""
        if self._clock() >= self._next_scan:
            self._wanted.add("")
        if not self._wanted:
            return None
        # A tree that was lost, or may be another one, is judged as a whole.
        start = "" if self.state is State.UNREACHABLE else max(self._wanted)
        loop = asyncio.get_running_loop()
        walk = await loop.run_in_executor(self._thread, self._new_walk, start)
        if start and not walk.same_root:
            walk = await loop.run_in_executor(self._thread, self._new_walk, "")
        if walk.start == "":
            self._wanted.clear()
            self._next_scan = float("inf")
        self._wanted.discard(walk.start)
        if walk.same_root:
            self._trusted = walk.identity
        if self.state is State.STARTING:
            self.state = State.SCANNING
        return walk

    def _new_walk(self, start: str) -> _Walk:
        known = self._index.count()
        identity = self._scanner.identity()
        report = Report()
        same_root = identity == self._index.root_identity() or not known
        return _Walk(start, self._scanner.walk(start, report), report, known, identity, same_root)

    async def _step(self, walk: _Walk) -> bool:
        """Take a few milliseconds of a scan; returns whether it is complete."""
        changes, is_complete = await asyncio.get_running_loop().run_in_executor(self._thread, walk.some_steps)
        for change in changes:
            walk.vanished += change.vanished
            if walk.same_root:
                self._deliveries.observe(change.changed)
            else:
                walk.found += change.changed
        return is_complete

    async def _finish(self, walk: _Walk) -> None:
        """Believe a scan as far as it can be believed."""
        is_full = walk.start == ""
        missed = len(walk.vanished)
        verdict = judge(
            root=self._root,
            known=walk.known,
            vanished=missed,
            files=walk.report.files if is_full else walk.known - missed,
            same_root=walk.same_root,
            has_events=self.has_events and self._tells_all,
        )
        trust = Trust.FULL if self._accept_losses and is_full else verdict.trust
        if trust is Trust.NONE:
            raise Unreachable(verdict.reason)
        if self._index.root_identity() != walk.identity:
            self._index.record_root(walk.identity)
        self._trusted = walk.identity
        self._deliveries.observe(walk.found)
        if trust is Trust.FULL:
            self._deliveries.observe([absent(path) for path in walk.vanished])
        if self._wants_events and await self._events.refresh(walk.identity):
            self._wanted.add("")
        if is_full or trust is not Trust.FULL:
            self.held_back = 0 if trust is Trust.FULL else missed
            self._doubt = verdict.reason if self.held_back else ""
        if is_full:
            self._accept_losses = False
            self._report = walk.report
            self.last_scan_seconds = walk.seconds
            self.state = State.WATCHING
            self._plan_next_scan()
            if not self._found_all:
                self._found_all = True
                self._deliveries.await_all()

    def _plan_next_scan(self) -> None:
        if self._confirm:
            self._confirm = False
            wait = _CONFIRM_SECONDS
        elif self.has_events and not self._events.is_limited:
            wait = self._settings.rescan or max(_RESCAN_SECONDS, _RESCAN_FACTOR * self.last_scan_seconds)
        else:
            wait = max(self._settings.poll, _POLL_FACTOR * self.last_scan_seconds)
        self._next_scan = self._clock() + wait

    async def _lose(self, reason: str) -> None:
        """The tree is not there: forget nothing, hand on nothing, look again later."""
        if self.state is not State.UNREACHABLE:
            _log.warning("%s", reason)
        self.state = State.UNREACHABLE
        self._doubt = reason
        self._walk = None
        self._wanted.clear()
        self._deliveries.clear()
        self._found_all = False
        self._accept_losses = False
        await self._events.stop()
        self._plan_next_scan()
