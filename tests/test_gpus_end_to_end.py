"""``gpus: all``, whole: ``fastsd train`` shares a training among the devices of the machine, here two on its CPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.daemon_process import DaemonProcess

SPEC = """\
base: miniature
instance: zwx
class: thing
start: now
batch_size: 2
text_encoder: {steps: 0}
unet: {steps: 3, learning_rate: 1e-3}
sample_every: 0
"""


@pytest.mark.soak
def test_a_training_is_shared(daemon: DaemonProcess, photographs: list[Path]) -> None:
    folder = daemon.root
    daemon.settings(watch={"settle": 0.5}, gpus="all", captioner="miniature")
    daemon.environment["FASTSD_DEVICES"] = "cpu,cpu"
    for photograph in photographs[:3]:
        shutil.copyfile(photograph, folder / photograph.name)
    (folder / "train.yaml").write_text(SPEC)
    done = daemon.run("train", str(folder), "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert Path(told["model"]).is_file()
    log = (folder / "runs" / told["run"] / "log.txt").read_text()
    assert "started: 3 steps on cpu and cpu" in log
    assert "step 3/3" in log
