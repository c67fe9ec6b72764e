"""Pictures drawn while a model trains: the same prompts and the same noise each time, so that they can be compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from handlers.out_of_memory import is_out_of_memory
from handlers.train.families import Embedded, Family
from handlers.train.families.interface import Asked, joined


def draw(
    family: Family,
    pipeline: Any,
    denoiser: Any,
    *,
    wanted: Sequence[tuple[str, int]],
    embedded: Mapping[str, Embedded] | None = None,
    batch: int,
    resolution: int,
    guidance: float,
    device: str,
    should_stop: Callable[[], bool],
) -> list[Image.Image]:
    """Draw a picture for each prompt and seed.

    Args:
        family: of the base.
        pipeline: gives VAE, tokenizers, schedule and the text encoders as they are now; modes are put back afterwards.
        denoiser: the UNet or transformer as it is now.
        wanted: (prompt, seed) a picture.
        embedded: prompt → of one prompt, where the family draws from embeddings; its text encoders are not needed.
        batch: how many are drawn at once; fewer where memory runs out.
        resolution: pixels of a side.
        guidance: classifier-free guidance scale (Ho & Salimans 2022).
        device: where to compute.
        should_stop: asked after every denoising step.

    Returns:
        The pictures; none when it was stopped.
    """
    sampler = family.assemble(pipeline, denoiser, family.sampling_scheduler(pipeline))
    encoders = [] if family.draws_from_embeddings else [getattr(pipeline, name) for name in family.encoders]
    sampler.set_progress_bar_config(disable=True)
    stopped = False

    def after_step(running: Any, _step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        nonlocal stopped
        stopped = stopped or should_stop()
        running._interrupt = stopped  # noqa: SLF001 - the documented way to end a diffusers pipeline early
        return values

    modes = [module.training for module in (denoiser, *encoders)]
    places = [next(encoder.parameters()).device for encoder in encoders]
    pictures: list[Image.Image] = []
    try:
        # A card that has no room for one of them keeps none, and every mode is put back.
        denoiser.eval()
        for module in (pipeline.vae, *(each.eval() for each in encoders)):
            module.to(device)
        while len(pictures) < len(wanted) and not stopped:
            part = wanted[len(pictures) : len(pictures) + batch]
            prompts = [prompt for prompt, _seed in part]
            asked = Asked(
                prompts,
                joined([embedded[prompt] for prompt in prompts]) if embedded and family.draws_from_embeddings else None,
                resolution,
                guidance,
                [torch.Generator().manual_seed(seed) for _prompt, seed in part],
                after_step,
            )
            try:
                with torch.no_grad():
                    pictures.extend(family.draw(sampler, asked))
            except (RuntimeError, MemoryError) as error:
                if batch == 1 or not is_out_of_memory(error):
                    raise
                batch = -(-batch // 2)
    finally:
        for module, mode in zip((denoiser, *encoders), modes, strict=True):
            module.train(mode)
        for encoder, place in zip(encoders, places, strict=True):
            encoder.to(place)
        pipeline.vae.to("cpu")
    return [] if stopped else pictures
