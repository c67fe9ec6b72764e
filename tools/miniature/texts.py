"""What the drawing miniatures are told: text encoders that learn to tell what a prompt says, and their hidden states.

The heads read at a prompt's end and at the padding after it: that binds colours to their nouns before a UNet asks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from handlers.models.miniature import drawing, world
from handlers.models.miniature.seeded import seeded
from tools.miniature import pool, prompts, training

TEXT_BATCH = 48
TEXT_RATE = 2e-3
# Where a text encoder learns on: its part of the rate, and what it counts that it says what it said before.
GENTLY = 0.5
KEPT = 30.0
# Prompts fill at most so many positions; the rest are padding, of which a few stand for all (see ``key_mask``).
SAID = 20
PADDING = 4


@dataclass(frozen=True)
class Told:
    """What a UNet is told of N prompts, and last of no prompt.

    Attributes:
        hidden: [N + 1, SAID + PADDING, width], float16.
        pooled: [N + 1, width] of the second encoder, float16; None where a family has none.
    """

    hidden: torch.Tensor
    pooled: torch.Tensor | None = None


def pool_prompts(pictures: pool.Pool) -> list[str]:
    """A prompt a picture, always the same."""
    return [world.prompt(scene, np.random.default_rng((7, index))) for index, scene in enumerate(pictures.scenes)]


def token_ids(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Ids [N, 77], padded as Stable Diffusion's pipeline does."""
    return tokenizer(texts, padding="max_length", max_length=drawing.POSITIONS, return_tensors="pt").input_ids


Read = Callable[[Any, torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]
"""(encoder, ids) → what a UNet attends to, [B, 77, width], and what is added to the time step, [B, width]."""


def read_last(encoder: CLIPTextModel, ids: torch.Tensor) -> tuple[torch.Tensor, None]:
    """As SD 1 and 2 read theirs."""
    return encoder(ids).last_hidden_state, None


def read_last_but_one(encoder: CLIPTextModel, ids: torch.Tensor) -> tuple[torch.Tensor, None]:
    """As SDXL reads its first."""
    return encoder(ids, output_hidden_states=True).hidden_states[-2], None


def read_second(encoder: CLIPTextModelWithProjection, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As SDXL reads its second."""
    said = encoder(ids, output_hidden_states=True)
    return said.hidden_states[-2], said.text_embeds


def train_text(
    state: Path,
    minutes: float,
    *,
    make: Callable[[], Any],
    read: Read,
    ids: torch.Tensor,
    said: list[str],
    device: torch.device,
    former: Any = None,
) -> Any:
    """Warm a text encoder up; gives it with its averaged weights.

    Args:
        state: its file.
        minutes: of training in all.
        make: a fresh encoder.
        read: how its family reads it.
        ids: of the prompts, [N, 77].
        said: the prompts.
        device: of the training.
        former: begin with this one's weights, and keep to what it says of prompts that name one of the world's shapes:
            a UNet has learned to read those.
    """
    with seeded(drawing.SEED + 1):
        encoder = make().to(device)
        sizes = [1 + len(known) for known in prompts.QUESTIONS.values()]
        heads = torch.nn.Linear(encoder.config.hidden_size, sum(sizes)).to(device)
    if former is not None:
        encoder.load_state_dict(former.state_dict())
    targets = torch.tensor([prompts.answers(text) for text in said])
    ends = (ids == encoder.config.eos_token_id).int().argmax(1)
    average = training.Average([encoder, heads])
    optimizer = torch.optim.AdamW(
        average.live.parameters(), lr=TEXT_RATE if former is None else GENTLY * TEXT_RATE, weight_decay=1e-2
    )

    def step(number: int, _fraction: float) -> torch.Tensor:
        random = torch.Generator().manual_seed(number)
        chosen = torch.randint(len(said), (TEXT_BATCH,), generator=random)
        hidden, pooled = read(encoder, ids[chosen].to(device))
        padding = torch.randint(SAID, drawing.POSITIONS, (TEXT_BATCH, PADDING), generator=random)
        places = torch.cat([ends[chosen, None], padding], 1).to(device)
        states = hidden.gather(1, places[..., None].expand(-1, -1, hidden.size(-1)))
        if pooled is not None:
            states = torch.cat([states, pooled[:, None]], 1)
        told = heads(states).split(sizes, -1)
        truth = targets[chosen].to(device)
        losses = [
            functional.cross_entropy(logits.flatten(0, 1), truth[:, question].repeat_interleave(states.size(1)))
            for question, logits in enumerate(told)
        ]
        loss = torch.stack(losses).sum()
        if former is None:
            return loss
        named = chosen[(truth[:, 0] > 0) & (truth[:, 0] <= len(world.SHAPES))]
        with torch.no_grad():
            before, _ = read(former, ids[named].to(device))
        return loss + KEPT * functional.mse_loss(read(encoder, ids[named].to(device))[0], before)

    training.run(state, minutes=minutes, average=average, optimizer=optimizer, step=step)
    return average.mean[0].eval()


@torch.no_grad()
def encode_prompts(encoder: Any, read: Read, ids: torch.Tensor, batch: int = 256) -> Told:
    """Hidden states of the said positions and of a few of the padding, and the pooled embedding if there is one."""
    random = torch.Generator().manual_seed(0)
    device = next(encoder.parameters()).device
    made, added = [], []
    for start in range(0, len(ids), batch):
        hidden, pooled = read(encoder, ids[start : start + batch].to(device))
        kept = torch.randperm(drawing.POSITIONS - SAID, generator=random)[:PADDING] + SAID
        made.append(torch.cat([hidden[:, :SAID], hidden[:, kept]], 1).cpu().half())
        if pooled is not None:
            added.append(pooled.cpu().half())
    return Told(torch.cat(made), torch.cat(added) if added else None)


def joined(first: Told, second: Told) -> Told:
    """What SDXL's UNet is told: both encoders' states side by side, and all zeros for no prompt."""
    assert second.pooled is not None
    hidden, pooled = torch.cat([first.hidden, second.hidden], 2), second.pooled.clone()
    hidden[-1] = 0
    pooled[-1] = 0
    return Told(hidden, pooled)


def key_mask(device: torch.device) -> torch.Tensor:
    """A mask [1, SAID + PADDING] that lets each kept position of the padding count for all those left out.

    The UNet turns a mask m into (1 - m) × -10,000 on the attention's logits; what is wanted there is a logarithm.
    """
    stands_for = math.log((drawing.POSITIONS - SAID) / PADDING)
    mask = torch.ones(1, SAID + PADDING, device=device)
    mask[:, SAID:] += stands_for / 10_000
    return mask
