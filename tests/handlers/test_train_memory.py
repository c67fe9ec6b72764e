"""Memory: what is chosen before a run, what is given up in it, and that neither changes what is learned."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from handlers.context import JobContext
from handlers.models import miniature
from handlers.train import memory
from handlers.train.base import find_base
from handlers.train.fitting import Fitting
from handlers.train.job import TrainHandler
from handlers.train.memory import Load, Means, choose, least
from handlers.train.offload import Offloaded
from handlers.train.optimizers import InBackward, Together, Updates, usable_optimizers
from handlers.train.trainable import UNET_LAYERS, adapted
from sessions.refusal import Refusal
from sessions.spec import parse_spec
from tests.handlers.train_session import make_session, payload_of

UNET = "unet/diffusion_pytorch_model.safetensors"
ALL = frozenset({"adamw", "adamw8bit", "adafactor", "prodigy"})
loads = st.builds(
    Load,
    family=st.sampled_from(["sd1", "sd2", "sdxl", "flux"]),
    trained=st.integers(1_000_000, 4_000_000_000),
    frozen=st.integers(0, 12_000_000_000),
    denoiser=st.integers(1_000_000, 12_000_000_000),
    resolution=st.sampled_from([512, 768, 1024]),
    pictures=st.integers(1, 16),
    half=st.booleans(),
    adapter=st.booleans(),
    average=st.booleans(),
    quantises=st.booleans(),
    scales_loss=st.booleans(),
)


@given(load=loads, sizes=st.tuples(st.floats(4, 100), st.floats(4, 100)))
def test_what_is_chosen_fits_and_a_larger_card_can_do_no_less(load: Load, sizes: tuple[float, float]) -> None:
    small, large = sorted(size * 1e9 for size in sizes)
    chosen = choose(load, None, ALL, small)
    if chosen is None:
        assert least(load, None, ALL) > small
        return
    assert load.bytes_of(chosen) <= small
    assert least(load, None, ALL) <= small
    assert choose(load, None, ALL, large) is not None
    assert not (chosen.fused_backward and load.pictures > 1), "nothing is added up in a fused backward pass"
    assert not (chosen.fused_backward and load.scales_loss), "float16's gradients vanish where the loss is not scaled"
    assert not (chosen.offload and not load.adapter), "what is trained must stay"


@given(load=loads, may_offload=st.booleans(), pictures=st.integers(1, 64))
def test_each_step_down_takes_no_more_memory_and_there_is_an_end(load: Load, may_offload: bool, pictures: int) -> None:
    means: Means | None = Means(pictures)
    seen = []
    while means:
        seen.append(means)
        means = means.less(may_offload=may_offload)
    taken = [load.bytes_of(each) for each in seen]
    assert taken == sorted(taken, reverse=True)
    assert seen[-1].at_once == 1
    assert seen[-1].checkpointing
    assert seen[-1].offload == may_offload
    assert len(seen) <= 3 + math.ceil(math.log2(pictures))


def test_the_presets_of_the_real_families() -> None:
    def chosen(load: Load, size: str) -> Means | None:
        return choose(load, None, ALL, memory.bytes_named(size))

    def optimizer(load: Load, size: str) -> str:
        means = chosen(load, size)
        return means.optimizer if means else ""

    sd15 = Load("sd1", 983_000_000, 0, 860_000_000, 512, 1, half=True, adapter=False)
    assert [optimizer(sd15, size) for size in ("8GB", "16GB", "24GB")] == ["adafactor", "adamw8bit", "adamw"]
    sdxl = Load("sdxl", 2_567_000_000, 0, 2_567_000_000, 1024, 1, half=True, adapter=False)
    assert chosen(sdxl, "16GB") is None
    assert chosen(sdxl, "24GB") == Means(1, checkpointing=True, optimizer="adafactor", fused_backward=True)
    lora = Load("sdxl", 23_000_000, 2_567_000_000, 2_567_000_000, 1024, 1, half=True, adapter=True)
    assert chosen(lora, "12GB") == Means(1, checkpointing=True)
    assert chosen(lora, "8GB") == Means(1, checkpointing=True, offload=True)


def test_the_presets_of_flux() -> None:
    """What FLUX.1 asks by its size: 11.9 billion numbers, and a LoRA of rank 16 in all its blocks."""
    load = Load("flux", 65_000_000, 11_901_000_000, 11_901_000_000, 512, 1, half=True, adapter=True, quantises=True)
    expected = {
        "8GB": Means(1, checkpointing=True, quantised=True, offload=True),
        "12GB": Means(1, checkpointing=True, quantised=True),
        "16GB": Means(1, quantised=True),
        "24GB": Means(1, quantised=True),
        "48GB": Means(1),
    }
    assert {size: choose(load, None, ALL, memory.bytes_named(size)) for size in expected} == expected
    whole = replace(load, quantises=False)
    assert choose(whole, None, ALL, memory.bytes_named("24GB")) == Means(1, checkpointing=True, offload=True)


def test_all_of_sdxl_in_a_small_card_is_refused_when_the_file_is_read() -> None:
    with pytest.raises(Refusal, match="cannot be trained in memory: 12GB") as refused:
        parse_spec("base: sdxl\nmethod: dreambooth\nmemory: 12GB\n")
    assert refused.value.line == 3
    assert parse_spec("base: sdxl\nmethod: lora\nmemory: 8GB\n").memory == "8GB"


def run(session: Path, cache: Path, spec: str) -> JobContext:
    context = JobContext(
        1, "train", payload_of(session, spec), "cpu", cache, lambda *_: None, lambda: False, lambda: False
    )
    TrainHandler().run(context)
    return context


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    miniature.ensure("miniature", folder)
    return folder


class SmallCard:
    """A real UNet that runs out of memory where a step takes too much of it, as a small GPU would."""

    def __init__(self, fits: int) -> None:
        self.fits = fits

    def load(self, folder: Path) -> Any:
        unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", dtype=torch.float32)

        def look(module: Any, arguments: tuple[Any, ...]) -> None:
            taken = len(arguments[0]) * (1 if module.is_gradient_checkpointing else 2)
            if torch.is_grad_enabled() and taken > self.fits:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        unet.register_forward_pre_hook(look)
        return unet


def test_out_of_memory_goes_on_from_the_same_step(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = (
        "text_encoder: {steps: 2, learning_rate: 1e-4}\nunet: {steps: 4, learning_rate: 1e-4}\nbatch_size: 4\n"
        "sample_every: 0\ncheckpoint_every: 1\nclass: shape\nprior: {images: 3}\n"
    )
    whole = make_session(tmp_path / "a" / "Sessions" / "dog")
    run(whole, cache, spec)
    small = make_session(tmp_path / "b" / "Sessions" / "dog")
    # The pictures that are drawn before the first step need no gradients; a step needs checkpointing and two at once.
    monkeypatch.setattr("handlers.train.families.unet.load_unet", SmallCard(2).load)
    run(small, cache, spec)
    log = (small / "runs" / "r1" / "log.txt").read_text()
    assert "memory ran out in step 1: goes on with adamw, 8 pictures at once, gradient checkpointing" in log
    assert "memory ran out in step 1: goes on with adamw, 2 pictures at once, gradient checkpointing" in log
    rows = [json.loads(line) for line in (small / "runs" / "r1" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 7))
    ours = load_file(small / ".fastsd" / "finished" / "r1" / UNET)
    theirs = load_file(whole / ".fastsd" / "finished" / "r1" / UNET)
    base = load_file(miniature.folder_of("miniature", cache) / UNET)
    update = torch.cat([(theirs[key] - base[key]).flatten() for key in theirs]).float()
    apart = torch.cat([(ours[key] - theirs[key]).flatten() for key in theirs]).float()
    assert apart.norm() < 0.02 * update.norm(), "the same but for the order of sums"


def test_where_nothing_is_left_to_give_up(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = make_session(tmp_path / "Sessions" / "dog")
    monkeypatch.setattr("handlers.train.families.unet.load_unet", SmallCard(0).load)
    with pytest.raises(Refusal, match="Memory ran out in step 1") as refused:
        run(session, cache, "text_encoder: {steps: 0}\nunet: {steps: 2}\nsample_every: 0\n")
    assert refused.value.code == "memory"


def little_network() -> torch.nn.Sequential:
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4))


def adafactor(groups: list[dict[str, Any]]) -> Any:
    from transformers.optimization import Adafactor

    return Adafactor(groups, lr=0.0, scale_parameter=False, relative_step=False)


def test_a_fused_backward_pass_learns_the_same() -> None:
    networks = [little_network(), little_network()]
    groups = [{"net": dict(network.named_parameters())} for network in networks]
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    updates: list[Updates] = [Together(groups[0], adafactor, scaler), InBackward(groups[1], adafactor)]
    for step in range(5):
        seen = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        for network, each in zip(networks, updates, strict=True):
            each.set_rates({"net": 1e-2})
            each.backward(network(seen).square().mean() * 1e-2)  # far below a norm of 1: nothing is clipped
            each.apply()
    assert all(parameter.grad is None for network in networks for parameter in network.parameters())
    fresh = little_network()
    for (name, ours), theirs in zip(networks[0].named_parameters(), networks[1].parameters(), strict=True):
        assert torch.equal(ours, theirs), name
        assert not torch.equal(ours, fresh.get_parameter(name))
    each = updates[1]
    each.backward(networks[1](torch.randn(1, 8)).sum())
    with pytest.raises(RuntimeError, match="changed already"):
        each.forget()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_blocks_that_come_and_go_give_the_same_gradients(cache: Path, checkpointing: bool) -> None:
    base = find_base("miniature", None, cache)

    def gradients(*, offload: bool) -> tuple[dict[str, torch.Tensor], int]:
        unet = base.load_denoiser().train()
        adapter = adapted(unet, UNET_LAYERS, rank=4, alpha=4, dora=False, seed=1)
        for name, parameter in adapter.parameters().items():
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
        if checkpointing:
            unet.enable_gradient_checkpointing()
        most = 0
        if offload:
            here: set[int] = set()

            def park(tensor: torch.Tensor) -> torch.Tensor:
                return tensor.clone()

            def fetch(parked: torch.Tensor) -> torch.Tensor:
                return parked.clone()

            offloaded = Offloaded(unet, park, fetch)
            assert len(offloaded.blocks) > 3
            frozen = [each for each in unet.parameters() if not each.requires_grad]

            def count(*_: Any) -> None:
                nonlocal most
                here.clear()
                here.update(id(block) for block in offloaded.blocks if block.is_here)
                most = max(most, len(here))

            for module in unet.modules():
                module.register_forward_hook(count)
            assert sum(each.numel() == 0 for each in frozen) > 20
        noisy = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
        hidden = torch.randn(2, 77, unet.config.cross_attention_dim, generator=torch.Generator().manual_seed(6))
        for _ in range(2):
            unet.zero_grad()
            unet(noisy, torch.tensor([5, 700]), hidden).sample.square().mean().backward()
        return {name: parameter.grad.clone() for name, parameter in adapter.parameters().items()}, most

    plain, _ = gradients(offload=False)
    moved, most = gradients(offload=True)
    assert any(gradient.abs().max() > 0 for gradient in plain.values())
    assert all(torch.equal(plain[name], moved[name]) for name in plain)
    assert 1 <= most <= 2, "one that computes, and one that gradients passed through last"


def test_a_fitting_offloads_at_the_end_of_the_ladder(cache: Path) -> None:
    unet = find_base("miniature", None, cache).load_denoiser().train()
    adapter = adapted(unet, UNET_LAYERS, rank=2, alpha=2, dora=False, seed=1)
    groups = {"unet": adapter.parameters()}
    updates = Together(
        groups, lambda group: torch.optim.AdamW(group, lr=0.0), torch.amp.GradScaler("cpu", enabled=False)
    )
    lines: list[str] = []
    fitting = Fitting(Means(2), unet, (), "cpu", may_offload=True, told=lines.append)
    for _ in range(3):
        fitting.give_up(updates, "step 1")
    assert fitting.means == Means(1, checkpointing=True, offload=True)
    assert len(lines) == 3
    with pytest.raises(Refusal, match="nothing is left"):
        fitting.give_up(updates, "step 1")
    hidden = torch.randn(1, 77, unet.config.cross_attention_dim)
    unet(torch.randn(1, 4, 8, 8), torch.tensor([5]), hidden).sample.mean().backward()
    assert all(parameter.grad is not None for parameter in groups["unet"].values())


def test_the_optimizers_of_this_machine() -> None:
    assert usable_optimizers() == ALL


@pytest.mark.soak
# torch's compiler warns of itself, and an error there would mean that nothing is compiled.
@pytest.mark.filterwarnings("ignore")
def test_compiled_blocks_learn_the_same(cache: Path, tmp_path: Path) -> None:
    spec = "text_encoder: {steps: 0}\nunet: {steps: 3, learning_rate: 1e-4}\nbatch_size: 2\nsample_every: 0\n"
    folders = {}
    for compiled in ("true", "false"):
        session = make_session(tmp_path / compiled / "Sessions" / "dog")
        run(session, cache, f"{spec}compile: {compiled}\n")
        folders[compiled] = session / ".fastsd" / "finished" / "r1"
    ours, theirs = (load_file(folders[each] / UNET) for each in ("true", "false"))
    base = load_file(miniature.folder_of("miniature", cache) / UNET)
    update = torch.cat([(theirs[key] - base[key]).flatten() for key in theirs]).float()
    apart = torch.cat([(ours[key] - theirs[key]).flatten() for key in theirs]).float()
    assert 0 < apart.norm() < 0.02 * update.norm(), "compiled, and the same but for rounding"
