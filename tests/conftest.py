from __future__ import annotations

import gc
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

# Files whose tests run whole daemons and trainings for minutes. They go first: whoever takes one last would work alone.
LONG = (
    "test_end_to_end",
    "test_miniature_lesson",
    "test_train_resume",
    "test_train_crew",
    "test_keeping_end_to_end",
    "test_train_seen_runs",
    "test_train_flux_run",
    "test_lora_end_to_end",
    "test_search_end_to_end",
    "test_train_job",
    "test_crop_end_to_end",
    "test_arriving_models",
    "test_train_intermediate",
    "test_failures",
    "test_cli_end_to_end",
    "test_caption_commands",
)


def pytest_collection() -> None:
    """Collecting imports everything; what it makes is looked through neither meanwhile nor later."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Garbage is collected from here on."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, in the order above."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


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
