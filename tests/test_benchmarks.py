"""The benchmarks run: what is measured once a month must not break in silence. Their figures decide nothing here."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.probes import ROOT

RUNS = {
    "train.py --shape small --rounds 1 --steps 3": "fastsd reaches",
    "train.py --shape small-sdxl-lora --rounds 1 --steps 3": "fastsd reaches",
    "crop.py --rounds 1 --scenes 4": "whole",
    "watch.py --files 300 --folders 10 --repeats 1 --idle-seconds 1 --settle 0.3 --drops 2 --burst 100": "lost",
}


@pytest.mark.soak
@pytest.mark.parametrize("command", RUNS)
def test_it_runs_and_prints_its_table(command: str) -> None:
    script, *arguments = command.split()
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert RUNS[command] in done.stdout
