"""What a miniature draws after it was taught a star, counted by ``judge``: for the demo and the tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from handlers.convert.adapter import ADAPTER_FACTS, ADAPTER_FILE
from handlers.models.miniature import judge, world
from handlers.models.miniature.demo import SHAPE, WORD
from handlers.train import sampler
from handlers.train.families import FAMILIES
from handlers.train.plan import MINIATURE_GUIDANCE
from handlers.train.trainable import adapted, layers_of

# Fresh scenes: no training script of ours draws from this seed.
FRESH_SEED = 1_000_004
_BATCH = 25

Wish = tuple[str, int]
"""A prompt and a seed."""


@dataclass(frozen=True)
class Marks:
    """Rates in 0..1.

    Attributes:
        star: pictures of "a zwx star on a … background" that show one.
        background: those with the background that was asked for.
        known: pictures of the shapes that the miniature knew before that show the right one.
    """

    star: float
    background: float
    known: float


@dataclass(frozen=True)
class Exam:
    """The same wishes for every model.

    Attributes:
        stars: pictures of the new shape, on every background in turn.
        known: pictures of the old shapes.
    """

    stars: int
    known: int

    def star_wishes(self) -> list[Wish]:
        """Prompts with the word that was taught."""
        colours = [list(world.COLOURS)[number % len(world.COLOURS)] for number in range(self.stars)]
        return [
            (f"a {WORD} {SHAPE} on {world.article(colour)} {colour} background", number)
            for number, colour in enumerate(colours)
        ]

    def _scenes(self) -> list[world.Scene]:
        return [
            world.random_scene(np.random.default_rng((FRESH_SEED, number)), textures=("plain",))
            for number in range(self.known)
        ]

    def known_wishes(self) -> list[Wish]:
        """Prompts of the world."""
        return [(world.full_prompt(scene), number) for number, scene in enumerate(self._scenes())]

    def mark(self, stars: Sequence[Image.Image], known: Sequence[Image.Image]) -> Marks:
        """Marks for the pictures of both lists of wishes."""
        words = list(world.COLOURS)
        grounds = [judge.look(image).background == words[number % len(words)] for number, image in enumerate(stars)]
        told = zip(shapes_in(known), self._scenes(), strict=True)
        return Marks(
            star=shapes_in(stars).count(SHAPE) / max(1, self.stars),
            background=sum(grounds) / max(1, self.stars),
            known=sum(shape == scene.things[0].shape for shape, scene in told) / max(1, self.known),
        )

    def take(self, pipeline: Any) -> tuple[Marks, list[Image.Image]]:
        """Let a pipeline draw all wishes; its marks and its stars."""
        stars, known = drawn(pipeline, self.star_wishes()), drawn(pipeline, self.known_wishes())
        return self.mark(stars, known), stars


def shapes_in(images: Sequence[Image.Image]) -> list[str | None]:
    """The shape that each picture shows, the new one among those that may be seen."""
    return [judge.look(image, (*world.SHAPES, SHAPE)).shape for image in images]


def drawn(pipeline: Any, wishes: Sequence[Wish]) -> list[Image.Image]:
    """Pictures as fastsd draws its samples, on the CPU."""
    family = FAMILIES["sdxl" if hasattr(pipeline, "text_encoder_2") else "sd1"]
    return sampler.draw(
        family,
        pipeline,
        pipeline.to(dtype=torch.float32).unet,
        wanted=wishes,
        embedded={},
        batch=_BATCH,
        resolution=64,
        guidance=MINIATURE_GUIDANCE,
        device="cpu",
        should_stop=lambda: False,
    )


def loaded(folder: Path, base: Path | None = None) -> Any:
    """A Diffusers folder, ready to draw.

    Args:
        folder: of the whole model, or of an adapter.
        base: of the model that an adapter stands on.
    """
    is_adapter = (folder / ADAPTER_FILE).is_file()
    pipeline = DiffusionPipeline.from_pretrained(
        base if is_adapter else folder, dtype=torch.float32, local_files_only=True
    ).to(dtype=torch.float32)
    if is_adapter:
        _put_in(pipeline, folder)
    return pipeline


def _put_in(pipeline: Any, folder: Path) -> None:
    """Put a finished adapter into its base as it was trained: diffusers' reader loses a text encoder's magnitudes."""
    facts = json.loads((folder / ADAPTER_FACTS).read_bytes())
    tensors = load_file(folder / ADAPTER_FILE)
    for part in facts["parts"]:
        adapter = adapted(
            getattr(pipeline, part),
            layers_of(part, convolutions=facts["convolutions"]),
            rank=facts["rank"],
            alpha=facts["alpha"],
            dora=facts["method"] == "dora",
            seed=0,
        )
        start = f"{part}."
        adapter.load({key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)})
