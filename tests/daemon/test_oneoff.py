"""One-off work in real worker processes: every payload ends once, whatever becomes of its worker."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from daemon.oneoff import run_payloads
from daemon.slots import WorkerSettings
from handlers.outcome import Outcome
from tests.probes import ENVIRONMENT, ROOT, alive, kind, until


def settings(folder: Path) -> WorkerSettings:
    return WorkerSettings(folder / "cache", folder / "logs", ENVIRONMENT)


def test_every_payload_ends_once_on_several_workers(tmp_path: Path) -> None:
    ends = list(run_payloads(kind(), [{"n": number} for number in range(20)], settings(tmp_path), workers=2))
    assert sorted(index for index, _ in ends) == list(range(20))
    assert all(outcome.facts["payload"] == {"n": index} for index, outcome in ends)
    assert len({outcome.facts["pid"] for _, outcome in ends}) == 2


def test_no_payloads_need_no_worker(tmp_path: Path) -> None:
    assert list(run_payloads(kind(), [], settings(tmp_path))) == []
    assert not (tmp_path / "logs").exists()


def test_each_end_is_given_as_it_comes_with_its_progress(tmp_path: Path) -> None:
    file = tmp_path / "now"
    reports: list[tuple[int, Mapping[str, Any]]] = []
    payloads = [{}, {"do": "wait_for_file", "file": str(file)}]
    stream = run_payloads(kind(), payloads, settings(tmp_path), on_progress=lambda *report: reports.append(report))
    assert next(stream)[0] == 0
    file.touch()
    assert next(stream)[0] == 1
    assert list(stream) == []
    assert all(report == (1, {"done": 1, "total": 2, "note": "waiting", "facts": {}}) for report in reports)


def test_crashes_and_refusals_stop_nobody_else(tmp_path: Path) -> None:
    payloads = [{}, {"do": "segfault"}, {"do": "refuse"}, {"do": "leave"}, {}]
    states = {index: outcome.state for index, outcome in run_payloads(kind(), payloads, settings(tmp_path))}
    assert states == {0: "done", 1: "failed", 2: "refused", 3: "failed", 4: "done"}


def test_one_that_takes_its_batch_down_fails_alone(tmp_path: Path) -> None:
    probe = kind(handler="BatchProbe", batch=4)
    payloads = [{"crash": index == 2, "name": index} for index in range(6)]
    ends = dict(run_payloads(probe, payloads, settings(tmp_path)))
    assert [ends[index].state for index in range(6)] == ["done", "done", "failed", "done", "done", "done"]


def test_workers_get_their_devices(tmp_path: Path) -> None:
    ends = dict(run_payloads(kind(), [{}], settings(tmp_path), devices=["cuda:0"]))
    assert ends[0].facts["device"] == "cuda:0"


def test_closing_the_generator_ends_the_workers(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    payloads = [{}, {"do": "deaf", "file": str(tmp_path / "never"), "begun": str(begun)}]
    stream = run_payloads(kind(), payloads, settings(tmp_path), workers=2)
    next(stream)
    until(lambda: begun.exists() and begun.read_text(encoding="ascii"))
    stream.close()
    assert not alive(int(begun.read_text(encoding="ascii")))


def test_it_works_outside_the_main_thread_except_for_the_signals(tmp_path: Path) -> None:
    ends: list[tuple[int, Outcome]] = []
    thread = threading.Thread(target=lambda: ends.extend(run_payloads(kind(), [{}], settings(tmp_path))))
    thread.start()
    thread.join(30)
    assert [outcome.state for _, outcome in ends] == ["done"]


def test_a_worker_that_cannot_be_started_says_so(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file where a folder should be", encoding="ascii")
    with pytest.raises(OSError, match="logs"):
        list(run_payloads(kind(), [{}], settings(tmp_path)))


SCRIPT = """
import json, sys
from pathlib import Path
from daemon.oneoff import run_payloads
from daemon.slots import WorkerSettings
from tests.probes import ENVIRONMENT, kind
folder = Path(sys.argv[1])
settings = WorkerSettings(folder / "cache", folder / "logs", ENVIRONMENT)
try:
    for index, outcome in run_payloads(kind(), json.loads(sys.argv[2]), settings):
        print(index, outcome.state, flush=True)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.parametrize(
    ("do", "signals"),
    # Two of one number, sent at once, are one.
    [("wait_for_file", [signal.SIGINT]), ("deaf", [signal.SIGTERM, signal.SIGINT])],
)
def test_the_first_signal_stops_and_the_second_kills(tmp_path: Path, do: str, signals: list[signal.Signals]) -> None:
    begun = tmp_path / "begun"
    payloads = f'[{{}}, {{"do": "{do}", "file": "{tmp_path}/never", "begun": "{begun}"}}, {{}}]'
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), payloads]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=ROOT) as process:
        until(lambda: begun.exists() and begun.read_text(encoding="ascii"))
        for number in signals:
            process.send_signal(number)
        told, _ = process.communicate(timeout=20)
    assert told.splitlines() == ["0 done", "1 stopping", "interrupted"]
    assert process.returncode == 0
    assert not alive(int(begun.read_text(encoding="ascii")))
