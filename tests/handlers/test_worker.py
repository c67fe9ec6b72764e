"""The worker's parts: throttled progress, outcomes over the pipe, batches, and the protocol byte by byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers.context import JobContext, JobResult, Stopping, Waiting
from handlers.outcome import Outcome
from handlers.pipe import ProgressThrottle, Reporter
from handlers.worker import Desk, Worker, load_handler
from sessions.refusal import Refusal
from tests.probes import ROOT, BatchProbe, Probe

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    offers=st.lists(st.tuples(st.integers(1, 3), st.floats(0, 1)), max_size=60),
    interval=st.sampled_from([0.2, 0.5]),
)
def test_a_job_speaks_once_an_interval_and_its_last_word_is_never_lost(
    offers: list[tuple[int, float]], interval: float
) -> None:
    throttle = ProgressThrottle(interval)
    now, sent = 0.0, dict[int, list[tuple[float, int]]]()
    for number, (job, pause) in enumerate(offers):
        now += pause
        for message in throttle.due(now):
            sent.setdefault(message["job"], []).append((now, message["number"]))
        if throttle.offer(job, {"job": job, "number": number}, now):
            sent.setdefault(job, []).append((now, number))
    for times in sent.values():
        moments = [moment for moment, _ in times]
        assert all(later - earlier >= interval for earlier, later in pairwise(moments))
    for job in {job for job, _ in offers}:
        last = max(number for number, (other, _) in enumerate(offers) if other == job)
        held = throttle.finish(job)
        assert (held["number"] if held else sent[job][-1][1]) == last
        assert throttle.finish(job) is None
    assert throttle.next_due() is None


@given(
    st.builds(JobResult, st.dictionaries(st.text(), JSON, max_size=3), st.lists(st.text().map(Path), max_size=2))
    | st.builds(Refusal, st.text(), st.text(), st.text(), st.none() | st.integers())
    | st.builds(Waiting, st.text(), st.floats(0, 1e6))
    | st.builds(ValueError, st.text())
    | st.just(Stopping())
)
def test_an_outcome_is_the_same_on_the_other_side(end: JobResult | BaseException) -> None:
    outcome = Outcome.of(end)
    wire = json.dumps(outcome.to_json()).encode("ascii")
    back = Outcome.from_json(json.loads(wire))
    assert back.to_json() == json.loads(wire)
    assert (back.state, back.outputs, back.reason) == (outcome.state, outcome.outputs, outcome.reason)


def test_an_import_error_of_our_own_is_a_failure() -> None:
    assert Outcome.of(ModuleNotFoundError("no", name="handlers.crop.nothing")).state == "failed"
    assert Outcome.of(ModuleNotFoundError("no", name="torch.nothing")).state == "waiting"
    assert Outcome.of(ImportError("libGL.so.1: cannot open shared object file")).state == "waiting"


class Heard:
    """A reporter on a pipe, and what came through it."""

    def __init__(self) -> None:
        self._read, write = os.pipe()
        self._write = write
        self.reporter = Reporter(write)

    def messages(self) -> Iterator[dict[str, Any]]:
        os.close(self._write)
        with os.fdopen(self._read, "rb") as file:
            for line in file:
                yield json.loads(line)


def work(handler: type[Probe], jobs: Mapping[int, Mapping[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Run one batch in this process."""
    desk, heard = Desk(), Heard()
    desk.receive({"type": "run", "jobs": [{"job": job, "kind": "probe", "payload": jobs[job]} for job in jobs]})
    desk._work.put(None)
    Worker(handler, desk, heard.reporter, "cpu", folder).run()
    return list(heard.messages())


def test_a_batch_gives_each_job_its_own_end(tmp_path: Path) -> None:
    messages = work(BatchProbe, {1: {"name": "a"}, 2: {"refuse": True}, 3: {"name": "c"}}, tmp_path)
    ends = {message["job"]: message["state"] for message in messages if message["type"] == "outcome"}
    assert ends == {1: "done", 2: "refused", 3: "done"}
    assert [message["jobs"] for message in messages if message["type"] == "started"] == [[1], [1, 2, 3]]


