"""How good the miniatures are, by measures that know nothing of the models.

Colours are read off the pixels, shapes by overlap with drawn templates. On fresh pictures of the world whose truth is
known both are right at least 99 times in 100 (tests/handlers/test_miniature_world.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from handlers.models.miniature import world

Box = tuple[float, float, float, float]
_TEMPLATE = 32
_FAINT = 40.0


@dataclass(frozen=True)
class Seen:
    """What a picture of one thing on a plain background shows; None where nothing stands out.

    Attributes:
        shape, colour, background: words of the world.
        overlap: of the best template with what was found, 0..1.
    """

    shape: str | None
    colour: str | None
    background: str
    overlap: float


def psnr(made: npt.NDArray[np.float64], truth: npt.NDArray[np.float64]) -> float:
    """Peak signal-to-noise ratio in dB of values in 0..255."""
    error = float(np.mean((made - truth) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def box_overlap(one: Box, other: Box) -> float:
    """Intersection over union of two boxes."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    area = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return width * height / (area - width * height)


def colour_word(rgb: npt.NDArray[np.float64]) -> str:
    """The nearest colour of the world."""
    distances = {word: math.dist(rgb.tolist(), colour) for word, colour in world.COLOURS.items()}
    return min(distances, key=distances.__getitem__)


def look(image: Image.Image, shapes: Sequence[str] = world.SHAPES) -> Seen:
    """Tell shape and colours of a picture of one thing on a plain background."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    backdrop = np.median(edge, axis=0)
    distance = np.linalg.norm(pixels - backdrop, axis=2)
    strongest = float(np.percentile(distance, 99))
    if strongest < _FAINT:
        return Seen(None, None, colour_word(backdrop), 0.0)
    soft = np.clip(distance / strongest, 0, 1)
    mask = _largest((soft > 0.5).astype(np.uint8))
    # Without the blurred rim, where there is more than that: what is largest may be faint beside a few bright specks.
    inside = mask & (soft > 0.8)
    colour = colour_word(np.median(pixels[(inside if inside.any() else mask).astype(bool)], axis=0))
    found = _framed(soft * cv2.dilate(mask, np.ones((3, 3), np.uint8)), mask)
    scores = {shape: max(_soft_overlap(found, template) for template in _templates(shape)) for shape in shapes}
    best = max(scores, key=scores.__getitem__)
    return Seen(best, colour, colour_word(backdrop), scores[best])


def _largest(mask: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    _count, labels, stats, _centres = cv2.connectedComponentsWithStats(mask, connectivity=8)
    if len(stats) < 2:
        return mask
    return np.asarray(labels == 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA])), dtype=np.uint8)


def _framed(soft: npt.NDArray[np.float64], mask: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """What lies in the mask's box, in the middle of a square, at the templates' size."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    cut = soft[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    side = max(cut.shape)
    top, left = (side - cut.shape[0]) // 2, (side - cut.shape[1]) // 2
    square = np.zeros((side, side))
    square[top : top + cut.shape[0], left : left + cut.shape[1]] = cut
    return np.asarray(cv2.resize(square, (_TEMPLATE, _TEMPLATE), interpolation=cv2.INTER_AREA), dtype=np.float64)


@cache
def _templates(shape: str) -> list[npt.NDArray[np.float64]]:
    """A shape at several angles and sizes, as ``look`` would frame it."""
    made = []
    for angle in (-8.0, -4.0, 0.0, 4.0, 8.0):
        for radius in (0.17, 0.235, 0.32):
            thing = world.Thing(shape, "white", "medium", (0.5, 0.5), radius, angle, (255, 255, 255))
            picture = world.draw(world.Scene((thing,), "black", "plain", (0, 0, 0), 0.0)).image
            soft = np.asarray(picture.convert("L"), dtype=np.float64) / 255
            made.append(_framed(soft, (soft > 0.5).astype(np.uint8)))
    return made


def _soft_overlap(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> float:
    return float(np.minimum(one, other).sum() / np.maximum(one, other).sum())
