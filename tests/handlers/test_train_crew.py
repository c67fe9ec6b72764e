"""Several devices, here processes on the CPU, train what one would: the same steps up to the order of sums."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import connection
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from handlers.context import JobContext
from handlers.models import miniature
from handlers.train import crew as crew_room
from handlers.train.crew import Alone, Crew, MemberLost, crew_of
from handlers.train.job import TrainHandler
from tests.handlers.train_session import make_session, payload_of

SPEC = """
text_encoder: {steps: 3, learning_rate: 1e-4}
unet: {steps: 4, learning_rate: 1e-4}
batch_size: 3
checkpoint_every: 2
sample_every: 0
class: shape
prior: {images: 3, weight: 0.5}
ema: true
"""
FINISHED = Path(".fastsd", "finished", "r1")
PARTS = ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    miniature.ensure("miniature", folder)
    return folder


def train(session: Path, cache: Path, devices: list[str], pause_after: int = 0, pipe: Any = None) -> None:
    def report(done: float, _total: float, _note: str, facts: Any) -> None:
        if pipe and "loss" in facts and done == pause_after:
            pipe.send([child.pid for child in psutil.Process().children(recursive=True)])
            pipe.recv()

    payload = {**payload_of(session, SPEC), "devices": devices}
    TrainHandler().run(JobContext(1, "train", payload, "cpu", cache, report, lambda: False, lambda: False))


def apart(ours: Path, theirs: Path, base: Path) -> float:
    """How far two finished models lie apart, of the way that the second one went from its base."""
    updates, differences = [], []
    for part in PARTS:
        first, second, before = (load_file(folder / part) for folder in (ours, theirs, base))
        updates += [(second[key] - before[key]).flatten().float() for key in second]
        differences += [(first[key] - second[key]).flatten().float() for key in second]
    return float(torch.cat(differences).norm() / torch.cat(updates).norm())


@pytest.fixture(scope="module")
def alone(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one makes alone."""
    session = make_session(tmp_path_factory.mktemp("a") / "Sessions" / "dog")
    train(session, cache, ["cpu"])
    return session / FINISHED


def test_two_train_what_one_would(cache: Path, alone: Path, tmp_path: Path) -> None:
    pair = make_session(tmp_path / "Sessions" / "dog")
    train(pair, cache, ["cpu", "cpu"])
    assert "steps on cpu and cpu" in (pair / "runs" / "r1" / "log.txt").read_text()
    assert apart(pair / FINISHED, alone, miniature.folder_of("miniature", cache)) < 0.02


@pytest.mark.soak
def test_two_train_what_one_would_also_when_all_are_killed(cache: Path, alone: Path, tmp_path: Path) -> None:
    pair = make_session(tmp_path / "Sessions" / "dog")
    spawning = multiprocessing.get_context("spawn")
    ours, theirs = spawning.Pipe()
    process = spawning.Process(target=train, args=(pair, cache, ["cpu", "cpu"], 6, theirs))
    process.start()
    assert ours.poll(180), "the first of the crew gave no sign"
    members = [psutil.Process(pid) for pid in ours.recv() if psutil.pid_exists(pid)]
    assert any("spawn_main" in " ".join(member.cmdline()) for member in members), "the second one is a process"
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    gone, left = psutil.wait_procs(members, timeout=30)
    assert not left, "nobody outlives the first"
    assert gone
    train(pair, cache, ["cpu", "cpu"])
    log = (pair / "runs" / "r1" / "log.txt").read_text()
    assert "resumed from step 4" in log
    assert apart(pair / FINISHED, alone, miniature.folder_of("miniature", cache)) < 0.02


@contextmanager
def patient(_seconds: float, _end: Exception) -> Iterator[None]:
    """As a context without a limit."""
    yield


def test_one_alone_needs_nobody() -> None:
    with crew_of(["cpu"], "nowhere:nothing", {}, patient) as crew:
        assert isinstance(crew, Alone)
        assert crew.sum_of([1.5, 2.0]) == [1.5, 2.0]


def ask(crew: Crew, _device: str, task: dict[str, Any]) -> None:
    """What the other member does in the test below."""
    crew_room._BUCKET = task["bucket"]  # in a process of its own
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in task["shapes"]]
    parameters[1].grad = torch.full(task["shapes"][1], 2.0)
    crew.add_up(parameters)
    crew.sum_of([float(parameters[1].grad.sum()), 1.0])


