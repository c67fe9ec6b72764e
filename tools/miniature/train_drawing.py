"""Train a drawing miniature: ``python -m tools.miniature.train_drawing --state DIR [--family miniature-sd2]``.

Needs ``vae.pt`` of train_vae there. First the text encoders learn to tell what a prompt says (``texts``); then the UNet
learns to draw with them frozen. The families share the first text encoder's weights and the VAE.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTextModel

from handlers.models import miniature
from handlers.models.miniature import drawing, sd2, sdxl
from handlers.models.miniature.seeded import seeded
from tools.miniature import latents, muon, pool, texts, training
from tools.miniature.texts import Told

PICTURES = 24_000
BATCH = 64
MUON_RATE = 0.02
LEARNING_RATE = 2e-3
# What the rates are multiplied by where trained weights learn on.
GENTLY = 0.5
UNPROMPTED = 0.1
# The part of the pictures whose things have outlines of no name.
NAMELESS = 0.3
# The part of the time in which colours are learned, and the heaviest weight after it.
COLOURS_FIRST = 0.25
HEAVIEST = 2.5
# How much more a latent that shows a part of the thing counts than one that shows the background alone.
THING_WEIGHT = 3.0


def place_weights(pictures: pool.Pool) -> torch.Tensor:
    """Weights [N, 1, side / 8, side / 8] of mean 1: a thing's box counts more, or its shape is learned last."""
    side = drawing.RESOLUTION // 8
    edges = torch.arange(side) / side
    made = torch.ones(len(pictures.boxes), 1, side, side)
    for weights, boxes in zip(made, pictures.boxes, strict=True):
        for left, top, right, bottom in boxes:
            columns = (edges < right) & (edges + 1 / side > left)
            rows = (edges < bottom) & (edges + 1 / side > top)
            weights[0, rows[:, None] & columns] = THING_WEIGHT
    return made / made.mean((2, 3), keepdim=True)


@dataclass(frozen=True)
class Family:
    """What differs between the drawing families.

    Attributes:
        state: the name of the UNet's state file.
        unet, scheduler: make the parts.
        tell: the first text encoder's weights, options, prompts → what its UNet is told.
        scaling_factor: its VAE's; all families share the first one's VAE weights.
        nameless: whether it learns outlines without a name from the start; the small ones have enough to do with the
            eight, and learn them when they learn on.
    """

    state: str
    unet: Callable[[], UNet2DConditionModel]
    scheduler: Callable[[], Any]
    tell: Callable[[CLIPTextModel, argparse.Namespace, list[str], torch.device], Told]
    scaling_factor: float = drawing.SCALING_FACTOR
    nameless: bool = False


def _told_first(first: CLIPTextModel, _: argparse.Namespace, prompts: list[str], device: torch.device) -> Told:
    return texts.encode_prompts(first.to(device), texts.read_last, texts.token_ids(drawing.tokenizer(), prompts))


def _told_second(first: CLIPTextModel, _: argparse.Namespace, prompts: list[str], device: torch.device) -> Told:
    encoder = sd2.text_encoder().eval()
    encoder.load_state_dict(first.state_dict())
    return _told_first(encoder, _, prompts, device)


def _told_both(first: CLIPTextModel, options: argparse.Namespace, prompts: list[str], device: torch.device) -> Told:
    ids = texts.token_ids(sdxl.tokenizer_2(), prompts)
    if options.from_shipped:
        second = sdxl.text_encoder_2().eval().to(device)
        training.load_shipped(second, "miniature-sdxl", "text_encoder_2")
    else:
        second = texts.train_text(
            options.state / "text-2.pt",
            options.text_minutes,
            make=sdxl.text_encoder_2,
            read=texts.read_second,
            ids=ids[:-1],
            said=prompts[:-1],
            device=device,
        )
    first_ids = texts.token_ids(drawing.tokenizer(), prompts)
    return texts.joined(
        texts.encode_prompts(first.to(device), texts.read_last_but_one, first_ids),
        texts.encode_prompts(second, texts.read_second, ids),
    )


FAMILIES = {
    "miniature": Family("unet.pt", drawing.unet, drawing.scheduler, _told_first, nameless=True),
    "miniature-sd2": Family("unet-sd2.pt", sd2.unet, sd2.scheduler, _told_second),
    "miniature-sdxl": Family("unet-sdxl.pt", sdxl.unet, sdxl.scheduler, _told_both, sdxl.SCALING_FACTOR),
}


def weights_of_time(schedule: DDPMScheduler, fraction: float, colours_first: float = COLOURS_FIRST) -> torch.Tensor:
    """What an error in the noise counts at each time step, [T]: colours first, then shapes.

    Colours and layout are settled where nearly all is noise, and there the error in the noise is tiny: it is weighed
    by 1 / sqrt(signal-to-noise). Once they are known, no more than HEAVIEST, or what cannot be told drowns the shapes
    (measured: 28 % of shapes right before, 80 % after 500 more steps).
    """
    weights = ((1 - schedule.alphas_cumprod) / schedule.alphas_cumprod).sqrt()
    return weights if fraction < colours_first else weights.clamp(max=HEAVIEST)


