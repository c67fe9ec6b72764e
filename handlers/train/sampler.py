"""Pictures drawn while a model trains: the same prompts and the same noise each time, so that they can be compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image

STEPS = 20


def draw(
    pipeline: Any,
    unet: Any,
    text_encoder: Any,
    *,
    wanted: Sequence[tuple[str, int]],
    batch: int,
    resolution: int,
    guidance: float,
    device: str,
    should_stop: Callable[[], bool],
) -> list[Image.Image]:
    """Draw a picture for each prompt and seed.

    Args:
        pipeline: gives VAE, tokenizer and schedule.
        unet: the UNet as it is now; its mode is put back afterwards.
        text_encoder: the text encoder as it is now.
        wanted: (prompt, seed) a picture.
        batch: how many are drawn at once.
        resolution: pixels of a side.
        guidance: classifier-free guidance scale (Ho & Salimans 2022).
        device: where to compute.
        should_stop: asked after every denoising step.

    Returns:
        The pictures; none when it was stopped.
    """
    sampler = StableDiffusionPipeline(
        vae=pipeline.vae.to(device),
        text_encoder=text_encoder,
        tokenizer=pipeline.tokenizer,
        unet=unet,
        scheduler=DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    sampler.set_progress_bar_config(disable=True)
    stopped = False

    def after_step(running: Any, _step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        nonlocal stopped
        stopped = stopped or should_stop()
        running._interrupt = stopped  # noqa: SLF001 - the documented way to end a diffusers pipeline early
        return values

    trained = unet.training, text_encoder.training
    place = next(text_encoder.parameters()).device
    unet.eval()
    text_encoder.to(device).eval()
    pictures: list[Image.Image] = []
    try:
        for start in range(0, len(wanted), batch):
            if stopped:
                break
            part = wanted[start : start + batch]
            with torch.no_grad():
                drawn = sampler(
                    [prompt for prompt, _seed in part],
                    height=resolution,
                    width=resolution,
                    num_inference_steps=STEPS,
                    guidance_scale=guidance,
                    generator=[torch.Generator().manual_seed(seed) for _prompt, seed in part],
                    callback_on_step_end=after_step,
                )
            pictures.extend(drawn.images)
    finally:
        unet.train(trained[0])
        text_encoder.train(trained[1]).to(place)
        pipeline.vae.to("cpu")
    return [] if stopped else pictures