def test_gradients_are_added_up_and_nobodys_stays_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew_room, "_BUCKET", 5)
    shapes = [(2, 2), (3,), (4,)]
    before = dict(os.environ)
    task = {"shapes": shapes, "bucket": 5}
    with crew_of(["cpu", "cpu"], "tests.handlers.test_train_crew:ask", task, patient) as crew:
        assert (crew.rank, crew.count) == (0, 2)
        parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
        parameters[0].grad = torch.ones(2, 2)
        parameters[1].grad = torch.tensor([1.0, 2.0, 3.0])
        crew.add_up(parameters)
        assert torch.equal(parameters[0].grad, torch.ones(2, 2))
        assert torch.equal(parameters[1].grad, torch.tensor([3.0, 4.0, 5.0]))
        assert parameters[2].grad is None
        assert crew.sum_of([0.5, 2.0]) == [12.5, 3.0]
    assert dict(os.environ) == before
    assert not torch.distributed.is_initialized()


def add(crew: Crew, _device: str, task: dict[str, Any]) -> None:
    """What the other member does in the tests below: so many sums."""
    for _ in range(task["sums"]):
        crew.sum_of([1.0])


def others() -> list[psutil.Process]:
    children = psutil.Process().children()
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


def test_a_wish_to_stop_that_all_hear_is_the_first_ones_to_follow() -> None:
    with crew_of(["cpu", "cpu"], "tests.handlers.test_train_crew:add", {"sums": 2}, patient) as crew:
        assert crew.sum_of([1.0]) == [2.0]
        (other,) = others()
        other.terminate()
        assert crew.sum_of([1.0]) == [2.0], "the step is finished together"


def test_a_member_that_is_killed_ends_the_work_at_once() -> None:
    def work() -> None:
        with crew_of(["cpu", "cpu"], "tests.handlers.test_train_crew:add", {"sums": 2}, patient) as crew:
            crew.sum_of([1.0])
            (other,) = others()
            other.kill()
            crew.sum_of([1.0])

    with pytest.raises(MemberLost, match="One of the 2 processes that share this training ended"):
        work()
    assert not torch.distributed.is_initialized()
    assert not others()


def die_slowly(leave: Any) -> None:
    """Close every file, as a process does that was killed, and be gone only when the other side allows it."""
    mask = {signal.SIGUSR1}
    signal.pthread_sigmask(signal.SIG_BLOCK, mask)
    leave.send("ready")
    os.closerange(3, 256)
    signal.sigwait(mask)
    os._exit(3)


def test_a_member_that_is_still_dying_counts_as_lost() -> None:
    """On a busy machine a connection breaks seconds before there is an exit code."""
    spawning = multiprocessing.get_context("spawn")
    ours, theirs = spawning.Pipe()
    process = spawning.Process(target=die_slowly, args=(theirs,))
    process.start()
    assert process.pid
    theirs.close()
    assert ours.recv() == "ready"
    assert connection.wait([process.sentinel], 60)
    assert process.exitcode is None
    wake = threading.Timer(1.0, os.kill, (process.pid, signal.SIGUSR1))
    wake.start()
    lost = crew_room._lost_now([process])
    assert "ended (exit code 3)" in str(lost)
    process.join(60)
    wake.join()


def wait_in_vain(pipe: Any) -> None:
    """Join a crew whose other member ends before it is there: what waits for it is native code."""

    @contextmanager
    def limit(_seconds: float, end: Exception) -> Iterator[None]:
        if pipe.send(str(end)) is None:
            os._exit(0)
        yield

    with crew_of(["cpu", "cpu"], "nowhere:nothing", {}, limit):
        pass


def test_a_member_that_never_comes_is_not_waited_for() -> None:
    spawning = multiprocessing.get_context("spawn")
    ours, theirs = spawning.Pipe()
    process = spawning.Process(target=wait_in_vain, args=(theirs,))
    process.start()
    assert ours.poll(60), "it waits for two hours"
    assert "ended (exit code 1)" in ours.recv()
    process.join(60)
    assert process.exitcode == 0