def train_unet(
    state: Path,
    minutes: float,
    unet: UNet2DConditionModel,
    *,
    schedule: DDPMScheduler,
    clean: torch.Tensor,
    told: Told,
    where: torch.Tensor,
    among: torch.Tensor,
    rate: float = 1.0,
    colours_first: float = COLOURS_FIRST,
) -> None:
    """Train the UNet to predict noise or velocity, as its schedule says.

    Args:
        state: its file.
        minutes: of training in all.
        unet: fresh, or trained before.
        schedule: of its family.
        clean: latents [N, 4, 8, 8], scaled.
        told: of the N prompts.
        where: what each latent's error counts, [N, 1, 8, 8].
        among: the indices of the pictures to learn.
        rate: what the learning rates are multiplied by.
        colours_first: the part of the time in which the noisiest steps count as much as colours need.
    """
    device = unet.device
    average = training.Average([unet])
    unet.set_attn_processor(AttnProcessor())  # faster than the fused one at these sizes
    optimizer = muon.optimizer_for(unet, rate * MUON_RATE, rate * LEARNING_RATE)
    is_velocity = schedule.config.prediction_type == "v_prediction"
    mask = texts.key_mask(device)

    def added(said: torch.Tensor) -> dict[str, torch.Tensor] | None:
        if told.pooled is None:
            return None
        return {"text_embeds": told.pooled[said].float().to(device), "time_ids": sdxl.time_ids(len(said)).to(device)}

    def step(number: int, fraction: float) -> torch.Tensor:
        random = torch.Generator().manual_seed(number)
        chosen = among[torch.randint(len(among), (BATCH,), generator=random)]
        # One time a stratum; every third one is drawn from the middle, where shapes are settled.
        times = (torch.arange(BATCH) + torch.rand(BATCH, generator=random)) / BATCH
        times = torch.where(torch.arange(BATCH) % 3 == 0, 0.25 + 0.5 * times, times)
        timesteps = (times * schedule.config.num_train_timesteps).long()
        noise = torch.randn(clean[chosen].shape, generator=random)
        noisy = schedule.add_noise(clean[chosen], noise, timesteps).to(device)
        said = torch.where(torch.rand(BATCH, generator=random) < UNPROMPTED, len(clean), chosen)
        predicted = unet(
            noisy,
            timesteps.to(device),
            encoder_hidden_states=told.hidden[said].float().to(device),
            encoder_attention_mask=mask.expand(BATCH, -1),
            added_cond_kwargs=added(said),
        ).sample
        weights = weights_of_time(schedule, fraction, colours_first)[timesteps]
        target = noise
        if is_velocity:
            target = schedule.get_velocity(clean[chosen], noise, timesteps)
            weights = weights * schedule.alphas_cumprod[timesteps]  # an error in v is one of alpha × it in the noise
        errors = ((predicted - target.to(device)).square() * where[chosen].to(device)).mean((1, 2, 3))
        return (errors * weights.to(device)).mean()

    training.run(state, minutes=minutes, average=average, optimizer=optimizer, step=step)


def text_encoder(options: argparse.Namespace, prompts: list[str], device: torch.device) -> CLIPTextModel:
    """The first family's, trained here or taken from the package; it learns on with its own UNet alone."""
    former = None
    if options.from_shipped:
        former = drawing.text_encoder().eval()
        training.load_shipped(former, "miniature", "text_encoder")
        if options.family != "miniature":
            return former
    return texts.train_text(
        options.state / "text.pt",
        options.text_minutes,
        make=drawing.text_encoder,
        read=texts.read_last,
        ids=texts.token_ids(drawing.tokenizer(), prompts),
        said=prompts,
        device=device,
        former=former,
    )


def vae(options: argparse.Namespace) -> AutoencoderKL:
    """The first family's, trained before or taken from the package."""
    made = drawing.vae()
    if options.from_shipped and not (options.state / "vae.pt").exists():
        training.load_shipped(made, "miniature", "vae")
    else:
        training.load_mean(options.state / "vae.pt", [made])
    return made


def main() -> None:
    """Train what is missing; the states are ``text.pt``, ``text-2.pt`` and the family's own."""
    parser = training.arguments("Train a drawing miniature.", minutes=50)
    parser.add_argument("--text-minutes", type=float, default=3)
    parser.add_argument("--family", choices=sorted(FAMILIES), default="miniature")
    options = parser.parse_args()
    family = FAMILIES[options.family]
    device = training.set_up(options)
    pictures = pool.drawn(PICTURES, pool.TRAINING_SEED + 1, nameless=NAMELESS)
    prompts = texts.pool_prompts(pictures)
    told = family.tell(text_encoder(options, prompts, device), options, [*prompts, ""], device)
    autoencoder = vae(options).to(device)
    clean = latents.standardise(autoencoder, latents.encode(autoencoder, pictures))
    with seeded(drawing.SEED + 2):
        unet = family.unet().to(device)
    learns_on = options.from_shipped and miniature.shipped(options.family) is not None
    if learns_on:
        training.load_shipped(unet, options.family, "unet")
    train_unet(
        options.state / family.state,
        options.minutes,
        unet,
        schedule=DDPMScheduler.from_config(family.scheduler().config),
        clean=clean * (family.scaling_factor / drawing.SCALING_FACTOR),
        told=told,
        where=place_weights(pictures),
        among=torch.tensor(
            [
                index
                for index, scene in enumerate(pictures.scenes)
                if family.nameless or learns_on or not scene.things[0].outline
            ]
        ),
        rate=GENTLY if learns_on else 1.0,
        colours_first=0.0 if learns_on else COLOURS_FIRST,
    )


if __name__ == "__main__":
    main()
