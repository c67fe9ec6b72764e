"""Tells people what is going on: writes STATUS.txt where something changed, and the snapshot of ``fastsd status``."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from daemon.blocked import BlockedFolders
from daemon.jobs import Job, JobState
from daemon.planner import Plan
from daemon.refusals import standing_errors
from daemon.session import Session
from daemon.sheet import KIND as SHEET
from daemon.status import STALE_AFTER, describe_session, local_now, session_json, write_status
from daemon.tree import State as TreeState
from sessions.files import write_json, write_text
from sessions.layout import PIPELINE_INDEX, STATUS, Role, place_of
from sessions.status import SessionStatus, render

if TYPE_CHECKING:
    from daemon.app import Daemon

log = logging.getLogger(__name__)
# A synced Drive sends every new version of STATUS.txt over the network: there, seldom.
_SECONDS_WITH_EVENTS = 2.0
_SECONDS_WITHOUT_EVENTS = 30.0
_AT_REST = ("idle", "done")
# Telling takes a tenth of the time at most.
_SHARE = 10.0
_FAILED: tuple[JobState, ...] = ("failed",)
_OPEN_STATES: tuple[JobState, ...] = ("ready", "running", "waiting", "failed")


@dataclass(frozen=True)
class _Survey:
    """What lies in a session, counted once until something there changes."""

    pictures: int
    others: tuple[str, ...]


class Reporter:
    """Writes what people see.

    Attributes:
        plans: the latest plan of each session's folder.
        blocked: the folders that cannot be used.
        news: set when something changed that people should see.
    """

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._surveys: dict[str, _Survey] = {}
        self._changed: set[str] = set()
        self._since = local_now().isoformat(timespec="seconds")
        self._situation: tuple[dict[str, str], frozenset[str]] = ({}, frozenset())
        self._told: dict[str, dict[str, Any]] = {}
        self.plans: dict[str, Plan] = {}
        self.news = asyncio.Event()
        self.blocked = BlockedFolders(daemon.root, daemon.sessions, lambda: daemon.tree.unreadable)

    def changed(self, session: str) -> None:
        """Files of a session changed: count anew."""
        self._surveys.pop(session, None)
        self.outcome(session)

    def outcome(self, session: str) -> None:
        """Something became of a session's jobs."""
        self._told.pop(session, None)
        self._changed.add(session)
        self.news.set()

    async def run(self) -> None:
        """Write until cancelled: soon after news, and then not again for a while."""
        while True:
            running = bool(self._daemon.dispatcher.running)
            with suppress(TimeoutError):
                # While jobs run, their progress is news of its own.
                await asyncio.wait_for(self.news.wait(), self._pause() if running else None)
            self.news.clear()
            began = time.monotonic()
            try:
                await self.write()
            except OSError as error:
                log.warning("the status cannot be written: %s", error)
            # With ten thousands of jobs to count, telling of them must not become the work.
            await asyncio.sleep(max(self._pause(), _SHARE * (time.monotonic() - began)))

    def _pause(self) -> float:
        # Whether events come is not known before the first scan is over; and what it found should soon be told.
        is_seldom = self._daemon.tree.state is TreeState.WATCHING and not self._daemon.has_events
        return _SECONDS_WITHOUT_EVENTS if is_seldom else _SECONDS_WITH_EVENTS

    def unfinished(self) -> list[str]:
        """Folders of the sessions in which something is under way or waits, as was told last."""
        return [path for path, told in self._told.items() if not str(told["state"]).startswith(_AT_REST)]

    async def write(self) -> None:
        """Write STATUS.txt of every session with news or running jobs, and the snapshot.

        One session at a time is in memory, and others get their turn in between: a tree may have thousands.
        """
        if self._daemon.tree.state is TreeState.UNREACHABLE:
            return
        due = set(self._changed)
        self._changed.clear()
        situation = (self._daemon.gates.closed(), self._daemon.dispatcher.paused)
        if situation != self._situation:
            # What waits waits for something else now, in every session.
            self._situation = situation
            due |= set(self._daemon.sessions)
        for entry in self._daemon.dispatcher.running:
            with suppress(LookupError, OSError):
                due.add(self._daemon.sessions.by_id(entry.job.session).path)
        for path in due:
            self._write_status(path)
            await asyncio.sleep(0)
        self.blocked.tell()
        write_json(self._daemon.state.snapshot, self.snapshot())

    def last_words(self) -> None:
        """The daemon stops: say so wherever something is not done."""
        self._changed |= {path for path in self._daemon.sessions if path in self.plans}
        with suppress(OSError):
            for path in list(self._changed):
                status = self._status(path)
                if status is not None:
                    session, told = status
                    busy = not told.state.startswith(_AT_REST)
                    stopped = replace(told, state=f"stopped; was: {told.state}") if busy else told
                    with suppress(OSError):
                        write_status(session, stopped, local_now())
            write_json(self._daemon.state.snapshot, self.snapshot())

    def _write_status(self, path: str) -> None:
        """Write STATUS.txt of one session. That it can be written is what shows that a blocked folder is free again."""
        was_blocked = path in self._daemon.sessions.unwritable
        found = self._status(path)
        if found is None:
            return
        session, status = found
        self._told[path] = session_json(session, status)
        try:
            if was_blocked:
                write_text(session.folder / STATUS, render(status, local_now(), STALE_AFTER))
            else:
                write_status(session, status, local_now())
        except OSError as error:
            self._daemon.sessions.cannot_write(path, error.strerror or str(error))
            return
        if was_blocked:
            self._daemon.sessions.can_write(path)
            self._daemon.router.reroute_session(path)

    def snapshot(self) -> dict[str, Any]:
        """Everything ``fastsd status`` shows, as JSON values."""
        daemon = self._daemon
        tree = daemon.tree
        paused = sorted(daemon.dispatcher.paused)
        return {
            "root": os.fspath(daemon.root),
            "state": f"paused ({', '.join(paused)})" if paused else str(tree.state.value),
            "pid": os.getpid(),
            "since": self._since,
            "at": local_now().isoformat(timespec="seconds"),
            "tree": {
                "state": str(tree.state.value),
                "reason": tree.reason,
                "events": tree.has_events,
                "files": tree.files,
                "folders": tree.folders,
                "unsettled": tree.unsettled,
                "skipped": dict(tree.skipped),
                "unreadable": dict(tree.unreadable),
            },
            "gates": {**daemon.gates.closed(), **daemon.dispatcher.held()},
            "webui": daemon.webui.describe(),
            "jobs": {kind: dict(counts) for kind, counts in daemon.queue.counts().items()},
            "sessions": [told for path in daemon.sessions if (told := self._tell(path)) is not None],
            "unwritable": dict(daemon.sessions.unwritable),
            "blocked": self.blocked.lines(),
        }

    def _tell(self, path: str) -> dict[str, Any] | None:
        """What is to be said of a session; kept until there is news, so that its manifest need not be."""
        if path not in self._told:
            found = self._status(path)
            if found is None:
                return None
            self._told[path] = session_json(*found)
        return self._told[path]

    def _status(self, path: str) -> tuple[Session, SessionStatus] | None:
        daemon = self._daemon
        try:
            session = daemon.sessions.at(path)
        except OSError:
            return None
        survey = self._survey(session)
        status = describe_session(
            session,
            self._jobs(session),
            self.plans.get(path, Plan()),
            survey.pictures,
            gates=daemon.gates.closed(),
            others=survey.others,
        )
        if daemon.dispatcher.paused and not status.state.startswith(_AT_REST):
            status = replace(status, state=f"paused (go on with: fastsd resume): {status.state}")
        return session, status

    def _jobs(self, session: Session) -> Sequence[Job]:
        live = {entry.job.id: entry.progress for entry in self._daemon.dispatcher.running}
        jobs = self._daemon.queue.jobs(session=session.id, states=_OPEN_STATES)
        return [replace(job, progress=live[job.id]) if live.get(job.id) else job for job in jobs]

    def _survey(self, session: Session) -> _Survey:
        if session.path not in self._surveys:
            pictures, others, pipelines = 0, [], []
            for fact in self._daemon.index.under(session.path):
                place = place_of(fact.path, self._daemon.router.shape)
                if place is None or place.session != session.path:
                    continue
                pictures += place.role is Role.PICTURE
                if place.role is Role.OTHER:
                    others.append(place.relative)
                elif place.role is Role.PIPELINE:
                    pipelines.append(place.relative.removesuffix(PIPELINE_INDEX))
            # What lies beside a model_index.json is that model's.
            others = [name for name in others if not name.startswith(tuple(pipelines))]
            skipped = self._daemon.tree.skipped
            others += [session.relative(path) for path in skipped if path.startswith(session.tree_path(""))]
            self._surveys[session.path] = _Survey(pictures, tuple(others))
        return self._surveys[session.path]

    def exit_code(self) -> int:
        """0, or 1 when something failed: jobs, files with a standing error, folders that cannot be used."""
        daemon = self._daemon
        if daemon.tree.state is TreeState.UNREACHABLE or daemon.sessions.unwritable or daemon.tree.unreadable:
            return 1
        if any(job.kind != SHEET for job in daemon.queue.jobs(states=_FAILED)):
            return 1
        return int(any(standing_errors(daemon.sessions.at(path)) for path in daemon.sessions))
