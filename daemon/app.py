"""The composition: everything the daemon is made of, put together in one place, and its life from start to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from daemon import control
from daemon.commander import Commander
from daemon.config import Settings
from daemon.devices import gpu_devices, worker_environment
from daemon.dispatch import Dispatcher
from daemon.gates import Gates, ModelGate
from daemon.hooks import TreeHooks
from daemon.index import Fact, Index
from daemon.jobs import Job, JobState
from daemon.outcomes import record_ended_run
from daemon.planner import Planner
from daemon.prepare import Preparer
from daemon.queue import Queue
from daemon.reporter import Reporter
from daemon.router import Router
from daemon.routing import PICTURE_KINDS, PictureRules
from daemon.schedule import Schedule
from daemon.searching import KIND as EMBED
from daemon.searching import Searching, index_folder
from daemon.segments import Networks
from daemon.session import Sessions
from daemon.slots import WorkerSettings
from daemon.stamper import Stamper
from daemon.state import State, cache_home
from daemon.systemd import Notifier
from daemon.terminal import ProgressDisplay
from daemon.tree import State as TreeState
from daemon.tree import TreeWatch, WatchSettings
from daemon.webui import WebUIService
from handlers.give_back import give_memory_back
from sessions.layout import CAPTIONS, MODELS, Role, is_own_folder, place_of

log = logging.getLogger(__name__)
# systemd's TimeoutStopSec is 300: training finishes its step and saves well within this.
_STOP_SECONDS = 280.0
_QUIET_WITH_EVENTS = 60.0
_QUIET_WITHOUT_EVENTS = 300.0
_GATHER_SECONDS = 0.05
# After so many plans, as at the first start in a large tree, memory is given back.
_MANY_SESSIONS = 50
_GATHER_SECONDS_AT_MOST = 15.0
_PENDING: tuple[JobState, ...] = ("ready", "running", "waiting")


class Daemon:
    """The daemon of one tree. The tree's lock is held by the caller.

    Args:
        state: the tree and its state folder.
        settings: of the tree.
        environment: of the process.
        once: do what is there, then end.
        display: shows progress on a terminal.
    """

    def __init__(
        self,
        state: State,
        settings: Settings,
        environment: Mapping[str, str],
        *,
        once: bool,
        display: ProgressDisplay,
    ) -> None:
        self._state = state
        self._settings = settings
        self._once = once
        self._environment = environment
        self._dirty: set[str] = set()
        self._dirty_event = asyncio.Event()
        self._replans: dict[str, asyncio.TimerHandle] = {}
        self._stop = asyncio.Event()
        self._stops = 0
        self._hurry: asyncio.Task[None] | None = None
        root, cache = state.root, cache_home(environment)
        devices = gpu_devices(environment)

        self.index = Index(state.index)
        self.queue = Queue(state.queue)
        self.sessions = Sessions(root)
        self.tree = TreeWatch(
            root,
            self.index,
            WatchSettings(
                settings.watch.events,
                settings.watch.poll,
                settings.watch.settle,
                settings.watch.rescan,
                tuple(settings.watch.ignore),
            ),
            is_own_folder,
            on_settled=self._on_settled,
            on_vanished=self._on_vanished,
            counts_as_movement=self._counts_as_movement,
        )
        self._captions = ModelGate("captioner", settings.captioner, self._models_folder, cache, time.monotonic)
        self.webui = WebUIService.of(settings.webui, state, environment, changed=self._on_webui)
        searching = Searching(settings.search, index_folder(state.folder, settings.search)) if settings.search else None
        looks = {"caption": self._captions.reason, "publish": self.webui.publish_gate}
        if settings.search:
            looks[EMBED] = ModelGate("search", settings.search, self._models_folder, cache, time.monotonic).reason
        self.gates = Gates(
            looks,
            everything=self._tree_gate,
        )
        self._networks = Networks(self._models_folder, cache)
        self._networks.look()
        rules = PictureRules(
            captioner=settings.captioner,
            caption=settings.caption.parameters(),
            network=self._networks.parameters,
        )
        self.planner = Planner(
            root,
            self.index,
            settings,
            rules,
            cache,
            quiet_for=lambda session: self.router.quiet_for(session),  # noqa: PLW0108 - the router comes after it
            quiet_needed=self._quiet_needed,
            caption_gate=self._captions.reason,
            searching=searching,
        )
        self.stamper = Stamper(self.sessions, lambda: self.router.shape, lambda fact: self._on_settled([fact]))
        self.router = Router(
            root=root,
            index=self.index,
            queue=self.queue,
            sessions=self.sessions,
            planner=self.planner,
            rules=rules,
            now=time.monotonic,
            clock=time.time,
            today=lambda: datetime.now(UTC).astimezone().date(),
            stamp=self.stamper.put,
            touched=self._on_touched,
            noted=lambda path: self.reporter.blocked.found(path),  # noqa: PLW0108 - the reporter comes after it
            tree_quiet=lambda folder: self.tree.quiet_for(folder, time.monotonic()),
        )
        # With gpus: all the lane has one place, whose worker leads the others of its crew.
        crew = devices if settings.gpus == "all" else ()
        places = devices[:1] if crew else devices
        preparer = Preparer(root, settings, self.sessions, self.index, rules, self._networks.known, searching, crew)
        hooks = TreeHooks(
            preparer=preparer,
            sessions=self.sessions,
            gates=self.gates,
            make_room=self.webui.yield_gpu,
            ended=self._on_ended,
            display=display,
            kept=self.mark_dirty,
        )
        self.dispatcher = Dispatcher(
            self.queue,
            {"cpu": os.cpu_count() or 1, "gpu": max(1, len(places)), "net": 1},
            WorkerSettings(cache, state.logs, worker_environment(environment), mark=os.fspath(state.folder)),
            hooks,
            devices=places,
        )
        self.reporter = Reporter(self)
        self._notifier = Notifier(environment)

    # Life

    async def run(self) -> int:
        """Work until stopped, or until everything is done. Returns the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        # What is wanted follows from the tree alone: whatever the databases hold or lost, this brings the queue to it.
        self.router.reroute()
        server = await control.serve(self._state.socket, Commander(self).commands())
        schedule = Schedule(self)
        schedule.start()
        await self.webui.start()
        tasks = [
            asyncio.create_task(work, name=name)
            for name, work in (
                ("tree", self.tree.run()),
                ("jobs", self.dispatcher.run()),
                ("plans", self._plan_forever()),
                ("stamps", self.stamper.run()),
                ("status", self.reporter.run()),
            )
        ]
        ending = asyncio.create_task(self._until_over(), name="over")
        self._notifier.ready(f"watching {self._state.root}")
        log.info("watching %s (state in %s)", self._state.root, self._state.folder)
        try:
            finished, _ = await asyncio.wait([*tasks, ending], return_when=asyncio.FIRST_COMPLETED)
            for task in finished:
                task.result()
            return self.reporter.exit_code() if self._once else 0
        finally:
            self._notifier.stopping(_STOP_SECONDS)
            server.close()
            schedule.stop()
            await self.dispatcher.stop(_STOP_SECONDS)
            await self.webui.stop()
            for task in (*tasks, ending):
                task.cancel()
            await asyncio.gather(*tasks, ending, return_exceptions=True)
            self.reporter.last_words()
            with suppress(OSError):
                self._state.socket.unlink()
            self.queue.close()
            self.index.close()

    def _on_signal(self) -> None:
        self._stops += 1
        if self._stops == 1:
            log.info("stopping: running work is saved; once more stops at once")
            self._stop.set()
        else:
            self.dispatcher.kill()
            self._hurry = asyncio.get_running_loop().create_task(self.webui.kill())

    def notify_alive(self) -> None:
        """Tell systemd's watchdog that the loop turns."""
        self._notifier.alive()

    async def _until_over(self) -> None:
        if not self._once:
            await self._stop.wait()
            return
        await self.tree.first_scan.wait()
        while not self._stop.is_set() and not self._all_done():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), 0.2)

    def _all_done(self) -> bool:
        if self.tree.unsettled or self.stamper.busy or self._dirty or self.router.reroute_wanted:
            return False
        if self.tree.state is not TreeState.WATCHING or self.dispatcher.running:
            return self.tree.state is TreeState.UNREACHABLE
        return not any(self._is_to_do(job) for job in self.queue.jobs(states=_PENDING))

    def _is_to_do(self, job: Job) -> bool:
        """Whether --once waits for a job: not for one that lacks something, nor for a retry more than 60 s away."""
        if job.kind == "publish" and self.webui.is_coming:
            return True
        return self.gates.reason(job.kind) is None and "reason" not in job.problem and job.run_at <= time.time() + 60.0

    # What happens in the tree

    def _on_settled(self, facts: list[Fact]) -> None:
        self.router.settled(facts)
        self._after_change(fact.path for fact in facts)

    def _on_vanished(self, paths: list[str]) -> None:
        self.router.vanished(paths)
        self._after_change(paths)

    def _after_change(self, paths: object) -> None:
        del paths
        if self.router.reroute_wanted:
            # After the facts are in the index, which is when this callback has returned.
            asyncio.get_running_loop().call_soon(self._reroute)
        self.dispatcher.wake()

    def _reroute(self) -> None:
        if self.router.reroute_wanted:
            self.router.reroute()
            self.dispatcher.wake()

    async def look_for_networks(self) -> None:
        """A salient-object network came or changed: the crops that are wished for with one are wanted anew."""
        if self._networks.look():
            # Not ``reroute``, which tidies: a network may also be gone because the whole tree is out of reach.
            for session in list(self.sessions):
                self.router.reroute_session(session)
            self.dispatcher.wake()

    def _on_touched(self, session: str) -> None:
        self.reporter.changed(session)
        self.mark_dirty(session)

    def _on_ended(self, ended: Job, session: str | None) -> None:
        if session is not None:
            if ended.kind in PICTURE_KINDS:
                self.router.follow(session, str(ended.payload["source"]))
            self.mark_dirty(session)
            self.reporter.outcome(session)
        if ended.kind != "train":
            return
        others = (job for job in self.queue.jobs(states=_PENDING) if job.id != ended.id)
        if not any(job.kind == "train" for job in others):
            self.webui.give_gpu_back()

    def _on_webui(self) -> None:
        self.dispatcher.wake()
        self.reporter.news.set()

    def mark_dirty(self, session: str) -> None:
        """Have a session planned again soon."""
        self._dirty.add(session)
        self._dirty_event.set()

    def cancel(self, number: int) -> bool:
        """Cancel a job. A run that is cancelled is over, even if it had not begun. Returns whether there was one."""
        job = self.queue.job(number)
        if job is None or not self.dispatcher.cancel(number):
            return False
        if job.kind == "train" and job.state != "running":
            with suppress(LookupError):
                session = self.sessions.by_id(job.session)
                record_ended_run(session, job.payload, "cancelled", "cancelled")
                self.mark_dirty(session.path)
        return True

    async def _plan_forever(self) -> None:
        spent, planned = 0.0, 0
        while True:
            await self._dirty_event.wait()
            # A plan looks at every picture of its session: in a large one, it takes a tenth of the time at most.
            await asyncio.sleep(max(_GATHER_SECONDS, min(10 * spent, _GATHER_SECONDS_AT_MOST)))
            self._dirty_event.clear()
            began = time.monotonic()
            # Taken out one by one: --once sees that planning is not over yet.
            while self._dirty:
                path = next(iter(self._dirty))
                self._plan(path)
                self._dirty.discard(path)
                planned += 1
                await asyncio.sleep(0)
            spent = time.monotonic() - began
            if planned > _MANY_SESSIONS:
                planned = 0
                self.sessions.release()
                give_memory_back()

    def _plan(self, path: str) -> None:
        if path not in self.sessions:
            return
        try:
            plan = self.router.plan(path)
        except OSError as error:
            log.warning("session %s cannot be planned: %s", path, error)
            return
        except Exception:
            # One session that nobody foresaw must not take the others down with it.
            log.exception("session %s cannot be planned", path)
            return
        self.reporter.plans[path] = plan
        self.reporter.outcome(path)
        self.dispatcher.wake()
        if (earlier := self._replans.pop(path, None)) is not None:
            earlier.cancel()
        if plan.again_in is not None:
            self._replans[path] = asyncio.get_running_loop().call_later(plan.again_in, self.mark_dirty, path)

    # What others want to know

    @property
    def state(self) -> State:
        """The tree and its state folder."""
        return self._state

    @property
    def root(self) -> Path:
        """The tree."""
        return self._state.root

    @property
    def has_events(self) -> bool:
        """Whether the tree tells of its changes."""
        return self.tree.has_events

    def _quiet_needed(self) -> float:
        if self._once:
            return 0.0
        return _QUIET_WITH_EVENTS if self.tree.has_events else _QUIET_WITHOUT_EVENTS

    def _tree_gate(self) -> str | None:
        return self.tree.reason if self.tree.state is TreeState.UNREACHABLE else None

    def _models_folder(self) -> Path | None:
        folder = self._state.root / MODELS
        return folder if folder.is_dir() else None

    def _counts_as_movement(self, path: str) -> bool:
        """Whether a path that moved says that a person is still at work: our own outputs do not."""
        place = place_of(path, self.router.shape)
        if place is None or place.role in (Role.OWN, Role.MODEL):
            return False
        return not (place.role is Role.CAPTION and place.relative.startswith(f"{CAPTIONS}/"))
