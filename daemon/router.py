"""From settled facts to jobs in the queue: which session a file belongs to, and what that session now wants."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import date
from hashlib import sha256
from itertools import islice
from pathlib import Path

from daemon.index import Fact, Index
from daemon.jobs import ENDED, JobRequest, JobState
from daemon.outcomes import forget_pictures, is_there
from daemon.planner import Plan, Planner
from daemon.queue import Queue
from daemon.routing import PICTURE_KINDS, PICTURE_RECORDS, PictureRules, needs_stamp, picture_requests, sessions_touched
from daemon.runs import failed_runs
from daemon.session import Session, Sessions
from daemon.shape import ShapeWatch
from sessions import layout
from sessions.errors import error_path, remove_error
from sessions.files import write_text
from sessions.layout import Role, Shape
from sessions.manifest import outputs_present
from sessions.spec_example import EXAMPLE

log = logging.getLogger(__name__)
_BATCH = 1000
_DONE: frozenset[JobState] = frozenset({"done"})
_RULES = (Role.SPEC, Role.WISHES)
_GIVEN_UP: frozenset[JobState] = frozenset({"failed", "refused"})


class Router:
    """Keeps the queue equal to what the tree wants.

    Args:
        root: the tree.
        index: its settled facts.
        queue: where wanted jobs go.
        sessions: the sessions met.
        planner: plans what a session wants beyond its pictures.
        rules: parameters of the pictures' outputs.
        now: seconds on a monotonic clock.
        clock: seconds since the epoch, for the queue.
        today: the date, for the trash.
        stamp: called for pictures that may only have been touched.
        touched: called with the folder of every session in which something changed.
        noted: called with every error file that lies in the tree.
        tree_quiet: (folder) → seconds since a file moved below it, settled or not.
    """

    def __init__(
        self,
        *,
        root: Path,
        index: Index,
        queue: Queue,
        sessions: Sessions,
        planner: Planner,
        rules: PictureRules,
        now: Callable[[], float],
        clock: Callable[[], float],
        today: Callable[[], date],
        stamp: Callable[[Fact], None],
        touched: Callable[[str], None],
        noted: Callable[[str], None],
        tree_quiet: Callable[[str], float],
    ) -> None:
        self._root = root
        self._index = index
        self._queue = queue
        self._sessions = sessions
        self._planner = planner
        self._rules = rules
        self._now = now
        self._clock = clock
        self._today = today
        self._stamp = stamp
        self._touched = touched
        self._noted = noted
        self._tree_quiet = tree_quiet
        self._moved: dict[str, float] = {}
        self._met: dict[str, str] = {}
        self._has_started = False
        self._watch = ShapeWatch(root, index)
        self.reroute_wanted = True

    @property
    def shape(self) -> Shape:
        """Where sessions begin in this tree, as far as it has been seen."""
        return self._watch.shape

    def quiet_for(self, session: Session) -> float:
        """Seconds since people last moved something in a session; long, when nothing was since the start."""
        settled = self._now() - self._moved.get(session.path, float("-inf"))
        return min(settled, self._tree_quiet(session.path))

    def settled(self, facts: Iterable[Fact]) -> None:
        """Files have settled: queue what they want. They are in the index only after this."""
        facts = list(facts)
        self.reroute_wanted |= self._watch.settled(fact.path for fact in facts)
        self._refresh(fact.path for fact in facts)
        self._learn_rules(fact.path for fact in facts)
        self._put(request for fact in facts for request in self._route(fact))

    def follow(self, folder: str, source: str) -> None:
        """Something was made of a picture: queue what that makes it want, as a caption does with its boxes."""
        with suppress(OSError):
            session = self._sessions.at(folder)
            fact = self._index.lookup(session.tree_path(source))
            if fact is not None and any(session.manifest.get(kind, source) for kind in PICTURE_RECORDS):
                self._put(picture_requests(session, source, fact, self._rules))

    def vanished(self, paths: Iterable[str]) -> None:
        """Files are gone: their outputs go to the trash, unless their session only moved."""
        paths = list(paths)
        self._refresh(paths)
        self._learn_rules(paths)
        pictures: dict[str, list[str]] = {}
        for path in paths:
            place = layout.place_of(path, self.shape)
            if place is None:
                continue
            folder = self._root / place.session if place.session else self._root
            if not folder.is_dir():
                # The folder went as a whole: renamed (its outputs went along) or removed (nothing is left to tidy).
                self._sessions.forget(place.session)
                self._moved.pop(place.session, None)
                self._met.pop(place.session, None)
                continue
            if place.role is Role.PICTURE:
                pictures.setdefault(place.session, []).append(place.relative)
                continue
            try:
                self._vanish(self._sessions.at(place.session), place)
            except OSError as error:
                log.warning("cannot tidy after %s: %s", path, error)
            self._touched(place.session)
        for session, gone in pictures.items():
            self._move(session)
            try:
                forget_pictures(self._sessions.at(session), gone, self._today())
            except OSError as error:
                log.warning("cannot tidy after %d pictures of %s: %s", len(gone), session, error)
            self._touched(session)
        self.reroute_wanted |= self._watch.vanished(paths)

    def _refresh(self, paths: Iterable[str]) -> None:
        """Look whether known sessions are still the ones that they were: once a session, not once a file."""
        for session in sessions_touched(paths, self.shape):
            self._sessions.refresh(session)

    def _learn_rules(self, paths: Iterable[str]) -> None:
        """A session's train.yaml or crop.txt that changed is read again, before any of its pictures is looked at."""
        for path in paths:
            place = layout.place_of(path, self.shape)
            if place is not None and place.role in _RULES and place.session in self._sessions:
                with suppress(OSError):
                    self._sessions.at(place.session).forget_crop_rules()

    def _vanish(self, session: Session, place: layout.Place) -> None:
        if place.relative.endswith(layout.ERROR_SUFFIX):
            if sources := self.refused_in(session, place.relative):
                self.retry_refused(session, sources)
        elif place.role is not Role.OWN:
            self._move(place.session)
            if session.manifest.get("refused", place.relative) is not None:
                session.manifest.append([{"kind": "refused", "source": place.relative, "gone": True}])
                remove_error(session.folder / place.relative)
            if place.role in _RULES:
                self.reroute_session(place.session)

    def refused_in(self, session: Session, error_file: str) -> list[str]:
        """The files whose refusal is told in an error file (a path in the session)."""
        sources = [str(record["source"]) for record in session.manifest.of_kind("refused")]
        return [source for source in sources if session.inside(error_path(session.folder / source)) == error_file]

    def retry_refused(self, session: Session, sources: Iterable[str]) -> int:
        """Forget what was said against files of a session, so that they are tried again. Returns how many there were.

        Raises:
            OSError: the folder cannot be written.
        """
        refused = [source for source in sources if session.manifest.get("refused", source) is not None]
        runs = [run for source in refused if layout.is_spec_name(source) for run in failed_runs(session, source)]
        session.manifest.append(
            [
                *({"kind": "refused", "source": source, "gone": True} for source in refused),
                *({"kind": "train", "run": run, "gone": True} for run in runs),
            ],
        )
        for source in refused:
            remove_error(session.folder / source)
            fact = self._index.lookup(session.tree_path(source))
            if fact is not None and layout.is_picture_name(source):
                self._put(picture_requests(session, source, fact, self._rules), again=ENDED)
        if refused:
            # The plan queues them anew, where they are still wanted.
            ended = self._queue.jobs(states=_GIVEN_UP, session=session.id)
            self._queue.forget(job.key for job in ended if job.kind not in PICTURE_KINDS)
        self._touched(session.path)
        return len(refused)

    def reroute(self) -> None:
        """Look at everything in the index anew: at start, and when sessions begin elsewhere than before."""
        if not self._has_started:
            self._has_started = True
            self._watch.read_index()
        self._watch.settled()
        self.reroute_wanted = False
        self._leave_former_sessions()
        for path in list(self._sessions):
            with suppress(OSError):
                self._tidy(self._sessions.at(path))
        self._put(request for fact in self._index.under() for request in self._route(fact, heal=True, movement=False))

    def _leave_former_sessions(self) -> None:
        """Folders that are no session any more, since the tree has another shape: nobody waits for their jobs."""
        for path in list(self._sessions):
            if layout.session_folder_of(f"{path}/-" if path else "-", self.shape) != path:
                self._queue.drop_session(self._sessions.known_id(path))
                self._sessions.forget(path)
                self._met.pop(path, None)

    def _tidy(self, session: Session) -> None:
        """What was made of pictures that are gone, or belong to another session by now, goes to the trash.

        Mostly that is told when it happens; not when it happened while no daemon ran and the index was lost.
        """
        sources = {source for kind, source in session.manifest.records if kind in PICTURE_RECORDS}
        gone = []
        for source in sources:
            place = layout.place_of(session.tree_path(source), self.shape)
            if place is None or place.session != session.path or not is_there(session.folder / source):
                gone.append(source)
        forget_pictures(session, gone, self._today())

    def reroute_session(self, path: str) -> None:
        """Look at everything below a session's folder anew: it could not be written, and now it can."""
        self._put(request for fact in self._index.under(path) for request in self._route(fact, movement=False))

    def plan(self, path: str) -> Plan:
        """Plan the session in a folder, and queue what it wants.

        Raises:
            OSError: the folder cannot be read or written.
        """
        plan = self._planner.plan(self._sessions.at(path), self.shape)
        self._put(plan.requests)
        return plan

    def _route(self, fact: Fact, *, heal: bool = False, movement: bool = True) -> Iterator[JobRequest]:
        place = layout.place_of(fact.path, self.shape)
        if place is None or place.role in (Role.OWN, Role.OTHER):
            if fact.path.endswith(layout.ERROR_SUFFIX):
                self._noted(fact.path)
            if place is not None and place.session in self._sessions:
                self._touched(place.session)
            return
        if place.role in (Role.CAPTION, Role.MODEL) and place.session not in self._sessions:
            return
        try:
            session = self._session(place.session)
        except OSError:
            self._touched(place.session)
            return
        if movement and not self._is_own_caption(session, place):
            self._move(place.session)
        self._touched(place.session)
        if place.role in _RULES and movement:
            # It may say of every picture that its crop is wanted in another way.
            for known in self._index.under(place.session):
                yield from self._route(known, movement=False)
        if place.role is not Role.PICTURE:
            return
        if heal:
            self._heal(session, place.relative)
        if needs_stamp(session, place.relative, fact):
            self._stamp(fact)
            return
        yield from picture_requests(session, place.relative, fact, self._rules)

    def _session(self, path: str) -> Session:
        session = self._sessions.at(path)
        if self._met.get(path) != session.id:
            self._met[path] = session.id
            self._tidy(session)
            example = session.folder / layout.EXAMPLE
            if not example.exists():
                write_text(example, EXAMPLE)
        return session

    def _heal(self, session: Session, relative: str) -> None:
        """Outputs that somebody removed are made again: their records no longer hold."""
        for kind in PICTURE_KINDS:
            record = session.manifest.get(kind, relative)
            if record is not None and not outputs_present(session.folder, record):
                session.outdate(kind, relative)

    def _is_own_caption(self, session: Session, place: layout.Place) -> bool:
        if place.role is not Role.CAPTION or not place.relative.startswith(f"{layout.CAPTIONS}/"):
            return False
        try:
            digest = sha256((session.folder / place.relative).read_bytes()).hexdigest()
        except OSError:
            return False
        source = session.source_of(place.relative.rsplit("/", 1)[-1])
        record = session.manifest.get("caption", source) if source else None
        return record is not None and record.get("text_sha256") == digest

    def _move(self, path: str) -> None:
        self._moved[path] = self._now()

    def _put(self, requests: Iterable[JobRequest], again: frozenset[JobState] = _DONE) -> None:
        """Queue what is wanted.

        The manifest knows what is done: a job that the queue calls done and that is wanted all the same has lost its
        outputs, and is done again.
        """
        remaining = iter(requests)
        while batch := list(islice(remaining, _BATCH)):
            new = set(self._queue.put(batch, self._clock()))
            known = ((request, self._queue.by_key(request.key)) for request in batch if request.key not in new)
            ended = [request for request, job in known if job is not None and job.state in again]
            if ended:
                self._queue.put(ended, self._clock(), again=True)
