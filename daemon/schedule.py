"""Ticks: what is done every so often. APScheduler keeps the time; the queue keeps the work."""

from __future__ import annotations

import logging
import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from apscheduler.schedulers.asyncio import AsyncIOScheduler

from daemon.status import local_now
from handlers.give_back import give_memory_back
from sessions.trash import empty_trash

if TYPE_CHECKING:
    from daemon.app import Daemon

log = logging.getLogger(__name__)
_ALIVE_SECONDS = 20
_BLOCKED_SECONDS = 5
_NETWORKS_SECONDS = 10
_FRESH_MINUTES = 5
_DONE_ROWS_KEPT = 7 * 86400.0


class Schedule:
    """The daemon's ticks.

    Rescans are not among them: the watch itself knows when a scan is due, since that depends on how long one takes.
    """

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._scheduler = AsyncIOScheduler(job_defaults={"coalesce": True, "misfire_grace_time": None})

    def start(self) -> None:
        """Begin ticking. Must be called in the event loop."""
        self._scheduler.add_job(self._daemon.notify_alive, "interval", seconds=_ALIVE_SECONDS)
        self._scheduler.add_job(self._try_blocked, "interval", seconds=_BLOCKED_SECONDS)
        self._scheduler.add_job(self._daemon.look_for_networks, "interval", seconds=_NETWORKS_SECONDS)
        self._scheduler.add_job(self._keep_fresh, "interval", minutes=_FRESH_MINUTES)
        self._scheduler.add_job(self._tidy, "interval", hours=24)
        self._scheduler.start()

    def stop(self) -> None:
        """End the ticks."""
        self._scheduler.shutdown(wait=False)

    async def _keep_fresh(self) -> None:
        """STATUS.txt of what is under way or waits must not grow stale."""
        for path in self._daemon.reporter.unfinished():
            self._daemon.reporter.outcome(path)
        self._daemon.sessions.release()
        give_memory_back()

    async def _try_blocked(self) -> None:
        """No event tells that a folder's permissions were mended."""
        for path in list(self._daemon.sessions.unwritable):
            self._daemon.reporter.outcome(path)
        for path in list(self._daemon.tree.unreadable):
            if os.access(self._daemon.root / path, os.R_OK | os.X_OK):
                self._daemon.tree.request_scan()

    async def _tidy(self) -> None:
        self._daemon.queue.prune(time.time() - _DONE_ROWS_KEPT)
        for path in list(self._daemon.sessions):
            with suppress(OSError):
                session = self._daemon.sessions.at(path)
                gone = empty_trash(session.folder, local_now().date())
                if gone:
                    log.info("%s: emptied %d days of trash", session.name, gone)
