"""The picture that most files of the corpus show: four colours, so that turning, mirroring and wrong colours show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Colour = tuple[int, int, int]
SIZE = (240, 160)
RED, GREEN, BLUE, SAND = (200, 40, 40), (40, 170, 60), (50, 70, 200), (225, 200, 120)
QUARTERS: tuple[Colour, ...] = (RED, GREEN, BLUE, SAND)
"""Upper left, upper right, lower left, lower right."""
WHITE = ((255, 255, 255),) * 4


def pattern(size: tuple[int, int] = SIZE) -> Image.Image:
    """The four colours, a quarter of the picture each."""
    width, height = size
    values = np.zeros((height, width, 3), dtype=np.uint8)
    across, down = width // 2, height // 2
    values[:down, :across], values[:down, across:] = RED, GREEN
    values[down:, :across], values[down:, across:] = BLUE, SAND
    return Image.fromarray(values)


def deep(size: tuple[int, int] = SIZE) -> NDArray[np.uint16]:
    """The same with 16 bits a channel, [height, width, 3]."""
    return np.asarray(pattern(size)).astype(np.uint16) * 257


def greys(colours: Sequence[Colour] = QUARTERS) -> tuple[Colour, ...]:
    """Colours as a picture without colour shows them."""
    tones = [int(Image.new("RGB", (1, 1), colour).convert("L").getpixel((0, 0))) for colour in colours]  # type: ignore[arg-type]
    return tuple((tone, tone, tone) for tone in tones)


def quarters(image: Image.Image) -> list[tuple[float, ...]]:
    """The mean colour in the middle of each quarter."""
    values = np.asarray(image.convert("RGB")).astype(np.float64)
    height, width = values.shape[:2]
    means = []
    for y in (0, 1):
        for x in (0, 1):
            rows = slice(int(height * (0.125 + 0.5 * y)), max(1, int(height * (0.375 + 0.5 * y))))
            columns = slice(int(width * (0.125 + 0.5 * x)), max(1, int(width * (0.375 + 0.5 * x))))
            means.append(tuple(values[rows, columns].reshape(-1, 3).mean(axis=0)))
    return means


@dataclass(frozen=True)
class Cropped:
    """It must be cropped.

    Attributes:
        size: (width, height) of the upright picture.
        colours: of its quarters.
        tolerance: how far a channel of a quarter may be off.
        warning: a word that one of the warnings must hold; "" for no warning but the one about small pictures.
    """

    size: tuple[int, int] = SIZE
    colours: tuple[Colour, ...] = QUARTERS
    tolerance: float = 2.0
    warning: str = ""


@dataclass(frozen=True)
class Refused:
    """It must be refused, with one of these codes."""

    codes: tuple[str, ...]


@dataclass(frozen=True)
class Ignored:
    """A person's folder may hold it, and it is no picture yet."""


Outcome = Cropped | Refused | Ignored
