from __future__ import annotations

from pathlib import Path

import pytest

from daemon.devices import gpu_devices


@pytest.mark.parametrize(
    ("environment", "gpus", "devices"),
    [
        ({}, 0, ()),
        ({}, 2, ("cuda:0", "cuda:1")),
        ({"CUDA_VISIBLE_DEVICES": "1"}, 2, ("cuda:0",)),
        ({"CUDA_VISIBLE_DEVICES": ""}, 2, ()),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, 1, ()),
        ({"FASTSD_DEVICES": "cuda:1, cpu"}, 0, ("cuda:1", "cpu")),
    ],
)
def test_devices(environment: dict[str, str], gpus: int, devices: tuple[str, ...], tmp_path: Path) -> None:
    for number in range(gpus):
        (tmp_path / f"0000:0{number}:00.0").mkdir()
    assert gpu_devices(environment, tmp_path) == devices
