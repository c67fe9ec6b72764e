"""What stands out in a picture without a face: several clues for every place, weighed, and the window with the most.

The clues: how far a colour (CIELAB) is from every colour of the picture's border, because a border is mostly ground
(the prior of Wei et al., "Geodesic saliency using background priors", 2012); local contrast; fine detail, because what
is in focus has it; what a small network takes for the foreground; and how near the middle a place is. Their weights
were fitted by logistic regression on seven hundred scenes with a known subject: some of ``benchmarks/scenes.py``, and
things cut out of photographs before other photographs. They are few, so that they hold for other pictures.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from handlers.crop.window import Box

Map = NDArray[np.float32]
_SIDE = 128
_BORDER = 0.05
"""Share of the shorter side that counts as border."""
_BORDER_COLOURS = 8
_LEAST = 6.0
"""ΔE (CIELAB) below which nothing stands out at all: noise and the blocks of JPEG."""
_TAIL = 0.04
"""Share of the salient mass that may lie outside the box at each of its ends."""
# What is unlike the rest counts by the rest's spread, and by this much more, so that even ground is not blown up.
_SPREAD = {"border": 2.0, "contrast": 0.5, "focus": 0.3}
_FURTHEST = 2.5
_FAR = 30.0
_WEIGHTS = {
    "border": 0.25,
    "far": 0.70,
    "contrast": 0.81,
    "focus": 0.83,
    "front": 2.62,
    "front of much": -3.27,
    "front and border": 0.56,
    "off column": -2.95,
    "off row": -3.67,
    "inside": 3.03,
    "": -2.96,
}


def salient_box(image: Image.Image, foreground: Map | None = None, excluded: Sequence[Box] = ()) -> Box | None:
    """The box around what stands out in an upright RGB picture, or None where nothing does.

    Args:
        image: of any scale.
        foreground: how likely each place is to stand in front, from ``ForegroundFinder``.
        excluded: boxes in which nothing counts.
    """
    x0, y0, x1, y1 = content_box(image)
    whole = (x0, y0, x1, y1) == (0, 0, *image.size)
    part = image if whole else image.crop((x0, y0, x1, y1))
    if foreground is not None and not whole:
        foreground = _cut(foreground, (x0 / image.width, y0 / image.height, x1 / image.width, y1 / image.height))
    likely = likelihood(part, foreground)
    if likely is None:
        return None
    height, width = likely.shape
    for box in excluded:
        across, down = image.width / part.width * width, image.height / part.height * height
        left, right = (round((box[i] - x0 / image.width) * across) for i in (0, 2))
        top, bottom = (round((box[i] - y0 / image.height) * down) for i in (1, 3))
        likely[max(0, top) : max(0, bottom), max(0, left) : max(0, right)] = 0
    found = box_of(likely, image.size[0] >= image.size[1], min(image.size) / max(part.size))
    if found is None or whole:
        return found
    return (
        (x0 + found[0] * part.width) / image.width,
        (y0 + found[1] * part.height) / image.height,
        (x0 + found[2] * part.width) / image.width,
        (y0 + found[3] * part.height) / image.height,
    )


def likelihood(image: Image.Image, foreground: Map | None = None) -> Map | None:
    """How likely each place is to belong to the picture's subject, [height, width] in 0..1; None where all is even."""
    clues = clues_of(image, foreground)
    if clues is None:
        return None
    total = sum(np.float32(_WEIGHTS[name]) * value for name, value in clues.items())
    return np.asarray(1 / (1 + np.exp(-total)), dtype=np.float32)


def clues_of(image: Image.Image, foreground: Map | None = None) -> dict[str, Map] | None:
    """The clues by name, each [height, width]; None for an even picture."""
    scale = _SIDE / max(image.size)
    width, height = (max(8, round(length * scale)) for length in image.size)
    fine = np.asarray(image.resize((2 * width, 2 * height), Image.Resampling.BILINEAR, reducing_gap=2.0))
    small = cv2.resize(fine, (width, height), interpolation=cv2.INTER_AREA)
    lab = cv2.cvtColor(small.astype(np.float32) / 255.0, cv2.COLOR_RGB2Lab)
    border = _from_border(lab)
    if float(border.max()) < _LEAST:
        return None
    contrast = _length(lab - cv2.GaussianBlur(lab, (0, 0), _SIDE / 16))
    standard = _standard(border, "border")
    front = (
        np.zeros_like(border)
        if foreground is None
        else cv2.resize(foreground, (width, height), interpolation=cv2.INTER_AREA)
    )
    rows = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    columns = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    return {
        "border": standard,
        "far": np.minimum(border / _FAR, 2.0),
        "contrast": _standard(cv2.GaussianBlur(contrast, (0, 0), _SIDE / 40), "contrast"),
        "focus": _standard(_detail(fine, (width, height)), "focus"),
        "front": front,
        "front of much": front * front.mean(),
        "front and border": front * standard.clip(-2, 2),
        "off column": columns**2 + 0 * rows,
        "off row": rows**2 + 0 * columns,
        "inside": 5 * np.minimum(np.minimum(1 - abs(rows), 1 - abs(columns)), 0.2),
        "": np.ones_like(border),
    }


def _length(vectors: Map) -> Map:
    return np.sqrt(np.einsum("ijk,ijk->ij", vectors, vectors))


def _standard(values: Map, name: str) -> Map:
    return ((values - values.mean()) / (values.std() + _SPREAD[name])).clip(-_FURTHEST, _FURTHEST)


def _detail(fine: NDArray[np.uint8], size: tuple[int, int]) -> Map:
    """Detail of one or two pixels at twice the size, spread a little."""
    grey = cv2.cvtColor(fine, cv2.COLOR_RGB2GRAY).astype(np.float32)
    detail = cv2.resize(np.abs(grey - cv2.GaussianBlur(grey, (0, 0), 1.2)), size, interpolation=cv2.INTER_AREA)
    spread: Map = cv2.GaussianBlur(detail, (0, 0), _SIDE / 32)
    return spread


