"""What stands out in a picture without a face, by classic means: no weights, a few milliseconds.

Two cues, multiplied by a mild pull to the centre: how far a pixel's colour (CIELAB) is from every colour of the
picture's border, because a border is mostly ground (the prior of Wei et al., "Geodesic saliency using background
priors", 2012); and local contrast, the distance from the blurred picture, because what is in focus has texture.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from handlers.crop.window import Box

_SIDE = 160
_BORDER = 0.06
"""Share of each side that counts as border."""
_BORDER_COLOURS = 6
_LEAST = 6.0
"""ΔE (CIELAB) below which nothing stands out at all: noise and the blocks of JPEG."""
_TAIL = 0.06
"""Share of the salient mass that may lie outside the box at each of its ends."""
_DIFFUSE = 0.97
"""A box that spans more than this of both sides says nothing."""


def salient_box(image: Image.Image) -> Box | None:
    """The box around what stands out in an upright RGB picture, or None where nothing does."""
    scale = _SIDE / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    small = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0))
    return box_of(salience(small))


def salience(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """How much each pixel stands out, in ΔE.

    Args:
        pixels: [height, width, 3], RGB.

    Returns:
        [height, width], 0 and more.
    """
    lab = cv2.cvtColor(pixels.astype(np.float32) / 255.0, cv2.COLOR_RGB2Lab)
    height, width = lab.shape[:2]
    colours = _border_colours(lab)
    from_border = np.min(
        np.stack([np.linalg.norm(lab - colour, axis=2) for colour in colours]),
        axis=0,
    )
    blur = cv2.GaussianBlur(lab, (0, 0), sigmaX=_SIDE / 20)
    contrast = cv2.GaussianBlur(np.linalg.norm(lab - blur, axis=2), (0, 0), sigmaX=_SIDE / 40)
    rows = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    columns = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    pull = np.exp(-0.5 * (rows**2 + columns**2))
    result: NDArray[np.float32] = ((0.5 * from_border + contrast) * pull).astype(np.float32)
    return result


def _border_colours(lab: NDArray[np.float32]) -> NDArray[np.float32]:
    """The main colours of the border, [colours, 3], those of the four sides alike."""
    height, width = lab.shape[:2]
    rows, columns = max(1, round(height * _BORDER)), max(1, round(width * _BORDER))
    border = np.concatenate(
        [
            lab[:rows].reshape(-1, 3),
            lab[-rows:].reshape(-1, 3),
            lab[:, :columns].reshape(-1, 3),
            lab[:, -columns:].reshape(-1, 3),
        ]
    )
    if len(border) <= _BORDER_COLOURS:
        return border
    # Colours sorted by lightness give the start, so that the same picture always gives the same answer.
    order = np.argsort(border[:, 0], kind="stable")
    start = border[order[np.linspace(0, len(border) - 1, _BORDER_COLOURS).round().astype(int)]]
    return _k_means(border, start)


def _k_means(points: NDArray[np.float32], centres: NDArray[np.float32], rounds: int = 8) -> NDArray[np.float32]:
    for _ in range(rounds):
        nearest = np.argmin(np.linalg.norm(points[:, None] - centres[None], axis=2), axis=1)
        centres = np.stack(
            [
                points[nearest == index].mean(axis=0) if np.any(nearest == index) else centre
                for index, centre in enumerate(centres)
            ]
        )
    return centres


def box_of(values: NDArray[np.float32]) -> Box | None:
    """The box that holds the bulk of what exceeds the ordinary.

    Args:
        values: [height, width], from ``salience``.
    """
    threshold = float(values.mean() + 0.5 * values.std())
    if float(values.max()) < _LEAST:
        return None
    mass = np.where(values > threshold, values - threshold, 0.0)
    if not mass.any():
        return None
    x0, x1 = _bulk(mass.sum(axis=0))
    y0, y1 = _bulk(mass.sum(axis=1))
    if x1 - x0 > _DIFFUSE and y1 - y0 > _DIFFUSE:
        return None
    return (x0, y0, x1, y1)


def _bulk(mass: NDArray[np.float64]) -> tuple[float, float]:
    """The shares of a line between which all but the tails of a mass lie."""
    total = np.concatenate([[0.0], np.cumsum(mass)])
    places = np.linspace(0.0, 1.0, len(total))
    start, end = np.interp([_TAIL, 1 - _TAIL], total / total[-1], places)
    return float(start), float(end)
