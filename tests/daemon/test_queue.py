"""The queue against a model of it: no key twice, no job lost, and only the lease's holder ends a job."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, MultipleResults, RuleBasedStateMachine, invariant, multiple, precondition, rule

from daemon.jobs import ENDED, Job, JobRequest, job_key
from daemon.queue import INTERRUPTIONS_ALLOWED, LeaseLost, Queue, backoff
from daemon.queue_file import open_reader
from handlers.kinds import Kind
from sessions.refusal import Refusal
from tests.probes import ROOT

KINDS = {
    kind.name: kind
    for kind in (
        Kind("crop", "a:B", "cpu", batch=4, attempts=3, priority=10),
        Kind("convert", "a:B", "cpu", attempts=2, priority=20),
        Kind("train", "a:B", "gpu", attempts=2, priority=30),
    )
}
LEASE = 60.0


def make(folder: Path) -> Queue:
    return Queue(folder / "queue.db", KINDS, jitter=lambda: 1.0)


def request(name: str, kind: str = "crop", **changes: object) -> JobRequest:
    return JobRequest(**{"key": name, "kind": kind, "session": "s", "subject": f"{name}.jpg", **changes})  # type: ignore[arg-type]


def claim_one(queue: Queue, now: float, kind: str = "crop") -> Job:
    (job,) = queue.claim(KINDS[kind].lane, [kind], 1, now, LEASE)
    return job


# Keys


def test_a_key_is_made_of_content_and_parameters_whatever_their_order() -> None:
    key = job_key("crop", "content", {"a": 1, "b": [2, "ü\udcff"]})
    assert key == job_key("crop", "content", {"b": [2, "ü\udcff"], "a": 1})
    assert (
        len({key, job_key("caption", "content", {}), job_key("crop", "other", {}), job_key("crop", "content", {})}) == 4
    )
    assert len(key) == 64


def test_a_key_stands_once_and_comes_again_only_when_asked(tmp_path: Path) -> None:
    with make(tmp_path) as queue:
        assert queue.put([request("a"), request("a"), request("b")], 0) == ["a", "b"]
        assert queue.put([request("a")], 0, again=True) == []
        job = claim_one(queue, 1)
        assert queue.put([request(job.key)], 1, again=True) == []
        queue.done(job, 2)
        assert queue.put([request(job.key)], 3) == []
        assert queue.put([request(job.key, payload={"x": 1})], 3, again=True) == [job.key]
        again = queue.by_key(job.key)
        assert again is not None
        assert (again.state, again.attempts, again.payload, again.ended) == ("ready", 0, {"x": 1}, None)


def test_an_unknown_kind_queues_nothing(tmp_path: Path) -> None:
    with make(tmp_path) as queue:
        with pytest.raises(KeyError):
            queue.put([request("a"), request("b", kind="unknown")], 0)
        assert queue.jobs() == []


def test_names_that_are_no_utf8_survive(tmp_path: Path) -> None:
    with make(tmp_path) as queue:
        queue.put([request("a", subject="caf\udce9.jpg", payload={"source": "/x/\udcff"})], 0)
        job = claim_one(queue, 1)
        assert (job.subject, job.payload) == ("caf\udce9.jpg", {"source": "/x/\udcff"})


def test_twenty_thousand_jobs_are_queued_at_once(tmp_path: Path) -> None:
    with make(tmp_path) as queue:
        requests = [request(job_key("crop", str(number), {})) for number in range(20_000)]
        assert len(queue.put(requests, 0)) == 20_000
        for now in range(50):
            for job in queue.claim("cpu", ["crop", "convert"], 8, now, LEASE):
                queue.done(job, now)
        assert queue.counts() == {"crop": {"ready": 19_600, "done": 400}}


# The order of the hand-out


def test_priority_then_time_then_number_and_one_kind_a_claim(tmp_path: Path) -> None:
    with make(tmp_path) as queue:
        queue.put(
            [request("late", run_at=5), request("x", "convert"), request("a", run_at=2), request("b", run_at=2)], 1
        )
        queue.put([request("first", "convert", priority=1)], 3)
        order = []
        while jobs := queue.claim("cpu", ["crop", "convert"], 2, 9, LEASE):
            order.append([job.key for job in jobs])
        # "x" is older, but its kind has less priority than "crop"; both of its kind go together when its turn comes
        assert order == [["first", "x"], ["a", "b"], ["late"]]


def test_only_the_asked_kinds_and_lane_and_what_is_due(tmp_path: Path) -> None:
    with make(tmp_path) as queue:
        queue.put([request("t", "train"), request("c", "convert"), request("later", run_at=50)], 1)
        assert queue.claim("cpu", ["crop"], 9, 10, LEASE) == []
        assert queue.claim("cpu", [], 9, 10, LEASE) == []
        assert queue.due("cpu", ["crop", "convert"], 10, 5) == ("convert", 1)
        assert queue.due("cpu", ["crop"], 10, 5) is None
        assert queue.next_run_at() == 1
        assert queue.next_run_at(["crop"]) == 50
        assert queue.next_run_at(after=1) == 50
        assert queue.next_run_at([]) is None
        assert [job.key for job in queue.claim("gpu", ["train", "crop"], 9, 10, LEASE)] == ["t"]


def test_a_job_that_failed_goes_alone(tmp_path: Path) -> None:
    with make(tmp_path) as queue:
        queue.put([request(name) for name in "abc"], 0)
        jobs = queue.claim("cpu", ["crop"], 4, 1, LEASE)
        for job in jobs:
            queue.fail(job, {"type": "WorkerDied"}, 1)
        queue.put([request("d", run_at=2), request("e", run_at=2)], 2)
        batches = []
        while found := queue.claim("cpu", ["crop"], 4, 9, LEASE):
            batches.append("".join(job.key for job in found))
        assert batches == ["de", "a", "b", "c"]


# Ends


def test_failures_come_again_later_and_later_until_they_are_used_up(tmp_path: Path) -> None:
    assert [backoff(attempts) for attempts in (1, 2, 3, 4, 5, 6, 99)] == [2, 8, 32, 128, 512, 600, 600]
    with make(tmp_path) as queue:
        queue.put([request("a")], 0)
        now = 0.0
        for attempt, pause in ((1, 2), (2, 8)):
            job = claim_one(queue, now)
            assert (job.attempts, job.last_attempt) == (attempt, False)
            queue.fail(job, {"message": f"error {attempt}"}, now)
            assert queue.claim("cpu", ["crop"], 1, now + pause - 0.1) == []
            now += pause
        job = claim_one(queue, now)
        assert job.last_attempt
        queue.fail(job, {"message": "the last error"}, now)
        (failed,) = queue.jobs(["failed"])
        assert failed.problem == {"message": "the last error"}
        assert queue.claim("cpu", ["crop"], 1, now + 1e6) == []
        assert queue.retry(None, now) == [failed.id]
        assert claim_one(queue, now).attempts == 1


def test_waiting_and_giving_back_are_no_attempts(tmp_path: Path) -> None:
    with make(tmp_path) as queue:
        queue.put([request("a")], 0)
        for now in range(0, 100, 10):
            job = claim_one(queue, now)
            assert job.attempts == 1
            if now % 20:
                queue.wait(job, "The WebUI is absent.", 10, now)
                (waiting,) = queue.jobs(["waiting"])
                assert waiting.problem == {"reason": "The WebUI is absent.", "retry_after": 10}
                assert queue.claim("cpu", ["crop"], 1, now + 9) == []
            else:
                queue.give_back(job)


def test_what_is_unfinished_and_what_only_waits(tmp_path: Path) -> None:
    with make(tmp_path) as queue:
        queue.put([request(name) for name in "abc"] + [request("later", run_at=100)], 0)
        a, b = queue.claim("cpu", ["crop"], 2, 1, LEASE)
        queue.wait(a, "because", 5, 1)
        assert [queue.unfinished(before) for before in (0.5, 50, 100)] == [2, 2, 3]
        queue.done(b, 2)
        assert queue.unfinished(50) == 1


def test_a_refused_job_keeps_its_reason_and_its_place(tmp_path: Path) -> None:
    refusal = Refusal("corrupt", "The picture is cut off.", "Upload it again.", line=2)
    with make(tmp_path) as queue:
        queue.put([request("a")], 0)
        queue.refuse(claim_one(queue, 1), refusal, 2)
        (job,) = queue.jobs(["refused"], session="s")
        assert Refusal.from_json(dict(job.problem)).to_json() == refusal.to_json()
        assert queue.put([request("a")], 3) == []
        assert queue.forget(["a", "unknown"]) == 1
        assert queue.put([request("a")], 3) == ["a"]


def test_a_lost_lease_ends_nothing(tmp_path: Path) -> None:
    with make(tmp_path) as queue:
        queue.put([request("a")], 0)
        first = claim_one(queue, 0)
        assert queue.heartbeat([first], 50, LEASE) == []
        assert queue.claim("cpu", ["crop"], 1, 109) == []
        second = claim_one(queue, 110)
        assert (second.id, second.attempts) == (first.id, 2)
        assert queue.heartbeat([first, second], 120, LEASE) == [first]
        for end in (queue.give_back, queue.drop, lambda job: queue.done(job, 1), lambda job: queue.fail(job, {}, 1)):
            with pytest.raises(LeaseLost):
                end(first)
        queue.progress([(first, {"done": 1}), (second, {"done": 2})])
        running = queue.job(first.id)
        assert running is not None
        assert running.progress == {"done": 2}
        queue.done(second, 130)
        with pytest.raises(LeaseLost):
            queue.done(second, 131)


def test_a_job_that_always_loses_its_lease_fails_in_the_end(tmp_path: Path) -> None:
    with make(tmp_path) as queue:
        queue.put([request("a")], 0)
        now = 0.0
        while queue.claim("cpu", ["crop"], 1, now, LEASE):
            now += 2 * LEASE
        (job,) = queue.jobs()
        assert (job.state, job.attempts) == ("failed", 3)
        assert "nothing was heard" in job.problem["message"]


def test_a_dead_daemon_is_no_attempt_but_not_for_ever(tmp_path: Path) -> None:
    starts = 0
    with make(tmp_path) as queue:
        queue.put([request("a")], 0)
        while queue.claim("cpu", ["crop"], 1, starts, LEASE):
            starts += 1
            assert starts < 100
            queue.release_all(starts)
        (job,) = queue.jobs()
        assert job.state == "failed"
        assert "ended 20 times or more" in job.problem["message"]
    # Each of the last three is an attempt.
    assert starts == INTERRUPTIONS_ALLOWED - 1 + KINDS["crop"].attempts


# What people do


def test_cancel_and_retry(tmp_path: Path) -> None:
    with make(tmp_path) as queue:
        queue.put([request("a"), request("b")], 0)
        running = claim_one(queue, 0)
        (ready,) = queue.jobs(["ready"])
        assert not queue.cancel(running.id, 1)
        assert queue.cancel(ready.id, 1)
        assert not queue.cancel(ready.id, 1)
        queue.end_cancelled(running, 1)
        assert queue.counts() == {"crop": {"cancelled": 2}}
        assert queue.retry([ready.id], 2) == [ready.id]
        assert queue.counts_by_session() == {"s": {"cancelled": 1, "ready": 1}}


def test_a_session_that_is_gone_leaves_only_what_runs(tmp_path: Path) -> None:
    with make(tmp_path) as queue:
        queue.put([request("a"), request("b"), request("other", session="t")], 0)
        running = claim_one(queue, 0)
        assert queue.drop_session("s") == [running.id]
        assert {job.key for job in queue.jobs()} == {running.key, "other"}
        assert queue.forget([running.key]) == 0
        queue.drop(running)
        assert queue.counts("s") == {}


def test_a_kind_can_wait_as_a_whole(tmp_path: Path) -> None:
    with make(tmp_path) as queue:
        queue.put([request("a"), request("b"), request("later", run_at=90), request("x", "convert")], 0)
        assert queue.postpone("crop", "The weights are missing.", 30, 1) == 2
        assert queue.postpone("crop", "The weights are missing.", 30, 1) == 0
        assert queue.counts() == {"crop": {"waiting": 2, "ready": 1}, "convert": {"ready": 1}}
        assert {job.problem["reason"] for job in queue.jobs(["waiting"])} == {"The weights are missing."}


def test_old_ends_are_pruned(tmp_path: Path) -> None:
    with make(tmp_path) as queue:
        queue.put([request(name) for name in "abcd"], 0)
        a, b, c = queue.claim("cpu", ["crop"], 3, 0, LEASE)
        queue.done(a, 10)
        queue.done(b, 20)
        queue.refuse(c, Refusal("x", "y", "z"), 5)
        assert queue.prune(15) == 1
        assert {job.key for job in queue.jobs()} == {"b", "c", "d"}
        assert queue.prune(1e9, ["ready", "refused"]) == 1


# The file


def test_looking_without_a_daemon(tmp_path: Path) -> None:
    path = tmp_path / "state" / "queue.db"
    assert open_reader(path) is None
    script = (
        "import os, sys; from pathlib import Path; from daemon.queue import Queue; from daemon.jobs import JobRequest\n"
        "Queue(Path(sys.argv[1])).put([JobRequest('a', 'crop', 's', 'a.jpg')], 1.0); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", script, os.fspath(path)], cwd=ROOT, check=False)
    assert path.with_name("queue.db-wal").stat().st_size > 0
    reader = open_reader(path)
    assert reader is not None
    with reader:
        assert [job.to_json()["subject"] for job in reader.jobs()] == ["a.jpg"]
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            reader._connection.execute("DELETE FROM job")
    with Queue(path, KINDS) as queue:
        assert queue.counts() == {"crop": {"ready": 1}}


def test_looking_at_something_else_finds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "queue.db"
    for content in (b"", b"this is no database" * 100):
        path.write_bytes(content)
        assert open_reader(path) is None


def test_looking_beside_a_daemon_sees_what_it_wrote(tmp_path: Path) -> None:
    with make(tmp_path) as queue:
        queue.put([request("a")], 0)
        reader = open_reader(tmp_path / "queue.db")
        assert reader is not None
        with reader:
            claim_one(queue, 0)
            assert reader.counts() == {"crop": {"running": 1}}


@pytest.mark.parametrize("content", [b"this is no database" * 100, "version"])
def test_a_file_that_is_no_queue_of_this_version_is_set_aside(tmp_path: Path, content: bytes | str) -> None:
    path = tmp_path / "queue.db"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        connection = sqlite3.connect(path)
        connection.execute("PRAGMA user_version=99")
        connection.close()
    with make(tmp_path) as queue:
        assert queue.put([request("a")], 0) == ["a"]
    assert (tmp_path / "queue.db.broken").exists()


def test_every_commit_is_synced(tmp_path: Path) -> None:
    with make(tmp_path) as queue:
        assert queue._connection.execute("PRAGMA synchronous").fetchone()[0] == 2
        assert queue._connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"


# The model


@dataclass
class Expected:
    """A row as the model knows it."""

    kind: str
    state: str = "ready"
    attempts: int = 0
    interruptions: int = 0
    run_at: float = 0.0
    lease_until: float = 0.0
    token: str | None = None


class QueueMachine(RuleBasedStateMachine):
    """Random work on the queue, with a clock of its own, next to a dictionary that says what must come of it."""

    claims: Bundle[Job] = Bundle("claims")

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.queue = make(Path(self.folder.name))
        self.now = 1000.0
        self.rows: dict[str, Expected] = {}

    def teardown(self) -> None:
        self.queue.close()
        self.folder.cleanup()

    keys = st.sampled_from("abcdefgh")

    @rule(seconds=st.sampled_from([0.5, 3.0, 40.0, 70.0, 700.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(keys=st.lists(keys, max_size=5), kind=st.sampled_from(sorted(KINDS)), again=st.booleans())
    def put(self, keys: list[str], kind: str, *, again: bool) -> None:
        new = []
        for key in keys:
            row = self.rows.get(key)
            if row is None or (again and row.state in ENDED):
                self.rows[key] = Expected(kind, run_at=self.now)
                new.append(key)
        assert self.queue.put([request(key, kind) for key in keys], self.now, again=again) == new

    @rule(
        target=claims,
        lane=st.sampled_from(["cpu", "gpu"]),
        kinds=st.lists(st.sampled_from(sorted(KINDS)), unique=True),
        limit=st.integers(1, 3),
    )
    def claim(self, lane: str, kinds: list[str], limit: int) -> Job | MultipleResults[Job]:
        for row in self.rows.values():
            lost = row.state == "running" and row.lease_until <= self.now
            if lost and row.attempts >= KINDS[row.kind].attempts:
                row.state, row.token = "failed", None
        due = {
            key: row
            for key, row in self.rows.items()
            if KINDS[row.kind].lane == lane
            and row.kind in kinds
            and (
                (row.state in {"ready", "waiting"} and row.run_at <= self.now)
                or (row.state == "running" and row.lease_until <= self.now)
            )
        }
        jobs = self.queue.claim(lane, kinds, limit, self.now, LEASE)
        assert bool(jobs) == bool(due)
        assert len({job.kind for job in jobs}) <= 1
        assert len(jobs) <= limit
        best = min((KINDS[row.kind].priority, row.run_at) for row in due.values()) if due else None
        for index, job in enumerate(jobs):
            row = due.pop(job.key)
            if index == 0:
                assert (KINDS[row.kind].priority, row.run_at) == best
            assert len(jobs) == 1 or row.attempts == 0
            row.attempts += 1
            row.state, row.token, row.lease_until = "running", job.lease_token, self.now + LEASE
            assert (job.attempts, job.lease_until) == (row.attempts, row.lease_until)
        return jobs[0] if jobs else multiple()

    def ours(self, job: Job) -> Expected | None:
        row = self.rows.get(job.key)
        return row if row is not None and row.token == job.lease_token else None

    @rule(job=claims, how=st.sampled_from(["done", "fail", "wait", "give_back", "refuse", "cancelled", "drop"]))
    def end(self, job: Job, how: str) -> None:
        row = self.ours(job)
        try:
            match how:
                case "done":
                    self.queue.done(job, self.now)
                case "fail":
                    self.queue.fail(job, {"type": "X"}, self.now)
                case "wait":
                    self.queue.wait(job, "because", 30, self.now)
                case "give_back":
                    self.queue.give_back(job)
                case "refuse":
                    self.queue.refuse(job, Refusal("x", "y", "z"), self.now)
                case "cancelled":
                    self.queue.end_cancelled(job, self.now)
                case "drop":
                    self.queue.drop(job)
        except LeaseLost:
            assert row is None
            return
        assert row is not None
        row.token = None
        if how == "drop":
            del self.rows[job.key]
        elif how == "fail":
            final = row.attempts >= KINDS[row.kind].attempts
            row.state = "failed" if final else "ready"
            row.run_at = row.run_at if final else self.now + backoff(row.attempts)
        elif how in {"wait", "give_back"}:
            row.attempts -= 1
            row.state = "waiting" if how == "wait" else "ready"
            row.run_at = self.now + 30 if how == "wait" else row.run_at
        else:
            row.state = {"refuse": "refused"}.get(how, how)

    @rule(job=claims)
    def heartbeat(self, job: Job) -> None:
        row = self.ours(job)
        assert self.queue.heartbeat([job], self.now, LEASE) == ([] if row else [job])
        if row:
            row.lease_until = self.now + LEASE

    @rule(key=keys)
    def cancel(self, key: str) -> None:
        found = self.queue.by_key(key)
        row = self.rows.get(key)
        assert (found is None) == (row is None)
        if found is not None and row is not None:
            waits = row.state in {"ready", "waiting"}
            assert self.queue.cancel(found.id, self.now) == waits
            row.state = "cancelled" if waits else row.state

    @rule()
    def retry_all(self) -> None:
        keys = {key for key, row in self.rows.items() if row.state in {"failed", "refused", "cancelled", "waiting"}}
        assert len(self.queue.retry(None, self.now)) == len(keys)
        for key in keys:
            self.rows[key] = Expected(self.rows[key].kind, run_at=self.now)

    @rule(key=keys)
    def forget(self, key: str) -> None:
        row = self.rows.get(key)
        gone = row is not None and row.state != "running"
        assert self.queue.forget([key]) == gone
        if gone:
            del self.rows[key]

    @precondition(lambda self: any(row.state == "running" for row in self.rows.values()))
    @rule()
    def the_daemon_is_killed(self) -> None:
        # No clean close: what was committed is in the log of the file.
        with tempfile.TemporaryDirectory() as copy:
            for file in Path(self.folder.name).iterdir():
                (Path(copy) / file.name).write_bytes(file.read_bytes())
            self.queue.close()
            for file in Path(copy).iterdir():
                (Path(self.folder.name) / file.name).write_bytes(file.read_bytes())
        self.queue = make(Path(self.folder.name))
        self.queue.release_all(self.now)
        for row in self.rows.values():
            if row.state == "running":
                row.interruptions += 1
                row.token = None
                counts = row.interruptions >= INTERRUPTIONS_ALLOWED
                used_up = row.attempts >= KINDS[row.kind].attempts
                row.state = "failed" if counts and used_up else "ready"
                row.run_at = min(row.run_at, self.now)
                row.attempts -= 0 if counts else 1

    @invariant()
    def the_file_says_what_the_model_says(self) -> None:
        found = {
            job.key: (job.kind, job.state, job.attempts, job.interruptions, job.lease_token, job.run_at)
            for job in self.queue.jobs()
        }
        assert found == {
            key: (row.kind, row.state, row.attempts, row.interruptions, row.token, row.run_at)
            for key, row in self.rows.items()
        }


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
