"""The corpus of odd files through the real handler in a real worker: the right outcome each, in little memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from daemon.commands.oneoffs import pictures_in
from daemon.oneoff import run_payloads
from daemon.slots import WorkerSettings
from handlers.kinds import KINDS
from sessions.ignore import is_ignored_file_name
from tests import pictures
from tests.corpus import binary
from tests.corpus.cases import Case, cases
from tests.corpus.pattern import Cropped, Ignored, Refused, pattern, quarters
from tests.probes import ROOT

RESOLUTION = 96
MOST_MEMORY = 400 << 20
CASES = list(cases())


@dataclass(frozen=True)
class Session:
    """What a worker answered.

    Attributes:
        outcomes: its last word on each job.
        peak: the most memory that it held, in bytes.
    """

    outcomes: Mapping[int, Mapping[str, Any]]
    peak: int


def through_a_worker(payloads: Sequence[Mapping[str, Any]], folder: Path) -> Session:
    """Hand jobs to a worker process of the crop kind, as the daemon does, and hear it out."""
    command = [
        *(sys.executable, "-P", "-m", "handlers.worker", "--kind", "crop"),
        *("--handler", "handlers.crop.job:CropHandler", "--device", "cpu"),
        *("--cache", str(folder), "--parent", str(os.getpid())),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    outcomes: dict[int, Mapping[str, Any]] = {}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, env=environment
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        jobs = [{"job": number, "kind": "crop", "payload": payload} for number, payload in enumerate(payloads)]
        process.stdin.write(json.dumps({"type": "run", "jobs": jobs}).encode() + b"\n")
        process.stdin.flush()
        while len(outcomes) < len(payloads):
            line = process.stdout.readline()
            assert line, f"the worker died; {len(outcomes)} outcomes"
            message = json.loads(line)
            if message["type"] == "outcome":
                outcomes[message["job"]] = message
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
        peak = next(int(row.split()[1]) << 10 for row in status.splitlines() if row.startswith("VmHWM:"))
        process.stdin.write(b'{"type": "stop"}\n')
        process.stdin.flush()
        assert process.wait(30) == 0
    return Session(outcomes, peak)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for case in CASES:
        case.write(folder)
    return folder


def payload(corpus: Path, number: int, case: Case, **more: Any) -> dict[str, Any]:
    output = corpus.parent / f"{corpus.name}-crops" / f"{number}.png"
    return {"source": str(corpus / case.name), "output": str(output), "resolution": RESOLUTION, "mode": "off", **more}


@pytest.fixture(scope="module")
def session(corpus: Path) -> Session:
    return through_a_worker([payload(corpus, number, case) for number, case in enumerate(CASES)], corpus.parent)


def test_there_are_enough_of_them() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert len(CASES) >= 150


@pytest.mark.parametrize(
    ("number", "case"), [pytest.param(number, case, id=repr(case.name)[:60]) for number, case in enumerate(CASES)]
)
def test_outcome(session: Session, corpus: Path, number: int, case: Case) -> None:
    answer = session.outcomes[number]
    match case.outcome:
        case Refused(codes):
            assert answer["state"] == "refused", answer
            assert answer["refusal"]["code"] in codes, answer
            assert case.name in answer["refusal"]["what"]
            assert answer["refusal"]["advice"]
        case Cropped() as wanted:
            assert answer["state"] == "done", answer
            facts = answer["facts"]
            assert tuple(facts["picture"]) == wanted.size
            assert facts["box"] == [0, 0, *wanted.size]
            warnings = [warning for warning in facts["warnings"] if "larger version" not in warning]
            assert len(warnings) == (1 if wanted.warning else 0), warnings
            assert all(wanted.warning in warning for warning in warnings)
            with Image.open(answer["outputs"][0]) as crop:
                assert min(crop.size) == min(RESOLUTION, *wanted.size)
                assert not set(crop.info) - {"dpi"}
                for got, expected in zip(quarters(crop), wanted.colours, strict=True):
                    assert max(abs(a - b) for a, b in zip(got, expected, strict=True)) <= wanted.tolerance, (
                        got,
                        expected,
                    )
        case Ignored():
            assert is_ignored_file_name(case.name)
            assert corpus / case.name not in pictures_in([corpus])


def test_memory(session: Session) -> None:
    assert session.peak < MOST_MEMORY, f"{session.peak >> 20} MiB"


def test_smart_crops_of_all_are_square_and_no_other_outcome(corpus: Path, session: Session) -> None:
    jobs = [payload(corpus, number, case, mode="smart") for number, case in enumerate(CASES)]
    smart = through_a_worker(jobs, corpus.parent)
    assert smart.peak < MOST_MEMORY, f"{smart.peak >> 20} MiB"
    for number, answer in session.outcomes.items():
        assert smart.outcomes[number]["state"] == answer["state"]
        if answer["state"] == "done":
            x0, y0, x1, y1 = smart.outcomes[number]["facts"]["box"]
            assert x1 - x0 == y1 - y0 == min(answer["facts"]["picture"])


def test_a_picture_that_takes_too_long_costs_only_itself(tmp_path: Path) -> None:
    """The worker ends over it; the others of its batch are done by the next one."""
    (tmp_path / "slow.jpg").write_bytes(binary.scans_bomb(100_000))
    (tmp_path / "fine.png").write_bytes(pictures.encoded(pattern(), "PNG"))
    jobs = [
        {"source": str(tmp_path / name), "output": str(tmp_path / "crops" / name), "resolution": RESOLUTION}
        for name in ("fine.png", "slow.jpg", "fine.png")
    ]
    jobs[1]["seconds"] = 0.2
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    settings = WorkerSettings(tmp_path / "cache", tmp_path / "logs", environment)
    outcomes = dict(run_payloads(KINDS["crop"], jobs, settings))
    assert [outcomes[number].state for number in range(3)] == ["done", "refused", "done"]
    refusal = outcomes[1].refusal
    assert refusal is not None
    assert (refusal.code, "slow.jpg" in refusal.what) == ("too-slow", True)
