"""Pictures that were only touched, or copied to a new machine: a hash tells that nothing has to be made again."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable

from daemon.index import Fact
from daemon.session import Sessions
from sessions.files import sha256_of
from sessions.layout import Shape, place_of

log = logging.getLogger(__name__)


class Stamper:
    """Compares content in a thread, one file at a time, and brings the manifest's times up to date.

    Args:
        sessions: the tree's sessions.
        shape: () → where sessions begin.
        route: called with the facts whose pictures want their jobs after all.
    """

    def __init__(self, sessions: Sessions, shape: Callable[[], Shape], route: Callable[[Fact], None]) -> None:
        self._sessions = sessions
        self._shape = shape
        self._route = route
        self._waiting: deque[Fact] = deque()
        self._wake = asyncio.Event()
        self.busy = False

    def put(self, fact: Fact) -> None:
        """Have a picture compared."""
        self._waiting.append(fact)
        self.busy = True
        self._wake.set()

    async def run(self) -> None:
        """Compare until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                fact = self._waiting.popleft()
                try:
                    await self._compare(fact)
                except OSError as error:
                    log.warning("cannot compare %s: %s", fact.path, error)
            self.busy = False

    async def _compare(self, fact: Fact) -> None:
        place = place_of(fact.path, self._shape())
        if place is None:
            return
        session = self._sessions.at(place.session)
        try:
            digest = await asyncio.to_thread(sha256_of, session.folder / place.relative)
        except (FileNotFoundError, NotADirectoryError):
            return  # it is gone, which is told by itself
        except OSError as error:
            log.warning("cannot compare %s: %s", fact.path, error)
            digest = ""  # the job that it wants will say beside it what is wrong
        renewed = []
        for kind in ("crop", "caption"):
            record = session.manifest.get(kind, place.relative)
            if record is None or record.get("stale"):
                continue
            if record.get("sha256") == digest and record.get("size") == fact.size:
                renewed.append({**record, "mtime_ns": fact.mtime_ns})
            else:
                # Another content: the old record must not ask for another comparison.
                session.outdate(kind, place.relative)
        session.manifest.append(renewed)
        self._route(fact)
