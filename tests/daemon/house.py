"""The daemon's own rooms on a real tree and real SQLite files, without watcher, workers and clocks.

``look`` hands on what differs from the index, as the watcher does; ``work`` ends the queued jobs as workers would, with
small files for outputs; ``restart`` begins again with the state folder as it is, ``lose`` without a part of it.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from daemon.config import Settings
from daemon.gates import Gates
from daemon.hooks import TreeHooks
from daemon.index import Fact, Index, fact_of
from daemon.jobs import Job, JobState
from daemon.planner import Plan, Planner
from daemon.prepare import Preparer
from daemon.queue import Queue
from daemon.router import Router
from daemon.routing import PICTURE_KINDS, PictureRules
from daemon.session import Session, Sessions
from daemon.stamper import Stamper
from daemon.terminal import NoDisplay
from handlers.models.segments import SegmentNetwork
from handlers.outcome import Outcome
from sessions.ignore import IgnoreRules
from sessions.layout import is_own_folder, is_picture_name
from sessions.refusal import Refusal

TODAY = date(2026, 3, 14)


@contextmanager
def without_syncs() -> Iterator[None]:
    """Files are not synced to the disk: a test that writes thousands of them would do nothing else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _descriptor: None)
        yield


OPEN: tuple[JobState, ...] = ("ready", "running", "waiting")
SPEC = "base: miniature\nstart: now\n"


