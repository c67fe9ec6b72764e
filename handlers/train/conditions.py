"""What the denoiser is told of pictures: by text encoders that have spoken once, or by those that are being trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from handlers.train.families.interface import Embedded, Family, joined
from handlers.train.speaking import speak
from handlers.train.wording import Wording


class Conditions:
    """The prompts of a run and the text encoders that read them.

    Args:
        family: of the base.
        pipeline: gives tokenizers and text encoders.
        words: what the pictures are told.
        sizes: of each picture, (pictures, 6), as ``interface.Family.condition`` takes them.
        drawn: the prompts of samples.
        device: where to compute.
        told: told in a line of what people may want to know.

    Attributes:
        encoders: name → text encoder; none once all is said and they have given up their room.
        spoken: prompt → what was said of it, where samples are drawn from that.
    """

    def __init__(
        self,
        family: Family,
        pipeline: Any,
        words: Wording,
        sizes: torch.Tensor,
        *,
        drawn: Sequence[str],
        device: str,
        told: Callable[[str], None],
    ) -> None:
        self.encoders: dict[str, Any] = {name: getattr(pipeline, name) for name in family.encoders}
        self.spoken: dict[str, Embedded] = {}
        self._family = family
        self._pipeline = pipeline
        self._words = words
        self._tokens = family.tokens(pipeline, words.texts)
        self._sizes = sizes
        self._drawn = drawn if family.draws_from_embeddings else ()
        self._device = device
        self._told = told

    def of(self, stage: int, embedded: Embedded, step: int, chosen: list[int]) -> dict[str, Any]:
        """The denoiser's keyword arguments for the pictures of a step, from what was said once."""
        rows = self._words.of(stage, step, chosen)
        return self._family.condition(embedded.of(rows), self._sizes[chosen])

    def anew(self, stage: int, step: int, chosen: list[int]) -> dict[str, Any]:
        """The denoiser's keyword arguments for the pictures of a step, by text encoders that are trained."""
        rows = self._words.of(stage, step, chosen)
        tokens = {name: ids[rows].to(self._device) for name, ids in self._tokens.items()}
        embedded = self._family.embed(self._pipeline, tokens)
        return self._family.condition(embedded, self._sizes[chosen])

    def now(self) -> Embedded:
        """What the text encoders say of the pictures' prompts as they are; they leave the device afterwards."""
        return joined(self._speak(self._words.texts))

    def for_good(self) -> Embedded:
        """The same of text encoders that stay as they are; they leave memory if nothing else will be asked of them."""
        texts = list(dict.fromkeys([*self._words.texts, *self._drawn]))
        parts = self._speak(texts)
        if self._family.draws_from_embeddings:
            self.spoken = dict(zip(texts, parts, strict=True))
            for name in self.encoders:
                setattr(self._pipeline, name, None)  # all is said, and the denoiser needs their room
            self.encoders.clear()
        return joined(parts[: len(self._words.texts)])

    def _speak(self, texts: Sequence[str]) -> list[Embedded]:
        return speak(self._family, self._pipeline, texts, self._device, self._told)
