"""What GPUs do to a training, done on the CPU: losses that overflow, channels last, memory that runs out."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from handlers.context import JobContext, Stopping
from handlers.models import miniature
from handlers.out_of_memory import is_out_of_memory
from handlers.train import sampler
from handlers.train.base import find_base
from handlers.train.families.interface import Asked
from handlers.train.families.sd import StableDiffusion
from handlers.train.job import TrainHandler
from handlers.train.optimizers import Together
from sessions.refusal import Refusal
from tests.handlers.train_session import make_session, payload_of

Make = Callable[[list[dict[str, Any]]], Any]


def adamw(groups: list[dict[str, Any]]) -> Any:
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=1e-2, fused=True)


def adamw8bit(groups: list[dict[str, Any]]) -> Any:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(groups, lr=0.0, weight_decay=1e-2)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    miniature.ensure("miniature", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.mark.parametrize("make", [adamw, adamw8bit])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_an_overflow_in_one_part_changes_no_part(make: Make, bad: float) -> None:
    parts = {name: torch.nn.Parameter(torch.linspace(-1.0, 1.0, 64)) for name in ("unet", "text_encoder")}
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    updates = Together({name: {f"{name}.weight": each} for name, each in parts.items()}, make, scaler)
    updates.set_rates(dict.fromkeys(parts, 1e-2))
    before = {name: each.detach().clone() for name, each in parts.items()}
    scale = scaler.get_scale()
    updates.backward((parts["unet"] * torch.full((64,), bad)).sum() + parts["text_encoder"].square().sum())
    updates.apply()
    assert all(torch.equal(each, before[name]) for name, each in parts.items())
    assert scaler.get_scale() < scale
    updates.backward(sum(each.square().sum() for each in parts.values()))
    updates.apply()
    for name, each in parts.items():
        assert torch.isfinite(each).all(), name
        assert not torch.equal(each, before[name]), name


@pytest.mark.parametrize("make", [adamw, adamw8bit])
def test_a_convolution_with_its_channels_last_goes_on_as_if_nothing_had_been(make: Make) -> None:
    def begin(weights: torch.Tensor) -> tuple[torch.nn.Parameter, Together]:
        parameter = torch.nn.Parameter(weights.clone(memory_format=torch.channels_last))
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        updates = Together({"unet": {"unet.weight": parameter}}, make, scaler)
        updates.set_rates({"unet": 1e-2})
        return parameter, updates

    def step(parameter: torch.nn.Parameter, updates: Together, number: int) -> None:
        seen = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        updates.backward((parameter * seen).sum() + parameter.square().sum())
        updates.apply()

    whole, its_updates = begin(torch.randn(32, 24, 3, 3, generator=torch.Generator().manual_seed(0)))
    for number in range(3):
        step(whole, its_updates, number)
    # As a checkpoint writes them.
    saved = {name: value.detach().cpu().contiguous() for name, value in its_updates.tensors().items()}
    resumed, updates = begin(whole.detach())
    updates.restore(saved)
    for number in range(3, 6):
        step(whole, its_updates, number)
        step(resumed, updates, number)
    assert torch.equal(whole, resumed)


def test_memory_that_runs_out_in_an_update_is_told_plainly(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first update makes the optimizer's moments: on a full card, nobody had looked for their room before."""
    session = make_session(tmp_path / "Sessions" / "dog")

    def full(_self: Together) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Together, "apply", full)
    payload = payload_of(session, "text_encoder: {steps: 0}\nunet: {steps: 2}\nsample_every: 0\n")
    context = JobContext(1, "train", payload, "cpu", cache, lambda *_: None, lambda: False, lambda: False)
    with pytest.raises(Refusal, match="Memory ran out in the update of step 1") as refused:
        TrainHandler().run(context)
    assert refused.value.code == "memory"
    assert not list((session / "checkpoints").glob("*")), "what may be half changed is not saved"


def test_what_a_failed_step_computed_is_gone_before_it_is_done_again(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the second try runs out of memory as well, and everything is given up for nothing."""
    session = make_session(tmp_path / "Sessions" / "dog")
    kept: list[Any] = []
    left: list[bool] = []
    backward, forget = Together.backward, Together.forget

    def fail_once(self: Together, loss: torch.Tensor) -> None:
        if not kept:
            kept.append(weakref.ref(loss))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        backward(self, loss)

    def look(self: Together) -> None:
        gc.collect()
        left.append(kept[0]() is not None)
        forget(self)

    monkeypatch.setattr(Together, "backward", fail_once)
    monkeypatch.setattr(Together, "forget", look)
    payload = payload_of(session, "text_encoder: {steps: 0}\nunet: {steps: 1}\nsample_every: 0\n")
    TrainHandler().run(JobContext(1, "train", payload, "cpu", cache, lambda *_: None, lambda: False, lambda: False))
    assert left
    assert not left[0]


@pytest.mark.parametrize(
    "words",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    ],
)
def test_libraries_say_in_their_own_words_that_memory_ran_out(words: str) -> None:
    assert is_out_of_memory(RuntimeError(words))


class SmallCard(StableDiffusion):
    """SD 1 on a card on which so many pictures are drawn at once, and no more."""

    fits = 1

    def draw(self, whole: Any, asked: Asked) -> list[Any]:
        if len(asked.prompts) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().draw(whole, asked)


class FullCard(SmallCard):
    """No picture has room on it."""

    fits = 0


def test_samples_that_have_no_room_together_are_drawn_one_by_one(cache: Path) -> None:
    base = find_base("miniature", None, cache)
    pipeline, unet = base.load_pipeline(), base.load_denoiser().train()
    pipeline.text_encoder.train()

    def draw(wanted: list[tuple[str, int]], family: SmallCard) -> list[Any]:
        return sampler.draw(
            family,
            pipeline,
            unet,
            wanted=wanted,
            batch=len(wanted),
            resolution=64,
            guidance=3.0,
            device="cpu",
            should_stop=lambda: False,
        )

    first, second = draw([("a red circle", 1), ("a blue square", 2)], SmallCard("sd1"))
    assert first.tobytes() == draw([("a red circle", 1)], SmallCard("sd1"))[0].tobytes()
    assert second.tobytes() == draw([("a blue square", 2)], SmallCard("sd1"))[0].tobytes()
    with pytest.raises(torch.OutOfMemoryError):
        draw([("a red circle", 1), ("a blue square", 2)], FullCard("sd1"))
    assert unet.training
    assert pipeline.text_encoder.training


def test_a_run_whose_latents_were_lost_stops_while_it_makes_them_again(cache: Path, tmp_path: Path) -> None:
    session = make_session(tmp_path / "Sessions" / "dog")
    payload = payload_of(session, "text_encoder: {steps: 0}\nunet: {steps: 3}\nsample_every: 0\n")
    done: list[float] = []

    def report(number: float, _total: float, _note: str, facts: Any) -> None:
        if "loss" in facts:
            done.append(number)

    for _ in range(2):
        with pytest.raises(Stopping):
            TrainHandler().run(JobContext(1, "train", payload, "cpu", cache, report, lambda: False, lambda: bool(done)))
        shutil.rmtree(session / ".fastsd" / "frozen", ignore_errors=True)
    assert done == [1.0]
    assert "encoded the pictures again" not in (session / "runs" / "r1" / "log.txt").read_text()
