from __future__ import annotations

import signal
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import settings

from tests.daemon_process import DaemonProcess

# Timings never decide a test: how long an example takes depends on what else the machine does.
settings.register_profile("fastsd", deadline=None)
settings.load_profile("fastsd")

# A shell starts what it puts into the background with SIGINT ignored, and children would inherit that: tests that
# interrupt a process would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of downloads that all tests of a run share, so that each miniature is built once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def photographs() -> list[Path]:
    """Real photographs, as scikit-image ships them."""
    folder = resources.files("skimage") / "data"
    return [Path(str(folder / name)) for name in PHOTOGRAPHS]


@pytest.fixture
def daemon(tmp_path: Path, cache: Path) -> Iterator[DaemonProcess]:
    """A tree with a daemon that can be started on it; it is ended with the test."""
    process = DaemonProcess(tmp_path, cache)
    yield process
    process.stop()
