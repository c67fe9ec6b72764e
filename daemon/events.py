"""Keeps the events of one tree coming: from this very root, and known to be incomplete when they are."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

from daemon.index import RootIdentity
from daemon.scan import Scanner, Unreachable
from daemon.watch import HintBox, TreeEvents, limit_is_reached, watch_limit

_Result = TypeVar("_Result")


class EventSource:
    """Starts, checks and ends the events of a tree.

    Args:
        root: absolute path, with no symbolic link in it.
        box: where hints are left.
        scanner: says which folder the root is.
        thread: runs what may block.

    Attributes:
        is_limited: the kernel's limit of watches is reached, so that some folders send no events.
    """

    def __init__(self, root: str, box: HintBox, scanner: Scanner, thread: Executor) -> None:
        self._root = root
        self._box = box
        self._scanner = scanner
        self._thread = thread
        self._events: TreeEvents | None = None
        self._identity: RootIdentity | None = None
        self._failure = ""
        self.is_limited = False

    @property
    def is_running(self) -> bool:
        """Whether events come."""
        return self._events is not None

    def reason(self, folders: int) -> str:
        """Why events are missing, and what helps; "" when they are not. ``folders``: how many the tree has."""
        if not self.is_limited:
            return self._failure
        return (
            f"The limit of watched folders is reached ({watch_limit()} for all programs of this user; this tree has "
            f"{folders}): the tree is scanned instead. A larger fs.inotify.max_user_watches helps."
        )

    async def start(self) -> None:
        """Begin; where that fails, ``reason`` says why."""
        events = TreeEvents(self._root, self._box)
        try:
            identity = await self._in_thread(self._scanner.identity)
            await self._in_thread(events.start)
        except (OSError, Unreachable) as error:
            self._failure = f"No events from {self._root} ({error}): it is scanned instead."
            return
        self._failure = ""
        self._events, self._identity = events, identity
        await self._check_limit()

    async def stop(self) -> None:
        """End, and drop the hints that are left."""
        events, self._events = self._events, None
        self._failure = ""
        self.is_limited = False
        if events is not None:
            await self._in_thread(events.stop)
        self._box.take()

    def stop_now(self) -> None:
        """End, from outside of any task; blocks for some milliseconds."""
        if self._events is not None:
            self._events.stop()

    async def refresh(self, identity: RootIdentity) -> bool:
        """After a scan: see that events come from the root that was scanned, and from all of its folders.

        Returns:
            Whether they were begun anew: what happened before that is only seen by one more scan.
        """
        if self._events is not None and self._events.is_alive and self._identity == identity:
            was_limited = self.is_limited
            await self._check_limit()
            if self.is_limited or not was_limited:
                return False
        await self.stop()
        await self.start()
        return self._events is not None

    async def _check_limit(self) -> None:
        self.is_limited = await self._in_thread(lambda: limit_is_reached(self._root))

    async def _in_thread(self, work: Callable[[], _Result]) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