def _from_border(lab: Map) -> Map:
    """The distance in ΔE to the nearest of the main colours of the border, those of the four sides alike."""
    depth = max(1, round(_BORDER * min(lab.shape[:2])))
    sides = (lab[:depth], lab[-depth:], lab[:, :depth], lab[:, -depth:])
    border = np.concatenate([side.reshape(-1, 3) for side in sides])
    # Colours sorted by lightness give the start, so that the same picture always gives the same answer.
    order = np.argsort(border[:, 0], kind="stable")
    start = border[order[np.linspace(0, len(border) - 1, _BORDER_COLOURS).round().astype(int)]]
    colours = _k_means(border[::2], start)
    # |a - b|² = |a|² - 2ab + |b|²
    flat = lab.reshape(-1, 3)
    squares = (flat**2).sum(1)[:, None] - 2 * flat @ colours.T + (colours**2).sum(1)
    nearest: Map = np.sqrt(np.maximum(squares.min(axis=1), 0)).reshape(lab.shape[:2])
    return nearest


def _k_means(points: Map, centres: Map, rounds: int = 6) -> Map:
    for _ in range(rounds):
        squares = (centres**2).sum(1) - 2 * points @ centres.T
        nearest = np.eye(len(centres), dtype=np.float32)[squares.argmin(axis=1)]
        members = nearest.sum(0)
        moved = nearest.T @ points / np.maximum(members, 1)[:, None]
        centres = np.where(members[:, None] > 0, moved, centres)
    return centres


def box_of(likely: Map, wide: bool, window: float) -> Box | None:
    """The box that holds the bulk of what a window can hold of the salient mass.

    Args:
        likely: [height, width].
        wide: whether the window moves from left to right, else from top to bottom.
        window: its length as a share of the longer side.
    """
    values = likely**2
    return densest_box(np.maximum(values - (values.mean() + values.std()), 0), wide, window, _TAIL)


def densest_box(mass: Map, wide: bool, window: float, tail: float) -> Box | None:
    """The box around the mass that the best window can hold, less its tails; None where there is no mass.

    Args:
        mass: [height, width], not negative.
        wide: whether the window moves from left to right, else from top to bottom.
        window: its length as a share of the longer side.
        tail: share of the held mass that may lie outside the box at each of its ends.
    """
    line = mass.sum(axis=0 if wide else 1)
    if not line.any():
        return None
    span = min(len(line), max(1, round(len(line) * window)))
    total = np.concatenate([[0.0], np.cumsum(line, dtype=np.float64)])
    held = total[span:] - total[:-span]
    # Of the places that hold nearly the most, the middle one.
    best = np.flatnonzero(held >= 0.995 * held.max())
    start = int(best[len(best) // 2])
    part = mass[:, start : start + span] if wide else mass[start : start + span]
    across, down = _bulk(part.sum(axis=0), tail), _bulk(part.sum(axis=1), tail)
    height, width = mass.shape
    left, top = (start, 0) if wide else (0, start)
    return (
        (left + across[0]) / width,
        (top + down[0]) / height,
        (left + across[1]) / width,
        (top + down[1]) / height,
    )


def _bulk(mass: NDArray[np.floating], tail: float) -> tuple[float, float]:
    """The places of a line between which all but the tails of a mass lie."""
    total = np.concatenate([[0.0], np.cumsum(mass, dtype=np.float64)])
    start, end = np.interp([tail, 1 - tail], total / total[-1], np.arange(len(total)))
    return float(start), float(end)


def _cut(values: Map, box: Box) -> Map:
    height, width = values.shape
    x0, y0 = int(box[0] * width), int(box[1] * height)
    return values[y0 : max(y0 + 1, round(box[3] * height)), x0 : max(x0 + 1, round(box[2] * width))]


_FRAME_SIDE = 96
_EVEN, _STEP = 8.0, 20.0
_MOST_FRAME = 0.45


def content_box(image: Image.Image) -> tuple[int, int, int, int]:
    """The picture without the even bars at its ends (a screenshot's, a film's), in its pixels.

    A bar ends where most of a line turns into something else at once; an even ground that a subject grows into has no
    such end, and stays.
    """
    scale = _FRAME_SIDE / max(image.size)
    size = (max(4, round(image.width * scale)), max(4, round(image.height * scale)))
    tiny = np.asarray(image.resize(size, Image.Resampling.NEAREST)).astype(np.float32)
    top, bottom = _bars(tiny)
    left, right = _bars(tiny.transpose(1, 0, 2))
    return (
        round(left * image.width),
        round(top * image.height),
        image.width - round(right * image.width),
        image.height - round(bottom * image.height),
    )


def _bars(lines: Map) -> tuple[float, float]:
    """The shares of the lines that are an even bar at the start and at the end; both ends have one, or none counts."""
    start, end = _bar(lines), _bar(lines[::-1])
    return (start, end) if start and end else (0.0, 0.0)


def _bar(lines: Map) -> float:
    colour = np.median(lines[0], axis=0)
    even = (np.abs(lines - colour).max(axis=2) > _EVEN).mean(axis=1) < 0.02
    length = int(np.argmin(even)) if not even.all() else len(even)
    if length < 2 or length > _MOST_FRAME * len(even) or length + 1 >= len(even):
        return 0.0
    # One line may still hold some of both, so the step is looked for across two.
    step = np.abs(lines[length + 1] - lines[length - 1]).max(axis=1) > _STEP
    return (length + 0.5) / len(even) if step.mean() > 0.7 else 0.0
