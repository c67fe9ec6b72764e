"""Worker processes, real ones: what they tell, how they end, and that nothing of them stays."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any

import pytest

from daemon.workers import MARK, Ended, Plan, Progress, WorkerProcess, end_orphans, start_worker
from handlers.outcome import Outcome
from tests.probes import ENVIRONMENT, alive, kind, until


def plan(folder: Path, **changes: Any) -> Plan:
    return Plan(kind(**changes), "cpu", folder / "cache", folder / "logs" / "worker.log", ENVIRONMENT)


async def outcomes(worker: WorkerProcess, jobs: Mapping[int, Mapping[str, Any]]) -> dict[int, Outcome]:
    return {event.job: event.outcome async for event in worker.run(jobs) if isinstance(event, Ended)}


def run(main: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(40):
            return await main

    return asyncio.run(bounded())


def one(folder: Path, payload: Mapping[str, Any], **changes: Any) -> Outcome:
    """The outcome of one job in a fresh worker."""

    async def main() -> Outcome:
        worker = await start_worker(plan(folder, **changes))
        try:
            return (await outcomes(worker, {1: payload}))[1]
        finally:
            await worker.stop(5)

    outcome = run(main())
    assert isinstance(outcome, Outcome)
    return outcome


def test_a_warm_worker_runs_job_after_job_and_ends_when_asked(tmp_path: Path) -> None:
    async def main() -> None:
        worker = await start_worker(plan(tmp_path))
        first = (await outcomes(worker, {1: {"a": 1}}))[1]
        second = await outcomes(worker, {2: {}, 3: {"b": "ü"}})
        assert first.state == "done"
        assert first.facts["payload"] == {"a": 1}
        assert [second[job].facts["run"] for job in (2, 3)] == [2, 3]
        assert second[3].facts["pid"] == worker.pid == first.facts["pid"]
        assert worker.usable is True
        started = time.monotonic()
        await worker.stop(20)
        assert time.monotonic() - started < 5
        assert not alive(worker.pid)

    run(main())


def test_names_that_are_no_utf8_cross_the_pipe_both_ways(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9\xff.jpg"))
    path.write_bytes(b"x")
    outcome = one(tmp_path, {"do": "paths", "path": os.fspath(path)})
    assert outcome.facts["exists"] is True
    assert os.fsencode(outcome.facts["path"]) == os.fsencode(path)


def test_a_very_long_message_crosses_the_pipe(tmp_path: Path) -> None:
    payload = {"pictures": [{"source": f"/{index}" * 20} for index in range(20_000)]}
    assert one(tmp_path, payload).facts["payload"] == payload


@pytest.mark.parametrize(
    ("do", "state", "holds"),
    [
        ("fail", "failed", "as the test wants"),
        ("exhaust_memory", "failed", "not enough memory"),
        ("allocate", "failed", "not enough memory"),
        ("leave_by_exception", "failed", "5"),
        ("not_json", "failed", "object is no JSON value"),
        ("refuse", "refused", "line 3: The file is empty. Upload it again."),
        ("lack", "waiting", "fastsd models get kosmos-2"),
        ("import_nothing", "waiting", "no_such_package"),
        ("be_cancelled", "cancelled", ""),
    ],
)
def test_ends_of_a_handler(tmp_path: Path, do: str, state: str, holds: str) -> None:
    outcome = one(tmp_path, {"do": do})
    assert outcome.state == state
    told = outcome.error.get("message", "") or str(outcome.refusal or "") or outcome.reason
    assert holds in told
    if do == "fail":
        assert outcome.error["type"] == "ValueError"
        assert "probes.py" in outcome.error["traceback"]


@pytest.mark.parametrize(
    ("do", "sentence", "log"),
    [
        ("segfault", "signal 11 (a crash in native code)", "Segmentation fault"),
        ("leave", "exit code 3", "last words"),
        ("be_killed", "signal 9 (killed: out of memory?)", ""),
    ],
)
def test_a_worker_that_dies_fails_its_job_with_a_sentence_and_its_last_words(
    tmp_path: Path, do: str, sentence: str, log: str
) -> None:
    outcome = one(tmp_path, {"do": do})
    assert outcome.state == "failed"
    assert outcome.error["type"] == "WorkerDied"
    assert sentence in outcome.error["message"]
    assert log in outcome.error["traceback"]


def test_the_log_tail_is_of_this_worker_only(tmp_path: Path) -> None:
    assert "last words" in one(tmp_path, {"do": "leave"}).error["traceback"]
    assert "last words" not in one(tmp_path, {"do": "be_killed"}).error["traceback"]


def test_a_crash_blames_only_the_job_that_ran(tmp_path: Path) -> None:
    async def main() -> dict[int, Outcome]:
        worker = await start_worker(plan(tmp_path))
        return await outcomes(worker, {1: {}, 2: {"do": "segfault"}, 3: {}})

    assert {job: outcome.state for job, outcome in run(main()).items()} == {1: "done", 2: "failed", 3: "stopping"}


def test_a_handler_that_crashes_while_it_is_made_blames_one_job(tmp_path: Path) -> None:
    async def main() -> dict[int, Outcome]:
        worker = await start_worker(plan(tmp_path, handler="SlowToLoad"))
        return await outcomes(worker, {1: {}, 2: {}})

    ends = run(main())
    assert {job: outcome.state for job, outcome in ends.items()} == {1: "failed", 2: "stopping"}
    assert "exit code 7" in ends[1].error["message"]


def test_a_handler_that_lacks_a_package_lets_all_jobs_wait(tmp_path: Path) -> None:
    async def main() -> dict[int, Outcome]:
        worker = await start_worker(plan(tmp_path, handler="NotThere"))
        try:
            return await outcomes(worker, {1: {}, 2: {}})
        finally:
            await worker.stop(5)

    assert [outcome.state for outcome in run(main()).values()] == ["waiting", "waiting"]


def test_a_silent_worker_is_ended(tmp_path: Path) -> None:
    outcome = one(tmp_path, {"do": "deaf", "file": str(tmp_path / "never")}, silence=0.5)
    assert outcome.error["message"] == "The worker was silent for 0.5 s and was ended."


def test_progress_keeps_a_worker_alive_beyond_its_silence(tmp_path: Path) -> None:
    async def main() -> Outcome:
        worker = await start_worker(plan(tmp_path, silence=1.0))
        loop = asyncio.get_running_loop()
        loop.call_later(2.5, (tmp_path / "now").touch)
        try:
            return (await outcomes(worker, {1: {"do": "wait_for_file", "file": str(tmp_path / "now")}}))[1]
        finally:
            await worker.stop(5)

    assert run(main()).state == "done"


def test_garbage_on_stdout_goes_to_the_log(tmp_path: Path) -> None:
    assert one(tmp_path, {"do": "print_garbage"}).facts["run"] == 1
    log = (tmp_path / "logs" / "worker.log").read_bytes()
    assert b"not json\n\xff\xfe" in log
    assert b"from a child" in log


def test_a_handler_cannot_read_the_daemons_messages(tmp_path: Path) -> None:
    assert one(tmp_path, {"do": "read_stdin"}).facts["read"] == ""


def test_progress_is_throttled_and_the_last_comes_through(tmp_path: Path) -> None:
    async def main() -> list[Progress]:
        worker = await start_worker(plan(tmp_path))
        jobs = {1: {"do": "chatter", "steps": 5000}}
        found = [event async for event in worker.run(jobs) if isinstance(event, Progress)]
        await worker.stop(5)
        return found

    started = time.monotonic()
    found = run(main())
    assert 2 <= len(found) <= 3 + (time.monotonic() - started) * 5
    assert found[-1].report == {"done": 5000, "total": 5000, "note": "step", "facts": {"loss": 0.5}}


def test_progress_before_a_long_silence_comes_through(tmp_path: Path) -> None:
    file = tmp_path / "now"

    async def main() -> list[str]:
        worker = await start_worker(plan(tmp_path))
        notes = []
        async for event in worker.run({1: {"do": "last_word_then_silence", "file": str(file)}}):
            if isinstance(event, Progress):
                notes.append(event.report["note"])
                if event.report["note"] == "second":
                    file.touch()
        await worker.stop(5)
        return notes

    assert run(main()) == ["first", "second"]


def test_cancel_reaches_the_running_and_the_waiting_job_of_a_batch(tmp_path: Path) -> None:
    wait = {"do": "wait_for_file", "file": str(tmp_path / "never")}

    async def main() -> dict[int, str]:
        worker = await start_worker(plan(tmp_path))
        states: dict[int, str] = {}
        async for event in worker.run({1: wait, 2: {}, 3: {}}):
            if isinstance(event, Ended):
                states[event.job] = event.outcome.state
            else:
                worker.cancel(3)
                worker.cancel(1)
        # A number that was cancelled once may come again.
        again = await outcomes(worker, {1: {}})
        await worker.stop(5)
        return {**states, 4: again[1].state}

    assert run(main()) == {1: "cancelled", 2: "done", 3: "cancelled", 4: "done"}


def test_stop_gives_the_jobs_back(tmp_path: Path) -> None:
    wait = {"do": "wait_for_file", "file": str(tmp_path / "never")}

    async def main() -> dict[int, str]:
        worker = await start_worker(plan(tmp_path))
        states: dict[int, str] = {}
        async for event in worker.run({1: wait, 2: {}}):
            if isinstance(event, Ended):
                assert not event.died
                states[event.job] = event.outcome.state
            else:
                worker.request_stop()
        await worker.stop(5)
        return states

    assert run(main()) == {1: "stopping", 2: "stopping"}


def test_sigterm_is_a_stop_and_sigint_is_not_heard(tmp_path: Path) -> None:
    wait = {"do": "wait_for_file", "file": str(tmp_path / "never")}

    async def main() -> list[str]:
        worker = await start_worker(plan(tmp_path))
        states: list[str] = []
        told = False  # once: a second report may be heard when the worker has ended already
        async for event in worker.run({1: wait}):
            if isinstance(event, Ended):
                states.append(event.outcome.state)
            elif event.report["done"] == 1 and not told:
                told = True
                os.kill(worker.pid, signal.SIGINT)
                os.kill(worker.pid, signal.SIGTERM)
        await worker.stop(5)
        return states

    assert run(main()) == ["stopping"]


def test_a_deaf_worker_is_killed_after_the_grace(tmp_path: Path) -> None:
    async def main() -> dict[int, Outcome]:
        worker = await start_worker(plan(tmp_path))
        begun = tmp_path / "begun"
        task = asyncio.create_task(
            outcomes(worker, {1: {"do": "deaf", "file": str(tmp_path / "never"), "begun": str(begun)}})
        )
        await asyncio.to_thread(until, begun.exists)
        await worker.stop(0.2)
        assert not alive(worker.pid)
        return await task

    assert "signal 9" in run(main())[1].error["message"]


@pytest.mark.parametrize("leave", [True, False])
def test_what_a_worker_started_ends_with_it(tmp_path: Path, *, leave: bool) -> None:
    child = tmp_path / "child"
    payload = {"do": "start_child", "child": str(child), "file": str(tmp_path / "never"), "leave": leave}

    async def main() -> None:
        worker = await start_worker(plan(tmp_path))
        task = asyncio.create_task(outcomes(worker, {1: payload}))
        await asyncio.to_thread(until, lambda: child.exists() and child.read_text(encoding="ascii"))
        if not leave:
            worker.kill()
        await task
        await asyncio.to_thread(until, lambda: not alive(int(child.read_text(encoding="ascii"))))

    run(main())


def test_a_worker_without_its_daemon_ends_by_end_of_file(tmp_path: Path) -> None:
    command = plan(tmp_path).command
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT, start_new_session=True
    )
    with process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert b'"ready"' in process.stdout.readline()
        process.stdin.close()
        assert process.wait(10) == -signal.SIGKILL


def test_a_worker_that_was_orphaned_before_it_could_ask_ends_at_once(tmp_path: Path) -> None:
    command = [*plan(tmp_path).command[:-1], "1"]
    process = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, env=ENVIRONMENT, start_new_session=True, check=False
    )
    assert process.returncode == -signal.SIGKILL
    assert process.stdout == b""


def test_orphans_are_found_by_their_mark(tmp_path: Path) -> None:
    mark, other = str(tmp_path / "state"), str(tmp_path / "state2")
    script = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"]
    with (
        subprocess.Popen(script, env={MARK: mark}, stdout=subprocess.PIPE) as ours,
        subprocess.Popen(script, env={MARK: other}, stdout=subprocess.PIPE) as theirs,
    ):
        for process in (ours, theirs):
            assert process.stdout is not None
            process.stdout.readline()
        try:
            assert end_orphans(mark) == 1
            assert ours.wait(10) == -signal.SIGKILL
            assert theirs.poll() is None
        finally:
            theirs.kill()


def test_a_worker_that_cannot_be_started_says_so(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file where a folder should be", encoding="ascii")
    with pytest.raises(OSError, match="logs"):
        run(start_worker(plan(tmp_path)))
