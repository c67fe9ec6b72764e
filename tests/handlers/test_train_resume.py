"""Kill a training at any step: it ends with the same bytes."""

import json
import os
import random
import shutil
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest

from handlers.context import JobContext, Stopping
from handlers.models import miniature
from handlers.train.job import TrainHandler
from tests.handlers.train_process import finished, flip, run_child, tear, weights_of
from tests.handlers.train_session import make_long_session, make_session, payload_of

SPEC = """
text_encoder: {steps: 6, learning_rate: 1e-3}
unet: {steps: 8, learning_rate: 1e-3}
checkpoint_every: 2
sample_every: 0
offset_noise: 0.1
min_snr: 5
instance: zwx
prior: {images: 3, weight: 0.5}
"""
TOTAL = 14


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    miniature.ensure("miniature", folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(server: ForkServerContext, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    session = make_session(tmp_path_factory.mktemp("tree") / "Sessions" / "dog")
    steps = run_child(server, payload_of(session, SPEC), cache, None)
    assert steps == list(range(1, TOTAL + 1))
    return finished(session)


def test_training_changed_the_weights(undisturbed: dict[str, str], cache: Path) -> None:
    base = weights_of(miniature.folder_of("miniature", cache))
    for part in ("unet/diffusion_pytorch_model", "text_encoder/model"):
        assert undisturbed[f"{part}.safetensors"] != base[f"{part}.safetensors"]
    vae = "vae/diffusion_pytorch_model.safetensors"
    assert undisturbed[vae] == base[vae]


def checkpoints(session: Path) -> list[str]:
    return sorted(folder.name for folder in (session / "checkpoints").iterdir() if not folder.name.startswith("."))


def test_killed_in_both_stages_and_with_a_torn_checkpoint(
    server: ForkServerContext, cache: Path, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    session = make_session(tmp_path / "Sessions" / "dog")
    payload = payload_of(session, SPEC)
    # Before any checkpoint: from the start again. The pictures vanish: the run keeps the set that it began with.
    assert run_child(server, payload, cache, 1) == [1]
    for picture in session.glob("*.png"):
        picture.unlink()
    assert run_child(server, payload, cache, 5) == [1, 2, 3, 4, 5]
    assert checkpoints(session) == ["step-2", "step-4"]
    # Stage 2, killed; then the newest checkpoint is torn: the one before it counts.
    assert run_child(server, payload, cache, 11) == [5, 6, 7, 8, 9, 10, 11]
    assert checkpoints(session) == ["step-10", "step-8"]
    tear(session / "checkpoints" / "step-10" / "unet.safetensors")
    assert run_child(server, payload, cache, 13) == [9, 10, 11, 12, 13]
    # One flipped bit in the newest, and the other gone but for a half-written temp folder: back to what is left.
    flip(session / "checkpoints" / "step-12" / "optimizer.safetensors")
    (session / "checkpoints" / ".fastsd-tmp-1-00").mkdir()
    assert run_child(server, payload, cache, None) == [11, 12, 13, 14]
    assert finished(session) == undisturbed
    rows = [json.loads(line) for line in (session / "runs" / "r1" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, TOTAL + 1))
    log = (session / "runs" / "r1" / "log.txt").read_text()
    assert "step-10 is damaged" in log
    assert "step-12 is damaged" in log
    for step in range(1, TOTAL + 1):
        assert log.count(f" step {step}/{TOTAL} ") == 1


def test_killed_at_the_border_of_the_stages(
    server: ForkServerContext, cache: Path, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    session = make_session(tmp_path / "Sessions" / "dog")
    payload = payload_of(session, SPEC)
    assert run_child(server, payload, cache, 7)[-1] == 7
    assert checkpoints(session) == ["step-4", "step-6"]
    # A run that began needs its run.json alone.
    payload.update(spec=None, base=None, pictures=[])
    assert run_child(server, payload, cache, 7) == [7]
    shutil.rmtree(session / ".fastsd" / "frozen")
    assert run_child(server, payload, cache, None) == list(range(7, TOTAL + 1))
    assert finished(session) == undisturbed


@pytest.mark.soak
def test_killed_with_buckets(server: ForkServerContext, cache: Path, tmp_path: Path) -> None:
    """The order of the shapes is a function of the step: killed in both stages, its latents lost, the same bytes."""
    spec = SPEC + "buckets: true\nbatch_size: 2\n"
    whole = make_long_session(tmp_path / "whole" / "Sessions" / "dog")
    assert run_child(server, payload_of(whole, spec), cache, None) == list(range(1, TOTAL + 1))
    session = make_long_session(tmp_path / "killed" / "Sessions" / "dog")
    payload = payload_of(session, spec)
    assert run_child(server, payload, cache, 5) == [1, 2, 3, 4, 5]
    shutil.rmtree(session / ".fastsd" / "frozen")
    assert run_child(server, payload, cache, 11)[-1] == 11
    assert run_child(server, payload, cache, None) == [11, 12, 13, 14]
    assert finished(session) == finished(whole)
    assert len(json.loads((session / "runs" / "r1" / "run.json").read_text())["buckets"]) == 3


def test_renamed_while_it_trains_and_stopped(cache: Path, tmp_path: Path, undisturbed: dict[str, str]) -> None:
    """In this process: the folder moves at step 3, a wish to stop at 9 saves the state, and it moves once more."""
    root = tmp_path
    session = make_session(root / "Sessions" / "dog")
    moved, again = root / "Sessions" / "renamed", root / "Sessions" / "deeper" / "once more"
    again.parent.mkdir()
    payload = payload_of(session, SPEC)
    stop = False

    def report(done: float, total: float, note: str, facts: Any) -> None:
        nonlocal stop
        if done == 3 and "loss" in facts:
            session.rename(moved)
        stop = stop or (done == 9 and "loss" in facts)

    with pytest.raises(Stopping):
        TrainHandler().run(JobContext(1, "train", payload, "cpu", cache, report, lambda: False, lambda: stop))
    assert not session.exists()
    assert checkpoints(moved) == ["step-8", "step-9"]
    moved.rename(again)
    steps: list[float] = []
    context = JobContext(
        1, "train", payload, "cpu", cache, lambda done, *_: steps.append(done), lambda: False, lambda: False
    )
    result = TrainHandler().run(context)
    assert steps[:2] == [9, 10], "what was done, and the first step of this process"
    assert result.facts["finished"] == str(again / ".fastsd" / "finished" / "r1")
    assert finished(again) == undisturbed
    assert not session.exists()
    assert not moved.exists()
    # Asked again for a run that is finished, nothing is trained.
    heard = len(steps)
    assert TrainHandler().run(context).facts == result.facts
    assert len(steps) == heard


@pytest.mark.parametrize(
    "method", ["lora", pytest.param("finetune", marks=pytest.mark.soak), pytest.param("dora", marks=pytest.mark.soak)]
)
def test_methods_of_one_stage_end_the_same_when_killed(
    method: str, server: ForkServerContext, cache: Path, tmp_path: Path
) -> None:
    spec = f"{SPEC}method: {method}\n"
    whole = make_session(tmp_path / "a" / "Sessions" / "dog")
    assert run_child(server, payload_of(whole, spec), cache, None) == list(range(1, 9))
    killed = make_session(tmp_path / "b" / "Sessions" / "dog")
    assert run_child(server, payload_of(killed, spec), cache, 5) == list(range(1, 6))
    tear(killed / "checkpoints" / "step-4" / "unet.safetensors")
    assert run_child(server, payload_of(killed, spec), cache, None) == [3, 4, 5, 6, 7, 8]
    assert finished(killed) == finished(whole)


@pytest.mark.soak
@pytest.mark.parametrize("optimizer", ["prodigy", "adamw8bit", "adafactor"])
def test_every_optimizer_and_the_average_end_the_same_when_killed(
    optimizer: str, server: ForkServerContext, cache: Path, tmp_path: Path
) -> None:
    """Words that come and go, an average, and the optimizer's own memory: the same bytes, killed or not."""
    spec = f"{SPEC}optimizer: {optimizer}\nema: true\ncaption_dropout: 0.3\n"
    whole = make_session(tmp_path / "a" / "Sessions" / "dog")
    assert run_child(server, payload_of(whole, spec), cache, None) == list(range(1, TOTAL + 1))
    killed = make_session(tmp_path / "b" / "Sessions" / "dog")
    payload = payload_of(killed, spec)
    assert run_child(server, payload, cache, 5) == [1, 2, 3, 4, 5]
    assert run_child(server, payload, cache, 11)[-1] == 11
    assert run_child(server, payload, cache, None) == [11, 12, 13, 14]
    assert finished(killed) == finished(whole)


def test_killed_at_five_random_steps(
    server: ForkServerContext, cache: Path, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    """Five kills anywhere, some of them in each stage, and the newest checkpoint torn once: the same bytes."""
    seed = int.from_bytes(os.urandom(4), "big")
    chance = random.Random(seed)
    steps = sorted([*chance.sample(range(1, 7), 2), *chance.sample(range(7, TOTAL), 3)])
    torn = chance.choice(steps[1:])
    session = make_session(tmp_path / "Sessions" / "dog")
    payload = payload_of(session, SPEC)
    for step in steps:
        assert run_child(server, payload, cache, step)[-1] == step, f"seed {seed}"
        saved = session / "checkpoints"
        if step == torn and saved.is_dir() and (left := checkpoints(session)):
            newest = max(left, key=lambda name: int(name.partition("-")[2]))
            tear(chance.choice(sorted((saved / newest).glob("*.safetensors"))))
    assert run_child(server, payload, cache, None)[-1] == TOTAL
    assert finished(session) == undisturbed, f"seed {seed}: killed at {steps}, torn after {torn}"
