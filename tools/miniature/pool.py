"""A pool of drawn pictures in memory: picture n of a seed is always the same."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from handlers.models.miniature import judge, world
from tools.miniature import prompts

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


def drawn(count: int, seed: int, most_things: int = 1, side: int = 64, *, nameless: float = 0.0) -> Pool:
    """``count`` pictures with 1 to ``most_things`` things, each number of things equally often.

    In a part ``nameless`` of the pictures the things have outlines of no name and are called anything: who learns those
    learns what an outline is, and can be taught one more from a few pictures.
    """
    pixels = np.empty((count, side, side, 3), np.uint8)
    scenes, boxes = [], []
    for index in range(count):
        rng = np.random.default_rng((seed, index))
        scene = world.random_scene(rng, things=index % most_things + 1)
        if rng.random() < nameless:
            things = tuple(
                replace(thing, shape=prompts.name_for_nameless(rng), outline=unseen_outline(rng))
                for thing in scene.things
            )
            scene = replace(scene, things=things)
        picture = world.draw(scene, side)
        pixels[index] = np.asarray(picture.image)
        scenes.append(picture.scene)
        boxes.append(picture.boxes)
    return Pool(pixels, scenes, boxes)


def unseen_outline(rng: np.random.Generator) -> tuple[tuple[float, float], ...]:
    """An outline that nobody takes for one of the shapes that shall never be seen."""
    while True:
        outline = world.random_outline(rng)
        thing = world.Thing("shape", "white", "large", (0.5, 0.5), 0.32, 0.0, (255, 255, 255), outline)
        picture = world.draw(world.Scene((thing,), "black", "plain", (0, 0, 0), 0.0)).image
        if judge.look(picture, (*world.SHAPES, *world.UNSEEN_SHAPES)).shape not in world.UNSEEN_SHAPES:
            return outline