def test_a_batch_of_one_is_run_as_one(tmp_path: Path) -> None:
    assert work(BatchProbe, {7: {}}, tmp_path)[-1]["facts"] == {"batch": 1, "name": None}


def test_a_batch_with_too_few_ends_fails_as_a_whole(tmp_path: Path) -> None:
    messages = work(BatchProbe, {1: {"short": True}, 2: {}}, tmp_path)
    errors = [message["error"]["message"] for message in messages if message["type"] == "outcome"]
    assert errors == ["the handler returned 0 results for 2 jobs"] * 2


def test_a_handler_that_returns_nothing_is_told(tmp_path: Path) -> None:
    class Wrong(Probe):
        def run(self, context: JobContext) -> Any:  # noqa: ARG002 - the signature of a handler
            return None

    (end,) = [message for message in work(Wrong, {1: {}}, tmp_path) if message["type"] == "outcome"]
    assert end["error"]["message"] == "the handler returned NoneType instead of a JobResult"


def test_numbers_of_other_libraries_are_json(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")

    class Numbers(Probe):
        def run(self, context: JobContext) -> JobResult:  # noqa: ARG002 - the signature of a handler
            return JobResult({"loss": numpy.float32(0.5), "steps": numpy.int64(3)}, [tmp_path / "a"])

    end = work(Numbers, {1: {}}, tmp_path)[-1]
    assert end["facts"] == {"loss": 0.5, "steps": 3}
    assert end["outputs"] == [str(tmp_path / "a")]


def test_stop_and_cancel_before_the_start(tmp_path: Path) -> None:
    for message, state in (({"type": "cancel", "job": 1}, "cancelled"), ({"type": "stop"}, "stopping")):
        desk, heard = Desk(), Heard()
        desk.receive({"type": "run", "jobs": [{"job": 1, "kind": "probe", "payload": {}}]})
        desk.receive(message)
        desk.receive({"type": "something of a later version"})
        desk._work.put(None)
        Worker(Probe, desk, heard.reporter, "cpu", tmp_path).run()
        assert list(heard.messages()) == [{"type": "outcome", "job": 1, "state": state}]


def test_a_handler_is_found_by_its_name() -> None:
    assert type(load_handler("tests.probes:BatchProbe")).__name__ == "BatchProbe"
    with pytest.raises(ModuleNotFoundError):
        load_handler("tests.no_such_module:Probe")


def test_the_protocol_as_it_is_written_down(tmp_path: Path) -> None:
    """What docs/architecture.md says, with a daemon that is this test."""
    command = [
        *(sys.executable, "-m", "handlers.worker", "--kind", "probe", "--handler", "tests.probes:Probe"),
        *("--device", "cpu", "--cache", str(tmp_path), "--parent", str(os.getpid())),
    ]
    heard: list[dict[str, Any]] = []
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, cwd=ROOT, bufsize=0
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b'{"type": "run", "jobs": [{"job": 5, "kind": "probe", "payload": {"do": "refuse"}}]}\n')
        while not heard or heard[-1]["type"] != "outcome":
            heard.append(json.loads(process.stdout.readline()))
        process.stdin.write(b'{"type": "stop"}\n')
        assert process.wait(20) == 0
    beats = [message for message in heard if message["type"] == "heartbeat"]
    assert all(message["rss"] > 1 << 20 for message in beats)
    refusal = {"code": "empty", "what": "The file is empty.", "advice": "Upload it again.", "line": 3}
    assert [message for message in heard if message not in beats] == [
        {"type": "ready", "pid": process.pid},
        {"type": "started", "jobs": [5]},
        {"type": "started", "jobs": [5]},
        {"type": "outcome", "job": 5, "state": "refused", "refusal": refusal},
    ]


def test_the_worker_imports_nothing_heavy_by_itself() -> None:
    script = "import sys, handlers.worker; print(sorted({'torch', 'numpy', 'PIL', 'cv2', 'daemon'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout == "[]\n"
