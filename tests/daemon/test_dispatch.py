"""The dispatcher with real workers: order, lanes, warm workers, gates, cancelling, stopping, crashes, kill -9."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from daemon.dispatch import Dispatcher
from daemon.jobs import Job, JobRequest, JobState
from daemon.ledger import Hooks
from daemon.queue import Queue
from daemon.queue_file import open_reader
from daemon.slots import WorkerSettings
from handlers.context import Waiting
from handlers.kinds import Kind
from handlers.outcome import Outcome
from sessions.refusal import Refusal
from tests.probes import ENVIRONMENT, KINDS, ROOT, alive, kind, until


class Recorder(Hooks):
    """Hooks that write down what they hear."""

    def __init__(self) -> None:
        self.outcomes: list[tuple[str, Outcome]] = []
        self.reports: list[tuple[str, Mapping[str, Any]]] = []
        self.shut: set[str] = set()
        self.states_at_outcome: list[JobState] = []
        self.queue: Queue | None = None
        self.made_room: list[str] = []
        self.no_room = False

    async def prepare(self, job: Job) -> Mapping[str, Any] | None:
        match job.payload.get("prepare"):
            case "gone":
                return None
            case "refuse":
                raise Refusal("empty", "The file is empty.", "Upload it again.")
            case "wait":
                raise Waiting("The drive is away.", 50)
            case "crash":
                raise ZeroDivisionError
            case _:
                return job.payload

    def may_start(self, kind: str) -> bool:
        return kind not in self.shut

    async def before_start(self, kind: str) -> None:
        self.made_room.append(kind)
        if kind == "train" and self.no_room:
            raise Waiting("The WebUI does not stop.", 20)

    async def on_outcome(self, job: Job, outcome: Outcome) -> None:
        self.outcomes.append((job.key, outcome))
        if self.queue is not None and (row := self.queue.job(job.id)):
            self.states_at_outcome.append(row.state)
        if job.payload.get("disk") == "full" and job.attempts == 1 and len(self.outcomes) == 1:
            raise OSError(28, "No space left on device")

    def on_progress(self, job: Job, progress: Mapping[str, Any]) -> None:
        self.reports.append((job.key, progress))

    def state(self, key: str) -> str:
        return next((outcome.state for name, outcome in self.outcomes if name == key), "")


class House:
    """A queue, a dispatcher and what was heard."""

    def __init__(self, folder: Path, lanes: Mapping[str, int], kinds: Mapping[str, Kind], **changes: Any) -> None:
        self.folder = folder
        self.queue = Queue(folder / "queue.db", kinds, jitter=lambda: 0.01)
        self.hooks = Recorder()
        self.hooks.queue = self.queue
        devices, clock = changes.pop("devices", ()), changes.pop("clock", time.time)
        settings = WorkerSettings(folder / "cache", folder / "logs", ENVIRONMENT, **changes)
        self.dispatcher = Dispatcher(self.queue, lanes, settings, self.hooks, kinds=kinds, devices=devices, clock=clock)
        self.never = str(folder / "never")

    def put(self, *keys: str, kind: str = "probe", session: str = "s", **payload: Any) -> None:
        self.queue.put([JobRequest(key, kind, session, f"{key}.jpg", payload) for key in keys], time.time())
        self.dispatcher.wake()

    def wait_for_file(self, *keys: str, kind: str = "probe", session: str = "s") -> None:
        self.put(*keys, kind=kind, session=session, do="wait_for_file", file=self.never)

    def row(self, key: str) -> Job:
        job = self.queue.by_key(key)
        assert job is not None
        return job

    async def until(self, condition: Callable[[], object], seconds: float = 20.0) -> None:
        async with asyncio.timeout(seconds):
            while not condition():  # noqa: ASYNC110 - the conditions lie in files, rows and other processes
                await asyncio.sleep(0.002)

    async def ended(self, *keys: str) -> None:
        states = {"done", "failed", "refused", "cancelled"}
        await self.until(lambda: all(self.row(key).state in states for key in keys))

    async def works(self, *keys: str) -> None:
        """Wait until the handlers of these jobs really run."""
        await self.until(lambda: set(keys) <= {key for key, _ in self.hooks.reports})


@asynccontextmanager
async def house(
    folder: Path, lanes: Mapping[str, int] | None = None, kinds: Mapping[str, Kind] = KINDS, **changes: Any
) -> AsyncGenerator[House]:
    made = House(folder, lanes or {"cpu": 1, "gpu": 1}, kinds, **changes)
    running = asyncio.create_task(made.dispatcher.run())
    try:
        async with asyncio.timeout(60):
            yield made
    finally:
        await made.dispatcher.stop(2)
        await running
        made.queue.close()


@pytest.fixture(autouse=True)
def _no_worker_is_left() -> Any:
    yield
    listed = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())], capture_output=True, check=False)
    assert b"handlers.worker" not in listed.stdout


def test_jobs_run_and_their_outcome_is_told_before_their_row_ends(tmp_path: Path) -> None:
    async def main() -> None:
        async with house(tmp_path) as it:
            it.put("a", "b", x=1)
            it.put("t", kind="train")
            await it.ended("a", "b", "t")
            assert [it.row(key).state for key in "abt"] == ["done"] * 3
            assert it.hooks.states_at_outcome == ["running"] * 3
            first, second = (outcome for key, outcome in it.hooks.outcomes if key in "ab")
            assert (first.facts["run"], second.facts["run"]) == (1, 2)
            assert first.facts["payload"] == {"x": 1}
            assert first.facts["pid"] == second.facts["pid"]
            assert sorted(set(it.hooks.made_room)) == ["probe", "train"]

    asyncio.run(main())


def test_a_job_starts_within_milliseconds_in_a_warm_worker(tmp_path: Path) -> None:
    async def main() -> list[float]:
        async with house(tmp_path) as it:
            it.put("warm")
            await it.ended("warm")
            delays = []
            for number in range(15):
                begun = tmp_path / f"begun{number}"
                put_at = time.time()
                it.put(f"job{number}", begun=str(begun))
                await it.ended(f"job{number}")
                delays.append(begun.stat().st_mtime - put_at)
            return delays

    assert statistics.median(asyncio.run(main())) < 0.1


def test_a_wake_from_another_thread_is_heard(tmp_path: Path) -> None:
    async def main() -> None:
        async with house(tmp_path) as it:
            await asyncio.sleep(0)  # it sleeps now
            await asyncio.to_thread(it.put, "a")
            await it.ended("a")

    asyncio.run(main())


def test_a_slot_changes_its_worker_with_the_kind_and_ends_it_when_idle(tmp_path: Path) -> None:
    async def main() -> None:
        async with house(tmp_path, idle_seconds=0.3) as it:
            it.put("a")
            await it.ended("a")
            it.put("o", kind="other")
            await it.ended("o")
            it.put("b")
            await it.ended("b")
            pids = [outcome.facts["pid"] for _, outcome in it.hooks.outcomes]
            assert len(set(pids)) == 3
            await it.until(lambda: not any(alive(pid) for pid in pids))

    asyncio.run(main())


def test_a_warm_slot_is_preferred_and_lanes_run_side_by_side(tmp_path: Path) -> None:
    async def main() -> None:
        async with house(tmp_path, {"cpu": 2, "gpu": 1}) as it:
            it.put("a")
            it.put("o", kind="other")
            await it.ended("a", "o")
            for number in range(4):
                it.put(f"a{number}")
                await it.ended(f"a{number}")
            # Not one was started in the place of the other.
            assert len({outcome.facts["pid"] for _, outcome in it.hooks.outcomes}) == 2
            it.wait_for_file("x", "y")
            it.wait_for_file("z", kind="train")
            await it.works("x", "y", "z")
            assert {entry.slot.name for entry in it.dispatcher.running} == {"cpu-0", "cpu-1", "gpu-0"}

    asyncio.run(main())


def test_gpu_slots_get_the_devices(tmp_path: Path) -> None:
    async def main() -> None:
        async with house(tmp_path, {"cpu": 1, "gpu": 2}, devices=["cuda:0"]) as it:
            it.put("c")
            it.put("t", "u", kind="train")
            await it.ended("c", "t", "u")
            devices = {key: outcome.facts["device"] for key, outcome in it.hooks.outcomes}
            assert devices["c"] == "cpu"
            assert sorted([devices["t"], devices["u"]]) == ["cpu", "cuda:0"]

    asyncio.run(main())


def test_batches_are_shared_out_among_the_free_slots(tmp_path: Path) -> None:
    async def main() -> None:
        async with house(tmp_path, {"cpu": 2}) as it:
            it.put(*"abcdef", kind="batch")
            await it.ended(*"abcdef")
            assert sorted(outcome.facts["batch"] for _, outcome in it.hooks.outcomes) == [3] * 6
        async with house(tmp_path / "one", {"cpu": 1}) as it:
            it.put(*"abcdef", kind="batch")
            await it.ended(*"abcdef")
            assert sorted(outcome.facts["batch"] for _, outcome in it.hooks.outcomes) == [2, 2, 4, 4, 4, 4]

    asyncio.run(main())


def test_a_job_waits_for_company_but_not_for_ever(tmp_path: Path) -> None:
    ahead = 0.0
    kinds = {
        "batch": kind("batch", handler="BatchProbe", batch=4, gather=50.0, priority=10),
        "probe": kind("probe", priority=20),
    }

    async def main() -> None:
        nonlocal ahead
        async with house(tmp_path, {"cpu": 1}, kinds, clock=lambda: time.time() + ahead) as it:
            it.put("a", kind="batch")
            it.put("later")
            it.put(*"bcd", kind="batch")
            await it.ended(*"abcd", "later")
            facts = {key: outcome.facts for key, outcome in it.hooks.outcomes}
            # The first one waited for the others, and nothing of less priority came between.
            assert [facts[key]["batch"] for key in "abcd"] == [4] * 4
            assert [key for key, _ in it.hooks.outcomes][-1] == "later"
            # Nobody comes: a quarter of the time is enough.
            it.put("e", kind="batch")
            ahead = 13.0
            it.dispatcher.wake()
            await it.ended("e")
            assert it.hooks.outcomes[-1][1].facts["batch"] == 1

    asyncio.run(main())


def test_one_job_that_crashes_its_batch_takes_nobody_with_it_for_good(tmp_path: Path) -> None:
    async def main() -> None:
        async with house(tmp_path) as it:
            it.queue.put(
                [JobRequest(key, "batch", payload={"crash": key == "b"}) for key in "abcd"],
                time.time(),
            )
            it.dispatcher.wake()
            await it.ended(*"abcd")
            assert [it.row(key).state for key in "abcd"] == ["done", "failed", "done", "done"]
            assert it.row("b").attempts == 3
            assert "signal 9" in it.row("b").problem["message"]

    asyncio.run(main())


def test_failures_are_tried_again(tmp_path: Path) -> None:
    async def main() -> None:
        async with house(tmp_path) as it:
            it.put("a", do="fail_first", file=str(tmp_path / "count"), failures=1)
            it.put("b", do="fail")
            await it.ended("a", "b")
            assert (it.row("a").state, it.row("a").problem) == ("done", {})
            assert it.row("b").state == "failed"
            assert it.row("b").problem["message"] == "as the test wants"
            assert [outcome.state for key, outcome in it.hooks.outcomes if key == "b"] == ["failed", "failed"]

    asyncio.run(main())


def test_what_prepare_says(tmp_path: Path) -> None:
    async def main() -> None:
        async with house(tmp_path) as it:
            for what in ("gone", "refuse", "wait", "crash"):
                it.put(what, prepare=what)
            await it.ended("refuse", "crash")
            await it.until(lambda: it.queue.by_key("gone") is None and it.row("wait").state == "waiting")
            assert it.row("crash").problem["type"] == "ZeroDivisionError"
            assert it.row("wait").run_at == pytest.approx(time.time() + 50, abs=10)
            assert not (tmp_path / "logs").exists()  # no worker was bothered

    asyncio.run(main())


def test_where_no_room_can_be_made_the_job_waits(tmp_path: Path) -> None:
    async def main() -> None:
        async with house(tmp_path) as it:
            it.hooks.no_room = True
            it.put("t", kind="train")
            await it.until(lambda: it.row("t").state == "waiting")
            assert it.row("t").problem == {"reason": "The WebUI does not stop.", "retry_after": 20}
            it.hooks.no_room = False
            it.dispatcher.retry([it.row("t").id])
            await it.ended("t")
            assert it.row("t").state == "done"

    asyncio.run(main())


def test_where_no_worker_can_be_started_the_job_waits(tmp_path: Path) -> None:
    async def main() -> None:
        (tmp_path / "logs").write_text("a file where a folder should be", encoding="ascii")
        async with house(tmp_path) as it:
            it.put("a")
            await it.until(lambda: it.row("a").state == "waiting")
            assert "No worker could be started" in it.row("a").problem["reason"]

    asyncio.run(main())


def test_an_outcome_that_cannot_be_recorded_is_not_the_end_of_the_job(tmp_path: Path) -> None:
    async def main() -> None:
        async with house(tmp_path) as it:
            it.put("a", disk="full")
            await it.until(lambda: it.row("a").state == "waiting")
            assert "No space left" in it.row("a").problem["reason"]
            it.dispatcher.retry()
            await it.ended("a")
            assert it.row("a").state == "done"

    asyncio.run(main())


def test_a_gate_holds_its_kind_back_and_no_other(tmp_path: Path) -> None:
    async def main() -> None:
        async with house(tmp_path) as it:
            it.hooks.shut.add("probe")
            it.put("a")
            it.put("o", kind="other")
            await it.ended("o")
            assert it.row("a").state == "ready"
            it.hooks.shut.clear()  # nobody tells the dispatcher
            await it.ended("a")

    asyncio.run(main())


def test_pause_and_resume(tmp_path: Path) -> None:
    async def main() -> None:
        async with house(tmp_path) as it:
            it.dispatcher.pause(["gpu"])
            it.put("t", kind="train")
            it.put("a")
            await it.ended("a")
            assert (it.row("t").state, it.dispatcher.paused) == ("ready", frozenset({"gpu"}))
            it.dispatcher.pause()
            it.put("b")
            it.dispatcher.resume(["gpu"])
            await it.ended("t")
            assert it.row("b").state == "ready"
            it.dispatcher.resume()
            await it.ended("b")

    asyncio.run(main())


def test_a_lane_can_be_taken_back(tmp_path: Path) -> None:
    async def main() -> None:
        async with house(tmp_path) as it:
            it.wait_for_file("t", kind="train")
            await it.works("t")
            it.dispatcher.pause(["gpu"])
            it.dispatcher.take_back("gpu")
            await it.until(lambda: not it.dispatcher.running)
            assert (it.row("t").state, it.row("t").attempts) == ("ready", 0)
            (tmp_path / "never").touch()
            it.dispatcher.resume()
            await it.ended("t")
            assert it.row("t").state == "done"

    asyncio.run(main())


def test_cancel_where_it_waits_and_where_it_runs(tmp_path: Path) -> None:
    async def main() -> None:
        async with house(tmp_path) as it:
            it.wait_for_file("running", "ready")
            await it.works("running")
            assert it.dispatcher.cancel(it.row("ready").id)
            assert it.row("ready").state == "cancelled"
            assert it.dispatcher.cancel(it.row("running").id)
            await it.ended("running")
            assert it.row("running").state == it.hooks.state("running") == "cancelled"
            assert not it.dispatcher.cancel(it.row("running").id)
            # The worker is still good.
            it.put("next")
            await it.ended("next")

    asyncio.run(main())


def test_a_deaf_job_that_is_cancelled_is_killed(tmp_path: Path) -> None:
    async def main() -> None:
        async with house(tmp_path, cancel_seconds=0.2) as it:
            begun = tmp_path / "begun"
            it.put("a", do="deaf", file=it.never, begun=str(begun))
            await it.until(begun.exists)
            it.dispatcher.cancel(it.row("a").id)
            await it.ended("a")
            assert it.row("a").state == "cancelled"
            it.put("b")
            await it.ended("b")
            assert it.row("b").state == "done"

    asyncio.run(main())


def test_a_job_that_ends_before_it_hears_of_its_cancelling_is_done(tmp_path: Path) -> None:
    async def main() -> None:
        async with house(tmp_path) as it:
            begun = tmp_path / "begun"
            it.put("a", do="finish_anyway", begun=str(begun))
            await it.until(begun.exists)
            it.dispatcher.cancel(it.row("a").id)
            await it.ended("a")
            assert it.row("a").state == "done"

    asyncio.run(main())


def test_a_session_that_goes_takes_its_jobs_along(tmp_path: Path) -> None:
    async def main() -> None:
        async with house(tmp_path) as it:
            it.wait_for_file("running", "ready", session="gone")
            await it.works("running")
            it.put("stays", session="s")
            it.dispatcher.drop_session("gone")
            await it.ended("stays")
            assert {job.key for job in it.queue.jobs()} == {"stays"}
            assert it.hooks.state("running") == ""

    asyncio.run(main())


def test_stop_gives_back_what_runs(tmp_path: Path) -> None:
    async def main() -> None:
        async with house(tmp_path) as it:
            it.wait_for_file("a", "b")
            await it.works("a")
            started = time.monotonic()
            await it.dispatcher.stop(10)
            assert time.monotonic() - started < 5
            assert [(it.row(key).state, it.row(key).attempts) for key in "ab"] == [("ready", 0)] * 2

    asyncio.run(main())


@pytest.mark.parametrize("twice", [True, False])
def test_stop_kills_the_deaf_after_the_grace_or_when_told_twice(tmp_path: Path, *, twice: bool) -> None:
    async def main() -> None:
        async with house(tmp_path) as it:
            begun = tmp_path / "begun"
            it.put("a", do="deaf", file=it.never, begun=str(begun))
            await it.until(lambda: begun.exists() and begun.read_text(encoding="ascii"))
            first = asyncio.create_task(it.dispatcher.stop(30 if twice else 0.3))
            if twice:
                await asyncio.sleep(0)
                await it.dispatcher.stop(30)
            await first
            assert not alive(int(begun.read_text(encoding="ascii")))
            assert (it.row("a").state, it.row("a").attempts) == ("ready", 0)

    asyncio.run(main())


def test_a_worker_that_was_killed_while_idle_is_replaced(tmp_path: Path) -> None:
    async def main() -> None:
        async with house(tmp_path) as it:
            it.put("a")
            await it.ended("a")
            pid = it.hooks.outcomes[0][1].facts["pid"]
            os.kill(pid, signal.SIGKILL)
            await it.until(lambda: not alive(pid))
            await it.until(lambda: it.dispatcher._lanes["cpu"][0].warm_kind is None)
            it.put("b")
            await it.ended("b")
            assert (it.row("b").state, it.row("b").attempts) == ("done", 1)

    asyncio.run(main())


def test_progress_reaches_the_hooks_and_the_file(tmp_path: Path) -> None:
    async def main() -> None:
        async with house(tmp_path) as it:
            it.wait_for_file("a")
            await it.until(lambda: it.row("a").progress)
            expected = {"done": 1, "total": 2, "note": "waiting", "facts": {}}
            assert it.row("a").progress == it.hooks.reports[0][1] == expected
            (entry,) = it.dispatcher.running
            assert entry.progress == expected
            assert entry.slot.resident_bytes > 1 << 20

    asyncio.run(main())


def test_a_kind_that_lacks_something_is_not_asked_for_each_job(tmp_path: Path) -> None:
    async def main() -> None:
        async with house(tmp_path) as it:
            keys = [f"job{number}" for number in range(50)]
            it.put(*keys, do="lack", retry_after=40.0)
            await it.until(lambda: it.queue.counts()["probe"] == {"waiting": 50})
            assert len(it.hooks.outcomes) == 3
            assert "fastsd models get" in it.row("job49").problem["reason"]
            assert it.dispatcher.held() == {"probe": it.row("job49").problem["reason"]}
            # A late one waits with them; other kinds go on; a retry tries again.
            it.put("late", do="lack", retry_after=40.0)
            it.put("o", kind="other")
            await it.ended("o")
            await it.until(lambda: it.row("late").state == "waiting")
            assert len(it.hooks.outcomes) == 4
            it.dispatcher.retry()
            await it.until(lambda: it.queue.counts()["probe"] == {"waiting": 51})
            assert len(it.hooks.outcomes) == 7

    asyncio.run(main())


def test_a_held_kind_goes_on_when_a_try_succeeds(tmp_path: Path) -> None:
    async def main() -> None:
        async with house(tmp_path) as it:
            it.put("w1", "w2", "w3", do="lack", retry_after=1.0)
            it.put("a", "b", "c")
            await it.ended("a", "b", "c")
            assert {it.row(key).state for key in "abc"} == {"done"}
            assert it.dispatcher.held() == {}

    asyncio.run(main())


def test_a_machine_that_slept_does_not_run_its_jobs_twice(tmp_path: Path) -> None:
    async def main() -> None:
        slept = [0.0]
        async with house(tmp_path, {"cpu": 2}, clock=lambda: time.time() + slept[0]) as it:
            it.wait_for_file("a")
            await it.works("a")
            slept[0] = 10_000.0
            it.put("b")
            await it.ended("b")
            assert [entry.job.key for entry in it.dispatcher.running] == ["a"]
            (tmp_path / "never").touch()
            await it.ended("a")
            assert [key for key, _ in it.hooks.outcomes] == ["b", "a"]
            assert it.row("a").state == "done"

    asyncio.run(main())


DAEMON = """
import asyncio, json, os, sys
from pathlib import Path
from daemon.dispatch import Dispatcher
from daemon.ledger import Hooks
from daemon.queue import Queue
from daemon.slots import WorkerSettings
from tests.probes import ENVIRONMENT, KINDS

