"""The GPUs of this machine, found without torch: the daemon starts in a blink and never loads it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

_DRIVER = Path("/proc/driver/nvidia/gpus")
_PATIENCE_SECONDS = 20.0


def gpu_devices(environment: Mapping[str, str], driver: Path = _DRIVER) -> tuple[str, ...]:
    """The torch devices that jobs of the gpu lane take, one a GPU; none where there is no GPU.

    Args:
        environment: ``FASTSD_DEVICES`` names them outright (``cuda:1`` or ``cpu``, with commas between);
            ``CUDA_VISIBLE_DEVICES`` hides some, and then torch counts the visible ones from 0.
        driver: where NVIDIA's kernel driver lists its GPUs.
    """
    if chosen := environment.get("FASTSD_DEVICES"):
        return tuple(name.strip() for name in chosen.split(",") if name.strip())
    count = _count(driver)
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        shown = [name for name in visible.split(",") if name.strip() not in ("", "-1")]
        count = min(count, len(shown))
    return tuple(f"cuda:{number}" for number in range(count))


def _count(driver: Path) -> int:
    if driver.is_dir():
        return sum(1 for _ in driver.iterdir())
    # Under WSL there is a GPU and no such folder.
    if shutil.which("nvidia-smi") is None:
        return 0
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=_PATIENCE_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(1 for line in listed.stdout.splitlines() if line.startswith("GPU "))


def worker_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of workers: the daemon's, and threads that sleep while they wait for each other.

    OpenMP's threads spin by default; on a machine that does something else besides, that made a training six times
    slower.
    """
    return {"OMP_WAIT_POLICY": "PASSIVE", **environment}
