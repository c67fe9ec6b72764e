"""Train a drawing miniature: ``python -m tools.miniature.train_drawing --state DIR [--family miniature-sd2]``.

Needs ``vae.pt`` of train_vae there. First the text encoder learns to tell what a prompt says (at its end and at the
padding after it: that binds colours to their nouns before the UNet asks); then the UNet learns to draw with the text
encoder frozen. The families share text weights and VAE.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer

from handlers.models.miniature import drawing, sd2, world
from handlers.models.miniature.seeded import seeded
from tools.miniature import latents, muon, pool, prompts, training

PICTURES = 24_000
TEXT_BATCH = 48
BATCH = 64
TEXT_RATE = 2e-3
MUON_RATE = 0.02
LEARNING_RATE = 2e-3
UNPROMPTED = 0.1
# The part of the time in which colours are learned, and the heaviest weight after it.
COLOURS_FIRST = 0.25
HEAVIEST = 2.5
# How much more a latent that shows a part of the thing counts than one that shows the background alone.
THING_WEIGHT = 3.0
# Prompts fill at most so many positions; the rest are padding, of which a few stand for all (see ``key_mask``).
SAID = 16
PADDING = 4


def pool_prompts(pictures: pool.Pool) -> list[str]:
    """A prompt a picture, always the same."""
    return [world.prompt(scene, np.random.default_rng((7, index))) for index, scene in enumerate(pictures.scenes)]


def token_ids(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Ids [N, 77], padded as Stable Diffusion's pipeline does."""
    return tokenizer(texts, padding="max_length", max_length=drawing.POSITIONS, return_tensors="pt").input_ids


def train_text(state: Path, minutes: float, ids: torch.Tensor, texts: list[str], device: torch.device) -> CLIPTextModel:
    """Warm the text encoder up; gives it with its averaged weights."""
    with seeded(drawing.SEED + 1):
        encoder = drawing.text_encoder().to(device)
        sizes = [1 + len(known) for known in prompts.QUESTIONS.values()]
        heads = torch.nn.Linear(drawing.TEXT_WIDTH, sum(sizes)).to(device)
    targets = torch.tensor([prompts.answers(text) for text in texts])
    ends = (ids == ids[0, -1]).int().argmax(1)
    average = training.Average([encoder, heads])
    optimizer = torch.optim.AdamW(average.live.parameters(), lr=TEXT_RATE, weight_decay=1e-2)

    def step(number: int, _fraction: float) -> torch.Tensor:
        random = torch.Generator().manual_seed(number)
        chosen = torch.randint(len(texts), (TEXT_BATCH,), generator=random)
        hidden = encoder(ids[chosen].to(device)).last_hidden_state
        padding = torch.randint(SAID, drawing.POSITIONS, (TEXT_BATCH, PADDING), generator=random)
        places = torch.cat([ends[chosen, None], padding], 1).to(device)
        told = heads(hidden.gather(1, places[..., None].expand(-1, -1, hidden.size(-1)))).split(sizes, -1)
        truth = targets[chosen].to(device)
        losses = [
            functional.cross_entropy(logits.flatten(0, 1), truth[:, question].repeat_interleave(1 + PADDING))
            for question, logits in enumerate(told)
        ]
        return torch.stack(losses).sum()

    training.run(state, minutes=minutes, average=average, optimizer=optimizer, step=step)
    return average.mean[0].eval()


@torch.no_grad()
def encode_prompts(encoder: CLIPTextModel, ids: torch.Tensor, batch: int = 256) -> torch.Tensor:
    """Hidden states of the said positions and of a few of the padding, [N, SAID + PADDING, width], as float16."""
    random = torch.Generator().manual_seed(0)
    device = next(encoder.parameters()).device
    made = []
    for start in range(0, len(ids), batch):
        hidden = encoder(ids[start : start + batch].to(device)).last_hidden_state.cpu()
        kept = torch.randperm(drawing.POSITIONS - SAID, generator=random)[:PADDING] + SAID
        made.append(torch.cat([hidden[:, :SAID], hidden[:, kept]], 1).half())
    return torch.cat(made)


