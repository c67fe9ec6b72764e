"""What Flux is told and what it learns, against diffusers' own pipeline and formulas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from handlers.convert import configure
from handlers.train.auto import make_plan
from handlers.train.base import BaseModel, find_base
from handlers.train.dataset import Frozen
from handlers.train.objective import Material, batches_of_step, losses
from handlers.train.speaking import speak
from handlers.train.trainable import TRANSFORMER_LAYERS, adapted
from sessions.refusal import Refusal
from sessions.spec import parse_spec
from tests.handlers.flux_models import DEV, SCHNELL, build

PROMPTS = ["a photo of zwx dog", "a"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux") / "Models"
    for name in (DEV, SCHNELL):
        build(name, folder)
    return folder


@pytest.fixture(scope="module", params=[DEV, SCHNELL])
def base(request: pytest.FixtureRequest, models: Path, cache: Path) -> BaseModel:
    return find_base(request.param, models, cache)


def whole_of(base: BaseModel) -> Any:
    return FluxPipeline.from_pretrained(base.folder, dtype=torch.float32, local_files_only=True)


def test_prompts_are_embedded_as_diffusers_does(base: BaseModel) -> None:
    spoken = speak(base.training, base.load_pipeline(), PROMPTS, "cpu", lambda _line: None)
    whole = whole_of(base)
    length = 512 if whole.transformer.config.guidance_embeds else 256
    for prompt, embedded in zip(PROMPTS, spoken, strict=True):
        with torch.no_grad():
            hidden, pooled, text_ids = whole.encode_prompt([prompt], device="cpu", max_sequence_length=length)
        torch.testing.assert_close(embedded.hidden, hidden, rtol=0, atol=0)
        assert embedded.pooled is not None
        torch.testing.assert_close(embedded.pooled, pooled, rtol=0, atol=0)
        told = base.training.condition(embedded, torch.zeros(1, 6))
        torch.testing.assert_close(told["txt_ids"], text_ids, rtol=0, atol=0)


def material_of(base: BaseModel, pipeline: Any, *, batch: int = 3) -> Material:
    plan = make_plan(
        parse_spec(f"batch_size: {batch}\nresolution: 256"), base.facts, [{"source": "zwx.png"}] * 3, "s", "fp32"
    )
    random = torch.Generator().manual_seed(4)
    shape = (4, 8, 12)  # not square: a row exchanged for a column shows
    frozen = Frozen(
        [torch.randn(shape, generator=random) for _ in range(3)],
        [torch.rand(shape, generator=random) for _ in range(3)],
    )
    return Material(plan, frozen, 3, base.training.objective(pipeline), "cpu")


def test_the_loss_is_that_of_diffusers_script(base: BaseModel) -> None:
    """The formulas of diffusers' train_dreambooth_lora_flux.py, written out with its own pipeline's functions."""
    pipeline = base.load_pipeline()
    material = material_of(base, pipeline)
    (batch,) = batches_of_step(material, 2, 5)
    spoken = speak(base.training, pipeline, PROMPTS[:1], "cpu", lambda _line: None)[0].of([0, 0, 0])
    transformer = base.load_denoiser().eval()
    with torch.no_grad():
        ours = losses(material, transformer, batch, base.training.condition(spoken, torch.zeros(3, 6)))

    vae = pipeline.vae.config
    mean, _ = material.frozen.of(batch.chosen)
    assert torch.equal((batch.latents / vae.scaling_factor + vae.shift_factor - mean).sign(), _signs(material, batch))
    schedule = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    places = [(schedule.timesteps == level).nonzero().item() for level in batch.timesteps]
    sigmas = schedule.sigmas[places].view(3, 1, 1, 1)
    noisy = (1.0 - sigmas) * batch.latents + sigmas * batch.noise
    packed = FluxPipeline._pack_latents(noisy, 3, 4, 8, 12)
    ids = FluxPipeline._prepare_latent_image_ids(3, 4, 6, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        answer = transformer(
            hidden_states=packed,
            timestep=batch.timesteps / 1000,
            guidance=torch.ones(3) if transformer.config.guidance_embeds else None,
            pooled_projections=spoken.pooled,
            encoder_hidden_states=spoken.hidden,
            txt_ids=torch.zeros(spoken.hidden.shape[1], 3),
            img_ids=ids,
            return_dict=False,
        )[0]
    predicted = FluxPipeline._unpack_latents(answer, 8 * 8, 12 * 8, 8)
    wanted = ((predicted - (batch.noise - batch.latents)) ** 2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-6)


def _signs(material: Material, batch: Any) -> torch.Tensor:
    """On which side of its mean each number was drawn: deviations are not negative."""
    from handlers.train import randomness

    shape = tuple(batch.latents.shape)
    return randomness.noise(shape, material.plan.seed, 2, 5, "latents").sign()


def test_levels_have_the_logit_normal_density_and_are_the_same_again(base: BaseModel) -> None:
    objective = base.training.objective(base.load_pipeline())
    many = torch.cat([objective.timesteps(4, 7, 2, step, "timesteps") for step in range(2000)]) / 1000
    logits = torch.logit(many.double(), eps=1e-6)
    assert abs(logits.mean()) < 0.02
    assert abs(logits.std() - 1) < 0.02
    assert torch.equal(objective.timesteps(4, 7, 2, 3, "timesteps"), objective.timesteps(4, 7, 2, 3, "timesteps"))
    # One of each quarter of the density: below -0.674, to 0, to 0.674, above.
    for step in range(20):
        found = torch.logit(objective.timesteps(4, 7, 2, step, "timesteps") / 1000).sort().values
        assert torch.equal(torch.bucketize(found, torch.tensor([-0.68, 0.0, 0.67])), torch.arange(4)), found


def test_pictures_are_those_that_diffusers_draws(base: BaseModel) -> None:
    from handlers.train import sampler

    pipeline = base.load_pipeline()
    spoken = speak(base.training, pipeline, PROMPTS, "cpu", lambda _line: None)
    drawn = sampler.draw(
        base.training,
        pipeline,
        base.load_denoiser(),
        wanted=[(prompt, 3 + index) for index, prompt in enumerate(PROMPTS)],
        embedded=dict(zip(PROMPTS, spoken, strict=True)),
        batch=2,
        resolution=64,
        guidance=3.5,
        device="cpu",
        should_stop=lambda: False,
    )
    whole = whole_of(base)
    guided = whole.transformer.config.guidance_embeds
    whole.set_progress_bar_config(disable=True)
    wanted = whole(
        prompt_embeds=torch.cat([each.hidden for each in spoken]),
        pooled_prompt_embeds=torch.cat([each.pooled for each in spoken if each.pooled is not None]),
        height=64,
        width=64,
        num_inference_steps=20 if guided else 4,
        guidance_scale=3.5 if guided else 0.0,
        generator=[torch.Generator().manual_seed(3 + index) for index in range(2)],
    ).images
    assert [picture.tobytes() for picture in drawn] == [picture.tobytes() for picture in wanted]


@pytest.mark.parametrize(
    ("text", "what", "line"),
    [
        ("base: flux-dev\nmethod: dreambooth\n", "All of flux-dev cannot be trained", 2),
        ("method: finetune\nbase: flux-schnell\n", "All of flux-schnell cannot be trained", 1),
        ("base: flux-dev\nmin_snr: 5\n", "min_snr weighs", 2),
        ("base: flux-dev\nseed: 1\noffset_noise: 0.1\n", "offset_noise mends", 3),
        ("base: flux-dev\ntext_encoder:\n  steps: 100\n", "text encoders of flux-dev are not trained", 3),
        ("base: flux-dev\nlora:\n  rank: 8\n  convolutions: true\n", "flux-dev has no convolutions", 4),
        ("base: flux-dev\nresolution: 2048\n", "cannot be trained at 2048", 2),
    ],
)
def test_what_flux_does_not_do_is_refused_with_its_line(text: str, what: str, line: int, models: Path) -> None:
    with pytest.raises(Refusal, match=what) as refused:
        parse_spec(text)
    assert refused.value.line == line
    # The same of a base whose name does not tell what it is.
    own = text.replace("base: flux-dev\n", "").replace("base: flux-schnell\n", "")
    if "resolution" not in text:
        with pytest.raises(Refusal, match=what.replace("flux-dev", DEV).replace("flux-schnell", DEV)):
            make_plan(parse_spec(own), find_base(DEV, models, models).facts, [{"source": "zwx.png"}] * 3, "s", "fp32")


def test_what_auto_means_for_flux(models: Path, cache: Path) -> None:
    facts = find_base(DEV, models, cache).facts
    plan = make_plan(parse_spec("concept: style"), facts, [{"source": "zwx.png"}] * 10, "s", "bf16")
    assert (plan.family, plan.method, plan.resolution, plan.unet_steps) == ("flux", "lora", 512, 1500)
    assert (plan.unet_rate, plan.text_encoder_steps, plan.offset_noise, plan.min_snr) == (1e-4, 0, 0.0, None)


def test_the_adapter_of_the_real_flux() -> None:
    """By its structure alone: no numbers are needed to count them."""
    config = json.loads((Path(configure.__file__).parent / "configs" / "flux.json").read_bytes())
    with torch.device("meta"):
        whole = FluxTransformer2DModel.from_config(config["documents"]["transformer/config.json"])
        adapter = adapted(whole, TRANSFORMER_LAYERS, rank=16, alpha=16, dora=False, seed=1)
    assert sum(each.numel() for each in adapter.tensors().values()) == 65_372_160
    assert len(adapter.tensors()) == 2 * (19 * 12 + 38 * 5)