class House:
    """One tree and its daemon's rooms.

    Args:
        folder: the tree and the state come into it.

    Attributes:
        captions_wait: why captions cannot be made, None when they can.
        quiet: seconds since the tree moved, as the watcher would say.
        needed: seconds of quiet before a run.
        refuses: pictures' contents that the crop job refuses.
        refuses_models: whether the conversion refuses.
        least: the right edge that a fixed box must reach to be large enough.
        faces: pictures' contents in which the crop job finds a face; in the others, what the caption's boxes show.
        entities: a picture's content → the entities of its caption.
        payloads: the payload of every crop that was made, in order.
        made: (kind, source or run) of every job that was worked on.
    """

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.root = folder / "tree"
        self.state = folder / "state"
        self.root.mkdir(parents=True, exist_ok=True)
        self.state.mkdir(exist_ok=True)
        self.settings = Settings(**settings)
        self.captions_wait: str | None = None
        self.unreachable: str | None = None
        self.quiet = float("inf")
        self.needed = 0.0
        self.now = 1000.0
        self.refuses: set[bytes] = set()
        self.refuses_models = False
        self.least = 0.0
        self.faces: set[bytes] = set()
        self.entities: dict[bytes, list[dict[str, Any]]] = {}
        self.network: SegmentNetwork | None = None
        self.payloads: list[dict[str, Any]] = []
        self.made: list[tuple[str, str]] = []
        self.ended: list[str | None] = []
        self._stamps: list[Fact] = []
        self._dirty: set[str] = set()
        self.plans: dict[str, Plan] = {}
        self._open()

    def _open(self) -> None:
        self.index = Index(self.state / "index.sqlite")
        self.queue = Queue(self.state / "queue.sqlite", jitter=lambda: 1.0)
        # No power cut comes in these tests, and thousands of syncs would be most of their time.
        self.queue._connection.execute("PRAGMA synchronous=OFF")
        self.sessions = Sessions(self.root)
        rules = PictureRules(
            captioner=self.settings.captioner, network=lambda: self.network.to_json() if self.network else None
        )
        self.planner = Planner(
            self.root,
            self.index,
            self.settings,
            rules,
            self.state / "cache",
            quiet_for=lambda session: self.router.quiet_for(session),  # noqa: PLW0108 - the router comes after it
            quiet_needed=lambda: self.needed,
            caption_gate=lambda: self.captions_wait,
        )
        self.router = Router(
            root=self.root,
            index=self.index,
            queue=self.queue,
            sessions=self.sessions,
            planner=self.planner,
            rules=rules,
            now=lambda: self.now,
            clock=lambda: self.now,
            today=lambda: TODAY,
            stamp=self._stamps.append,
            touched=self._dirty.add,
            noted=lambda _path: None,
            tree_quiet=lambda _folder: self.quiet,
        )
        self.preparer = Preparer(self.root, self.settings, self.sessions, self.index, rules, lambda: self.network)
        self.hooks = TreeHooks(
            preparer=self.preparer,
            sessions=self.sessions,
            gates=Gates({}, everything=lambda: self.unreachable),
            make_room=_nothing,
            ended=self._on_ended,
            display=NoDisplay(),
        )
        self.router.reroute()

    def _on_ended(self, job: Job, session: str | None) -> None:
        self.ended.append(session)
        if session is not None:
            if job.kind in PICTURE_KINDS:
                self.router.follow(session, str(job.payload["source"]))
            self._dirty.add(session)

    def close(self) -> None:
        """Close the databases."""
        self.index.close()
        self.queue.close()

    # What people do

    def write(self, path: str, content: bytes | str = b"picture", *, mtime: float | None = None) -> Path:
        """Put a file into the tree."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        if mtime is not None:
            os.utime(file, (mtime, mtime))
        return file

    def pictures(self, folder: str, count: int = 3) -> None:
        """Put pictures into a folder."""
        for number in range(count):
            self.write(f"{folder}/{number}.jpg", f"picture {number}")

    # What the daemon does

    def look(self) -> None:
        """Hand on what differs from the index, and plan what was touched."""
        found = {fact.path: fact for fact in self._walk()}
        known = {fact.path: fact for fact in self.index.under()}
        settled = [fact for path, fact in sorted(found.items()) if known.get(path) != fact]
        vanished = sorted(known.keys() - found.keys())
        if settled:
            self.router.settled(settled)
            self.index.record(settled)
        if vanished:
            self.router.vanished(vanished)
            self.index.forget(vanished)
        self._after()

    def _after(self) -> None:
        while self.router.reroute_wanted or self._stamps or self._dirty:
            if self.router.reroute_wanted:
                self.router.reroute()
            if self._stamps:
                asyncio.run(self._stamp())
            for path in [path for path in sorted(self._dirty) if path in self.sessions]:
                self.plans[path] = self.router.plan(path)
            self._dirty.clear()

    async def _stamp(self) -> None:
        stamper = Stamper(self.sessions, lambda: self.router.shape, lambda fact: self.router.settled([fact]))
        while self._stamps:
            stamper.put(self._stamps.pop())
        task = asyncio.create_task(stamper.run())
        while stamper.busy:
            await asyncio.sleep(0)
            assert not task.done(), task
        task.cancel()

    def _walk(self) -> Iterable[Fact]:
        rules = IgnoreRules()
        for folder, folders, names in os.walk(self.root):
            here = Path(folder).relative_to(self.root).as_posix()
            prefix = "" if here == "." else f"{here}/"
            folders[:] = [
                name for name in folders if not rules.ignores_folder(prefix + name) and not is_own_folder(prefix + name)
            ]
            for name in names:
                if not rules.ignores_file(prefix + name):
                    yield fact_of(prefix + name, Path(folder, name).lstat())

    def work(self, *, kinds: Iterable[str] = ("crop", "caption"), at_most: int = 100_000) -> int:
        """End due jobs as workers would. Returns how many were worked on."""
        done = 0
        while done < at_most and (job := self.claim(*kinds)) is not None:
            done += self.finish(job)
            self._after()
        return done

    def claim(self, *kinds: str) -> Job | None:
        """The next job of these kinds."""
        wanted = [kind for kind in kinds if kind != "caption" or self.captions_wait is None]
        for lane in ("cpu", "gpu", "net"):
            for job in self.queue.claim(lane, wanted, 1, self.now):
                return job
        return None

    def finish(self, job: Job, between: Callable[[], object] = lambda: None) -> bool:
        """Work on a claimed job; ``between`` happens after its worker has written. False where it was dropped."""
        payload = asyncio.run(_prepared(self.hooks, job))
        if payload is None:
            self.queue.drop(job)
            return False
        outcome = self._worked(job.kind, payload)
        between()
        self.made.append((job.kind, str(job.payload.get("source") or job.payload.get("run") or job.subject)))
        asyncio.run(self.hooks.on_outcome(job, outcome))
        match outcome.state:
            case "refused":
                assert outcome.refusal is not None
                self.queue.refuse(job, outcome.refusal, self.now)
            case _:
                self.queue.done(job, self.now)
        return True

    def _worked(self, kind: str, payload: dict[str, Any]) -> Outcome:
        if kind == "train":
            folder = Path(payload["folder"]) / "runs" / payload["run"] / "model"
            folder.mkdir(parents=True)
            (folder / "unet.bin").write_bytes(b"weights")
            return Outcome("done", facts={"run": payload["run"], "state": "finished", "finished": os.fspath(folder)})
        if kind == "convert" and self.refuses_models:
            return Outcome("refused", refusal=Refusal("source", "It is odd.", "Is it a model of another family?"))
        if kind == "convert":
            Path(payload["output"]).write_bytes(b"model")
            return Outcome("done", facts={"run": payload["run"], "bytes": 5}, outputs=(Path(payload["output"]),))
        if kind == "sheet":
            lines = [f"{Path(shown['source']).name} {shown['subject']}" for shown in payload["pictures"]]
            return Outcome("done", outputs=(_made(payload["output"], "\n".join(lines).encode()),))
        content = Path(payload["source"]).read_bytes()
        if content in self.refuses:
            return Outcome("refused", refusal=Refusal("corrupt", "It is no picture.", "Save it anew."))
        digest = hashlib.sha256(content).hexdigest()
        if kind == "crop":
            if payload.get("wish", {}).get("box", [0, 0, self.least])[2] < self.least:
                return Outcome("refused", refusal=Refusal("wish", "The box is too small.", "Correct the line."))
            output = _made(payload["output"], content)
            found = "face" if content in self.faces else "grounded" if payload.get("entities") else "centre"
            segment = payload.get("wish", {}).get("subject") == "segment"
            found = "segment" if segment and payload.get("segment") else found
            facts: dict[str, Any] = {"sha256": digest, "box": [0, 0, 1, 1], "picture": [1, 1], "subject": found}
            if segment and found != "segment":
                facts["network_problem"] = "There is no network."
            self.payloads.append(payload)
            return Outcome("done", facts=facts, outputs=(output,))
        outputs = [_made(payload["sidecar"], b"{}"), _made(payload["preview"], content)]
        text = Path(payload["text"]) if payload["text"] else None
        ours = None
        if text is not None and (not text.exists() or _sha(text) == payload["written"]):
            outputs.append(_made(os.fspath(text), b"a caption\n"))
            ours = _sha(text)
        facts = {
            "sha256": digest,
            "caption": "a caption",
            "entities": self.entities.get(content, []),
            "text_sha256": ours,
        }
        return Outcome("done", facts=facts, outputs=tuple(outputs))

    def settle(self) -> None:
        """Look and work until nothing is left to do."""
        for _ in range(20):
            self.look()
            if not self.work() and not self.open_jobs("crop", "caption"):
                return
            if self.captions_wait is not None and not self.open_jobs("crop"):
                return
        raise AssertionError(self.open_jobs())

    def restart(self, *lost: str) -> None:
        """End and begin again; what is ``lost`` of ``index`` and ``queue`` is deleted in between."""
        self.close()
        for name in lost:
            for file in self.state.glob(f"{name}.sqlite*"):
                file.unlink()
        self._stamps.clear()
        self._dirty.clear()
        self.plans.clear()
        self._open()
        self.queue.release_all(self.now)
        self._after()

    # What is there

    def session(self, path: str) -> Session:
        """A session."""
        return self.sessions.at(path)

    def open_jobs(self, *kinds: str) -> list[tuple[str, str]]:
        """Jobs that have not ended: (kind, subject); the contact sheet only where it is asked for."""
        jobs = self.queue.jobs(states=OPEN)
        return sorted((job.kind, job.subject) for job in jobs if (job.kind in kinds if kinds else job.kind != "sheet"))

    def files(self, path: str) -> set[str]:
        """All files below a folder of the tree."""
        top = self.root / path
        return {file.relative_to(top).as_posix() for file in top.rglob("*") if file.is_file()}

    def tree_pictures(self) -> set[str]:
        """Every picture that people put into the tree."""
        return {fact.path for fact in self._walk() if is_picture_name(fact.path)}


async def _nothing() -> None:
    pass


async def _prepared(hooks: TreeHooks, job: Job) -> dict[str, Any] | None:
    payload = await hooks.prepare(job)
    return None if payload is None else dict(payload)


def _made(path: str, content: bytes) -> Path:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content)
    return Path(path)


def _sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