def key_mask(device: torch.device) -> torch.Tensor:
    """A mask [1, SAID + PADDING] that lets each kept position of the padding count for all those left out.

    The UNet turns a mask m into (1 - m) × -10,000 on the attention's logits; what is wanted there is a logarithm.
    """
    stands_for = math.log((drawing.POSITIONS - SAID) / PADDING)
    mask = torch.ones(1, SAID + PADDING, device=device)
    mask[:, SAID:] += stands_for / 10_000
    return mask


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
        text_encoder, unet, scheduler: make the parts; all families share the first one's text weights and VAE.
    """

    state: str
    text_encoder: Callable[[], CLIPTextModel]
    unet: Callable[[], UNet2DConditionModel]
    scheduler: Callable[[], Any]


FAMILIES = {
    "miniature": Family("unet.pt", drawing.text_encoder, drawing.unet, drawing.scheduler),
    "miniature-sd2": Family("unet-sd2.pt", sd2.text_encoder, sd2.unet, sd2.scheduler),
}


def weights_of_time(schedule: DDPMScheduler, fraction: float) -> torch.Tensor:
    """What an error in the noise counts at each time step, [T]: colours first, then shapes.

    Colours and layout are settled where nearly all is noise, and there the error in the noise is tiny: it is weighed
    by 1 / sqrt(signal-to-noise). Once they are known, no more than HEAVIEST, or what cannot be told drowns the shapes
    (measured: 28 % of shapes right before, 80 % after 500 more steps).
    """
    weights = ((1 - schedule.alphas_cumprod) / schedule.alphas_cumprod).sqrt()
    return weights if fraction < COLOURS_FIRST else weights.clamp(max=HEAVIEST)


def train_unet(
    state: Path,
    minutes: float,
    *,
    family: Family,
    clean: torch.Tensor,
    hidden: torch.Tensor,
    where: torch.Tensor,
    device: torch.device,
) -> None:
    """Train the UNet to predict noise or velocity, as its schedule says.

    Args:
        state: its file.
        minutes: of training in all.
        family: what to train.
        clean: latents [N, 4, 8, 8], scaled.
        hidden: of the prompts, [N + 1, SAID + PADDING, width]; the last is the empty prompt.
        where: what each latent's error counts, [N, 1, 8, 8].
        device: of the training.
    """
    with seeded(drawing.SEED + 2):
        unet = family.unet().to(device)
    average = training.Average([unet])
    unet.set_attn_processor(AttnProcessor())  # faster than the fused one at these sizes
    optimizer = muon.optimizer_for(unet, MUON_RATE, LEARNING_RATE)
    schedule = DDPMScheduler.from_config(family.scheduler().config)
    is_velocity = schedule.config.prediction_type == "v_prediction"
    mask = key_mask(device)

    def step(number: int, fraction: float) -> torch.Tensor:
        random = torch.Generator().manual_seed(number)
        chosen = torch.randint(len(clean), (BATCH,), generator=random)
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
            encoder_hidden_states=hidden[said].float().to(device),
            encoder_attention_mask=mask.expand(BATCH, -1),
        ).sample
        weights = weights_of_time(schedule, fraction)[timesteps]
        target = noise
        if is_velocity:
            target = schedule.get_velocity(clean[chosen], noise, timesteps)
            weights = weights * schedule.alphas_cumprod[timesteps]  # an error in v is one of alpha × it in the noise
        errors = ((predicted - target.to(device)).square() * where[chosen].to(device)).mean((1, 2, 3))
        return (errors * weights.to(device)).mean()

    training.run(state, minutes=minutes, average=average, optimizer=optimizer, step=step)


def main() -> None:
    """Train what is missing; the states are ``text.pt`` and the family's own."""
    parser = training.arguments("Train a drawing miniature.", minutes=50)
    parser.add_argument("--text-minutes", type=float, default=3)
    parser.add_argument("--family", choices=sorted(FAMILIES), default="miniature")
    options = parser.parse_args()
    family = FAMILIES[options.family]
    device = training.set_up(options)
    pictures = pool.drawn(PICTURES, pool.TRAINING_SEED + 1)
    texts = pool_prompts(pictures)
    ids = token_ids(drawing.tokenizer(), [*texts, ""])
    trained = train_text(options.state / "text.pt", options.text_minutes, ids[:-1], texts, device)
    encoder = family.text_encoder().to(device).eval()
    encoder.load_state_dict(trained.state_dict())
    vae = drawing.vae().to(device)
    training.load_mean(options.state / "vae.pt", [vae])
    clean = latents.standardise(vae, latents.encode(vae, pictures))
    train_unet(
        options.state / family.state,
        options.minutes,
        family=family,
        clean=clean,
        hidden=encode_prompts(encoder, ids),
        where=place_weights(pictures),
        device=device,
    )


if __name__ == "__main__":
    main()
