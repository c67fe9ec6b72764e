"""From settled facts to jobs in the queue: which session a file belongs to, and what that session now wants."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from hashlib import sha256
from itertools import islice
from pathlib import Path

from daemon.index import Fact, Index
from daemon.jobs import ENDED, JobRequest, JobState
from daemon.outcomes import forget_picture
from daemon.planner import Plan, Planner
from daemon.queue import Queue
from daemon.routing import PictureRules, needs_stamp, picture_requests
from daemon.session import Session, Sessions
from sessions import layout
from sessions.errors import error_path
from sessions.files import write_text
from sessions.layout import Role, Shape
from sessions.manifest import outputs_present
from sessions.spec_example import EXAMPLE

log = logging.getLogger(__name__)
_BATCH = 1000
_DONE: frozenset[JobState] = frozenset({"done"})


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
        self._tree_quiet = tree_quiet
        self._moved: dict[str, float] = {}
        self._spec_folders: set[str] = set()
        self._shape = Shape()
        self.reroute_wanted = True

    @property
    def shape(self) -> Shape:
        """Where sessions begin in this tree, as far as it has been seen."""
        return self._shape

    def quiet_for(self, session: Session) -> float:
        """Seconds since people last moved something in a session; long, when nothing was since the start."""
        settled = self._now() - self._moved.get(session.path, float("-inf"))
        return min(settled, self._tree_quiet(session.path))

    def settled(self, facts: Iterable[Fact]) -> None:
        """Files have settled: queue what they want. They are in the index only after this."""
        facts = list(facts)
        self._learn_shape(facts)
        self._put(request for fact in facts for request in self._route(fact))

    def vanished(self, paths: Iterable[str]) -> None:
        """Files are gone: their outputs go to the trash, unless their session only moved."""
        for path in paths:
            name = path.rsplit("/", 1)[-1]
            if layout.is_spec_name(name):
                self._spec_folders.discard(path.rpartition("/")[0])
            place = layout.place_of(path, self._shape)
            if place is None:
                continue
            folder = self._root / place.session if place.session else self._root
            if not folder.is_dir():
                # The folder went as a whole: renamed (its outputs went along) or removed (nothing is left to tidy).
                self._sessions.forget(place.session)
                self._moved.pop(place.session, None)
                continue
            try:
                self._vanish(self._sessions.at(place.session), place)
            except OSError as error:
                log.warning("cannot tidy after %s: %s", path, error)
            self._touched(place.session)

    def _vanish(self, session: Session, place: layout.Place) -> None:
        if place.role is Role.PICTURE:
            self._move(place.session)
            forget_picture(session, place.relative, self._today())
        elif place.relative.endswith(layout.ERROR_SUFFIX):
            self.retry_refused(session, self.refused_in(session, place.relative))
        elif place.role is not Role.OWN:
            self._move(place.session)

    def refused_in(self, session: Session, error_file: str) -> list[str]:
        """The files whose refusal is told in an error file (a path in the session)."""
        sources = [str(record["source"]) for record in session.manifest.of_kind("refused")]
        return [source for source in sources if session.inside(error_path(session.folder / source)) == error_file]

    def retry_refused(self, session: Session, sources: Iterable[str]) -> int:
        """Forget what was said against files of a session, so that they are tried again. Returns how many there were.

        Raises:
            OSError: the folder cannot be written.
        """
        gone = []
        for source in sources:
            if session.manifest.get("refused", source) is not None:
                gone.append({"kind": "refused", "source": source, "gone": True})
                error_path(session.folder / source).unlink(missing_ok=True)
        session.manifest.append(gone)
        for line in gone:
            fact = self._index.lookup(session.tree_path(str(line["source"])))
            if fact is not None and layout.is_picture_name(fact.path):
                self._put(picture_requests(session, str(line["source"]), fact, self._rules), again=ENDED)
        self._queue.forget(
            job.key for job in self._queue.jobs(session=session.id) if job.kind == "train" and job.state == "refused"
        )
        self._touched(session.path)
        return len(gone)

    def reroute(self) -> None:
        """Look at everything in the index anew: at start, and when sessions begin elsewhere than before."""
        self.reroute_wanted = False
        self._spec_folders = {
            folder for folder in self._index.folders() if any(map(layout.is_spec_name, self._index.known(folder)))
        }
        self._learn_shape(())
        self.reroute_wanted = False
        self._put(request for fact in self._index.under() for request in self._route(fact, heal=True, movement=False))

    def plan(self, path: str) -> Plan:
        """Plan the session in a folder, and queue what it wants.

        Raises:
            OSError: the folder cannot be read or written.
        """
        plan = self._planner.plan(self._sessions.at(path), self._shape)
        self._put(plan.requests)
        return plan

    def _route(self, fact: Fact, *, heal: bool = False, movement: bool = True) -> Iterator[JobRequest]:
        place = layout.place_of(fact.path, self._shape)
        if place is None or place.role in (Role.OWN, Role.OTHER):
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
        if place.role is not Role.PICTURE:
            return
        if heal:
            self._heal(session, place.relative)
        if needs_stamp(session, place.relative, fact):
            self._stamp(fact)
            return
        yield from picture_requests(session, place.relative, fact, self._rules)

    def _session(self, path: str) -> Session:
        known = path in self._sessions
        session = self._sessions.at(path)
        example = session.folder / layout.EXAMPLE
        if not known and not example.exists():
            write_text(example, EXAMPLE)
        return session

    def _heal(self, session: Session, relative: str) -> None:
        """Outputs that somebody removed are made again: their records no longer hold."""
        for kind in ("crop", "caption"):
            record = session.manifest.get(kind, relative)
            if record is not None and not outputs_present(session.folder, record):
                session.manifest.records.pop((kind, relative), None)

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

    def _learn_shape(self, facts: Iterable[Fact]) -> None:
        top_files = set()
        for fact in facts:
            folder, _, name = fact.path.rpartition("/")
            if layout.is_spec_name(name):
                self._spec_folders.add(folder)
            if not folder:
                top_files.add(name)
        top_folders = {name for name in (layout.SESSIONS, layout.INSTANCE_IMAGES) if (self._root / name).is_dir()}
        if layout.SESSIONS not in top_folders and not self._shape.root_is_session:
            top_files |= set(self._index.known(""))
        shape = Shape.of(top_folders, top_files, self._spec_folders)
        if self._shape.root_is_session and not shape.has_sessions:
            shape = Shape(has_sessions=False, root_is_session=True, nested=shape.nested)
        if shape != self._shape:
            self._shape = shape
            self.reroute_wanted = True

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