folder = Path(sys.argv[1])

class Tree(Hooks):
    def manifest(self):
        file = folder / "manifest"
        return file.read_text().splitlines() if file.exists() else []

    async def prepare(self, job):
        return None if job.key in self.manifest() else job.payload

    async def on_outcome(self, job, outcome):
        if outcome.state == "done":
            with (folder / "manifest").open("a") as file:
                file.write(job.key + "\\n")
                file.flush()
                os.fsync(file.fileno())

async def main():
    queue = Queue(folder / "queue.db", KINDS, jitter=lambda: 0.01)
    settings = WorkerSettings(folder / "cache", folder / "logs", ENVIRONMENT, mark=str(folder))
    dispatcher = Dispatcher(queue, {"cpu": 2, "gpu": 1}, settings, Tree(), kinds=KINDS)
    running = asyncio.create_task(dispatcher.run())
    while queue.next_run_at() is not None or dispatcher.running:
        await asyncio.sleep(0.02)
    await dispatcher.stop(5)
    await running

asyncio.run(main())
"""


def test_kill_9_again_and_again_loses_nothing_and_does_nothing_twice(tmp_path: Path) -> None:
    names = [f"job{number}" for number in range(200)]
    chance = random.Random(7)
    with Queue(tmp_path / "queue.db", KINDS) as queue:
        requests = [
            JobRequest(
                *(name, "train" if index % 3 == 0 else "probe", "s", name),
                payload={"do": "once", "folder": str(tmp_path), "name": name, "seconds": 0.01},
            )
            for index, name in enumerate(names)
        ]
        queue.put(requests, 1.0)
    starts_file = tmp_path / "starts"
    for kill in range(9):
        process = subprocess.Popen(
            [sys.executable, "-c", DAEMON, str(tmp_path)], env=ENVIRONMENT, start_new_session=True, cwd=ROOT
        )
        if kill == 8:
            assert process.wait(120) == 0
            break
        # Once it works, at any moment: between two jobs, in one, between an outcome and the end of its row.
        enough = _lines(starts_file) + chance.randint(3, 15)
        until(partial(_has_lines, starts_file, enough))
        time.sleep(chance.random() * 0.03)
        workers = _children(process.pid)
        assert workers
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for worker in workers:
            until(partial(_gone, worker), 10)
    reader = open_reader(tmp_path / "queue.db")
    assert reader is not None
    with reader:
        left = [job for job in reader.jobs() if job.state != "done"]
    assert left == []
    manifest = (tmp_path / "manifest").read_text(encoding="ascii").splitlines()
    assert sorted(manifest) == sorted(names)  # each once, none missing
    starts = [json.loads(line) for line in starts_file.read_text(encoding="ascii").splitlines()]
    assert {name for name, _ in starts} == set(names)
    assert not (tmp_path / "overlap").exists()


def _children(pid: int) -> set[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return {int(line) for line in listed.stdout.split()}


def _gone(pid: int) -> bool:
    return not alive(pid)


def _has_lines(file: Path, number: int) -> bool:
    return _lines(file) >= number


def _lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0
