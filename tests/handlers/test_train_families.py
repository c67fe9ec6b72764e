"""What a family tells its UNet, against what diffusers' own pipeline tells it."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

from handlers.context import Waiting
from handlers.models import miniature
from handlers.train.base import find_base
from handlers.train.families.interface import joined
from handlers.train.trainable import adapted, layers_of
from tests.handlers.flux_models import DEV, build

PROMPTS = ["a zwx star on a blue background", "a small red circle"]


@pytest.mark.parametrize("name", ["miniature", "miniature-sd2"])
def test_prompts_are_embedded_as_diffusers_does(name: str, cache: Path) -> None:
    base = find_base(name, None, cache)
    pipeline = base.load_pipeline()
    whole = StableDiffusionPipeline.from_pretrained(miniature.ensure(name, cache), local_files_only=True)
    with torch.no_grad():
        embedded = base.training.embed(pipeline, base.training.tokens(pipeline, PROMPTS))
        wanted, _ = whole.encode_prompt(PROMPTS, "cpu", 1, False)
    torch.testing.assert_close(embedded.hidden, wanted, rtol=0, atol=0)
    assert base.training.condition(embedded, torch.zeros(2, 6)).keys() == {"encoder_hidden_states"}


def test_sdxl_is_told_what_diffusers_tells_it(cache: Path) -> None:
    base = find_base("miniature-sdxl", None, cache)
    pipeline = base.load_pipeline()
    folder = miniature.ensure("miniature-sdxl", cache)
    whole = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True, add_watermarker=False)
    with torch.no_grad():
        tokens = base.training.tokens(pipeline, PROMPTS)
        embedded = base.training.embed(pipeline, tokens)
        hidden, _, pooled, _ = whole.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=False)
    torch.testing.assert_close(embedded.hidden, hidden, rtol=0, atol=0)
    torch.testing.assert_close(embedded.pooled, pooled, rtol=0, atol=0)
    sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).repeat(2, 1)
    told = base.training.condition(embedded, sizes)
    latents, steps = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([500, 20])
    ids = whole._get_add_time_ids((64, 64), (0, 0), (64, 64), torch.float32, pooled.shape[-1]).repeat(2, 1)
    with torch.no_grad():
        unet = base.load_denoiser()
        ours = unet(latents, steps, **told).sample
        theirs = whole.unet(
            latents, steps, encoder_hidden_states=hidden, added_cond_kwargs={"text_embeds": pooled, "time_ids": ids}
        ).sample
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_without_words_sdxl_is_told_what_diffusers_leads_away_from(cache: Path) -> None:
    """Zeros, where the base says so: else a lesson without words would teach what no picture is drawn with."""
    base = find_base("miniature-sdxl", None, cache)
    pipeline = base.load_pipeline()
    folder = miniature.ensure("miniature-sdxl", cache)
    whole = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True, add_watermarker=False)
    assert pipeline.config.force_zeros_for_empty_prompt
    for zeros in (True, False):
        pipeline.register_to_config(force_zeros_for_empty_prompt=zeros)
        whole.register_to_config(force_zeros_for_empty_prompt=zeros)
        with torch.no_grad():
            embedded = base.training.embed(pipeline, base.training.tokens(pipeline, [PROMPTS[0], ""]))
            hidden, without, pooled, pooled_without = whole.encode_prompt(PROMPTS[0], device="cpu")
        torch.testing.assert_close(embedded.hidden, torch.cat([hidden, without]), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(embedded.pooled, torch.cat([pooled, pooled_without]), rtol=1e-5, atol=1e-5)
        assert bool(embedded.hidden[1].any()) is not zeros


def test_some_of_the_prompts_are_those_prompts(cache: Path) -> None:
    base = find_base("miniature-sdxl", None, cache)
    pipeline = base.load_pipeline()
    with torch.no_grad():
        tokens = base.training.tokens(pipeline, PROMPTS)
        whole = base.training.embed(pipeline, tokens)
        rows = [{name: ids[row : row + 1] for name, ids in tokens.items()} for row in (0, 1)]
        parts = joined([base.training.embed(pipeline, row) for row in rows])
    second = whole.of([1, 0])
    assert second.pooled is not None
    assert parts.pooled is not None
    torch.testing.assert_close(second.hidden, whole.hidden.flip(0), rtol=0, atol=0)
    torch.testing.assert_close(parts.hidden, whole.hidden, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parts.pooled, whole.pooled, rtol=1e-5, atol=1e-5)


def test_sdxls_schedule_of_noise_is_that_of_its_sampler(cache: Path) -> None:
    pipeline = find_base("miniature-sdxl", None, cache).load_pipeline()
    noise = DDPMScheduler.from_config(pipeline.scheduler.config)
    torch.testing.assert_close(noise.alphas_cumprod, pipeline.scheduler.alphas_cumprod)


def test_auto_is_what_the_gpu_can_train_and_what_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for gpu_bytes, name in ((0, "sd15"), (8 * 1024**3, "sd15"), (24 * 1024**3, "sdxl")):
        with pytest.raises(Waiting, match=f"fastsd models get {name}$"):
            find_base("auto", None, tmp_path, gpu_bytes)
    folder = tmp_path / "models" / "sd15"
    shutil.copytree(miniature.ensure("miniature", tmp_path), folder)
    assert find_base("auto", None, tmp_path, 24 * 1024**3).model.name == "sd15"


@pytest.mark.parametrize(
    ("name", "convolutions"),
    [("miniature", False), ("miniature", True), ("miniature-sdxl", False), ("miniature-sdxl", True), (DEV, False)],
)
def test_the_size_of_an_adapter_is_told_from_headers(
    name: str, convolutions: bool, cache: Path, tmp_path: Path
) -> None:
    if name == DEV:
        build(name, tmp_path)
    base = find_base(name, tmp_path, cache)
    pipeline, denoiser = base.load_pipeline(), base.load_denoiser()
    encoders = {part: getattr(pipeline, part) for part in base.training.encoders if name != DEV}
    modules = {base.training.denoiser: denoiser, **encoders}
    layers = {part: layers_of(part, convolutions=convolutions) for part in modules}
    made = [adapted(modules[part], layers[part], rank=3, alpha=3, dora=False, seed=1) for part in modules]
    wanted = sum(tensor.numel() for adapter in made for tensor in adapter.tensors().values())
    assert base.adapter_parameters(layers, 3) == wanted > 0
