"""A pool of drawn pictures in memory: picture n of a seed is always the same."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from handlers.models.miniature import world

TRAINING_SEED = 1
FRESH_SEED = 1_000_001


@dataclass(frozen=True)
class Pool:
    """Pictures and their truth.

    Attributes:
        pixels: uint8 [N, side, side, 3].
        scenes: N scenes.
        boxes: for each scene, a box a thing, in 0..1.
    """

    pixels: npt.NDArray[np.uint8]
    scenes: list[world.Scene]
    boxes: list[tuple[tuple[float, float, float, float], ...]]


def drawn(count: int, seed: int, most_things: int = 1, side: int = 64) -> Pool:
    """``count`` pictures with 1 to ``most_things`` things, each number of things equally often."""
    pixels = np.empty((count, side, side, 3), np.uint8)
    scenes, boxes = [], []
    for index in range(count):
        rng = np.random.default_rng((seed, index))
        picture = world.draw(world.random_scene(rng, things=index % most_things + 1), side)
        pixels[index] = np.asarray(picture.image)
        scenes.append(picture.scene)
        boxes.append(picture.boxes)
    return Pool(pixels, scenes, boxes)
