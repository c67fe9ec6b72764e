"""What the trainer asks of a family: how its parts are loaded and put together, and how it is told a prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from handlers.train.objective import Objective

Tokens = Mapping[str, torch.Tensor]
"""Name of a text encoder → token ids, (prompts, 77)."""


@dataclass(frozen=True)
class Embedded:
    """What the text encoders say of prompts.

    Attributes:
        hidden: (prompts, tokens, width), what the denoiser attends to.
        pooled: (prompts, width); None where the family has none.
    """

    hidden: torch.Tensor
    pooled: torch.Tensor | None = None

    def of(self, chosen: Sequence[int]) -> Embedded:
        """The same of some of the prompts."""
        indices = list(chosen)
        return Embedded(self.hidden[indices], None if self.pooled is None else self.pooled[indices])

    def to(self, device: str) -> Embedded:
        """The same there."""
        return Embedded(self.hidden.to(device), None if self.pooled is None else self.pooled.to(device))


def joined(parts: Sequence[Embedded]) -> Embedded:
    """Several, one after another."""
    pooled = [part.pooled for part in parts if part.pooled is not None]
    return Embedded(torch.cat([part.hidden for part in parts]), torch.cat(pooled) if pooled else None)


@dataclass(frozen=True)
class Asked:
    """What is to be drawn at once.

    Attributes:
        prompts: one a picture.
        embedded: of the prompts, where the family draws from embeddings.
        side: pixels.
        guidance: how strongly a prompt is followed, in the family's own measure.
        generators: one a picture.
        after_step: diffusers' ``callback_on_step_end``.
    """

    prompts: list[str]
    embedded: Embedded | None
    side: int
    guidance: float
    generators: list[torch.Generator]
    after_step: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]


class Family(Protocol):
    """One family of models. Stateless: the parts are handed in."""

    @property
    def name(self) -> str:
        """sd1, sd2, sdxl or flux."""

    @property
    def denoiser(self) -> str:
        """The pipeline's component that is trained to predict: ``unet`` or ``transformer``."""

    @property
    def encoders(self) -> tuple[str, ...]:
        """The pipeline's text encoders, in the order in which they are joined."""

    @property
    def draws_from_embeddings(self) -> bool:
        """Whether its text encoders are too large to lie beside the denoiser: they speak first, and leave."""

    def load(self, folder: Path) -> Any:
        """All but the denoiser of a Diffusers folder, on the CPU, as a pipeline; what is trained is in float32."""

    def load_denoiser(self, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
        """The denoiser of a Diffusers folder, on the CPU."""

    def objective(self, pipeline: Any) -> Objective:
        """What the denoiser is trained to predict."""

    def sampling_scheduler(self, pipeline: Any) -> Any:
        """What samples are drawn with in few steps."""

    def assemble(self, pipeline: Any, denoiser: Any, scheduler: Any) -> Any:
        """A whole pipeline of the parts of ``pipeline``, to draw with or to be saved."""

    def draw(self, whole: Any, asked: Asked) -> list[Image.Image]:
        """Pictures of what ``assemble`` put together; drawn in part where it was interrupted."""

    def tokens(self, pipeline: Any, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Token ids of prompts, padded and cut to the encoders' length."""

    def embed(self, pipeline: Any, tokens: Tokens) -> Embedded:
        """What the text encoders say of all of ``tokens``; with gradients where they have them."""

    def condition(self, embedded: Embedded, sizes: torch.Tensor) -> dict[str, Any]:
        """The denoiser's keyword arguments for prompts.

        Args:
            embedded: of the prompts.
            sizes: (prompts, 6): original height and width, crop's top and left, height and width trained at; pixels.
        """


def token_ids(tokenizer: Any, prompts: Sequence[str]) -> torch.Tensor:
    """(prompts, model_max_length), padded and cut."""
    ids: torch.Tensor = tokenizer(
        list(prompts),
        padding="max_length",
        truncation=True,
        max_length=tokenizer.model_max_length,
        return_tensors="pt",
    ).input_ids
    return ids
