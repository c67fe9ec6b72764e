"""Scenes with a subject whose place is known, to measure croppers with: drawn, and put together from photographs.

Backgrounds are fractal noise, skies over ground, grass, gravel and brick, and blurred photographs; subjects are
textured shapes and things cut out of photographs that scikit-image carries (GrabCut in a box
given by hand). Nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import skimage
from numpy.typing import NDArray
from PIL import Image

Box = tuple[float, float, float, float]
Pixels = NDArray[np.uint8]
ASPECTS = ((3, 2), (4, 3), (16, 9), (9, 16), (2, 3))
_DATA = Path(skimage.__file__).parent / "data"
_CUTTINGS: dict[str, Box] = {
    "coffee.png": (0.12, 0.03, 0.81, 0.98),
    "motorcycle_left.png": (0.11, 0.18, 0.94, 0.93),
    "camera.png": (0.02, 0.10, 0.68, 0.99),
    "astronaut.png": (0.01, 0.01, 0.73, 0.99),
    "chelsea.png": (0.02, 0.01, 0.88, 0.99),
    "rocket.jpg": (0.45, 0.28, 0.55, 0.99),
}
_GROUNDS = ("grass.png", "gravel.png", "brick.png")
_SCENES = ("chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "ihc.png", "retina.jpg")


@dataclass(frozen=True)
class Scene:
    """A picture and where its subject is.

    Attributes:
        image: RGB.
        box: the subject's, in 0..1.
        kind: ``drawn`` or ``cut``.
    """

    image: Image.Image
    box: Box
    kind: str


def scenes(count: int, seed: int = 1) -> Iterator[Scene]:
    """Scenes, half of them of each kind; the same for the same seed."""
    random = np.random.default_rng(seed)
    for number in range(count):
        yield _scene(random, "drawn" if number % 2 else "cut")


def _scene(random: np.random.Generator, kind: str) -> Scene:
    across, down = ASPECTS[random.integers(len(ASPECTS))]
    scale = 512 / min(across, down)
    width, height = round(across * scale), round(down * scale)
    canvas = _background(random, width, height)
    for _ in range(int(random.integers(0, 3))):
        _paste_distractor(random, canvas)
    subject, mask = _drawn_subject(random) if kind == "drawn" else _cut_subject(random)
    side = float(random.uniform(0.22, 0.75)) * min(width, height)
    fit = side / max(mask.shape)
    size = (max(8, round(mask.shape[1] * fit)), max(8, round(mask.shape[0] * fit)))
    subject, mask = cv2.resize(subject, size, interpolation=cv2.INTER_AREA), cv2.resize(mask, size)
    x = round(float(random.beta(1.6, 1.6)) * (width - size[0]))
    y = round(float(random.beta(2.2, 2.2)) * (height - size[1]))
    _shade(random, canvas, mask, x, y)
    part = canvas[y : y + size[1], x : x + size[0]]
    part[:] = (mask[..., None] * subject + (1 - mask[..., None]) * part).astype(np.uint8)
    noise = random.normal(0, float(random.uniform(0, 5)), canvas.shape[:2])[..., None]
    canvas = np.clip(canvas + noise, 0, 255).astype(np.uint8)
    if random.random() < 0.25:
        canvas = _vignette(canvas)
    rows, columns = np.where(mask > 0.5)
    box = (
        (x + int(columns.min())) / width,
        (y + int(rows.min())) / height,
        (x + int(columns.max()) + 1) / width,
        (y + int(rows.max()) + 1) / height,
    )
    return Scene(Image.fromarray(canvas), box, kind)


def fractal(random: np.random.Generator, width: int, height: int, roughness: float = 0.55) -> NDArray[np.float32]:
    """Noise of all scales, 0..1, [height, width]."""
    total = np.zeros((height, width), dtype=np.float32)
    weight, cells = 1.0, 2
    while cells < max(width, height) / 2:
        grain = random.random((max(2, cells * height // max(width, height)), cells)).astype(np.float32)
        total += weight * cv2.resize(grain, (width, height), interpolation=cv2.INTER_CUBIC)
        weight *= roughness
        cells *= 2
    return np.asarray((total - total.min()) / (np.ptp(total) + 1e-6), dtype=np.float32)


def _colour(random: np.random.Generator) -> NDArray[np.float32]:
    hue, saturation, value = random.uniform(0, 180), random.beta(1.5, 2.2) * 255, random.uniform(60, 245)
    pixel = np.array([[[hue, saturation, value]]], dtype=np.uint8)
    return np.asarray(cv2.cvtColor(pixel, cv2.COLOR_HSV2RGB)[0, 0], dtype=np.float32)


def _mixed(noise: NDArray[np.float32], one: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float32]:
    return noise[..., None] * one + (1 - noise[..., None]) * other


def _background(random: np.random.Generator, width: int, height: int) -> Pixels:
    match int(random.integers(5)):
        case 0:
            made = _mixed(fractal(random, width, height, 0.7), _colour(random), _colour(random))
        case 1:  # a sky, or a wall, over ground
            line = int(height * random.uniform(0.3, 0.7))
            made = np.empty((height, width, 3), dtype=np.float32)
            base = _colour(random)
            made[:line] = _mixed(fractal(random, width, line, 0.4), base, base * 0.85)
            made[line:] = _mixed(fractal(random, width, height - line, 0.8), _colour(random), _colour(random))
        case 2:
            texture = _photograph(_GROUNDS[random.integers(len(_GROUNDS))])
            made = _part_of(random, texture, width, height) / 255 * (0.4 * _colour(random) + 0.6 * 255)
        case 3:  # out of focus
            photograph = _photograph(_SCENES[random.integers(len(_SCENES))])
            part = _part_of(random, photograph, width, height)
            made = cv2.GaussianBlur(part, (0, 0), float(random.uniform(8, 30))).astype(np.float32)
        case _:  # in focus on one side of the frame, as a table or a street
            ramp = np.linspace(0, 1, height, dtype=np.float32)[:, None].repeat(width, 1)
            smooth = _mixed(ramp, _colour(random), _colour(random))
            made = 0.75 * smooth + 0.25 * _mixed(fractal(random, width, height, 0.85), _colour(random), _colour(random))
    return np.asarray(np.clip(made, 0, 255), dtype=np.uint8)


@cache
def _photograph(name: str) -> Pixels:
    with Image.open(_DATA / name) as image:
        return np.asarray(image.convert("RGB"))


def _part_of(random: np.random.Generator, picture: Pixels, width: int, height: int) -> Pixels:
    """A random part of a picture, as large as can be, at another size."""
    scale = min(picture.shape[1] / width, picture.shape[0] / height) * float(random.uniform(0.5, 1))
    across, down = int(width * scale), int(height * scale)
    x, y = int(random.integers(picture.shape[1] - across + 1)), int(random.integers(picture.shape[0] - down + 1))
    return np.asarray(cv2.resize(picture[y : y + down, x : x + across], (width, height)))


def _shape(random: np.random.Generator, side: int = 256) -> NDArray[np.float32]:
    """A blob, a polygon or two of them on each other, cut to its box."""
    mask = np.zeros((side, side), dtype=np.uint8)
    for _ in range(int(random.integers(1, 4))):
        centre = random.uniform(0.3, 0.7, 2) * side
        if random.random() < 0.5:
            axes = random.uniform(0.08, 0.3, 2) * side
            cv2.ellipse(
                mask,
                centre.astype(int).tolist(),
                axes.astype(int).tolist(),
                float(random.uniform(0, 180)),
                0,
                360,
                255,
                -1,
            )
        else:
            angles = np.sort(random.uniform(0, 2 * np.pi, int(random.integers(3, 9))))
            reach = random.uniform(0.1, 0.3, len(angles)) * side
            points = centre + np.stack([np.cos(angles), np.sin(angles)], axis=1) * reach[:, None]
            cv2.fillPoly(mask, [points.astype(np.int32)], 255)
    rows, columns = np.where(mask > 0)
    if len(rows) < 200:
        return _shape(random, side)
    cut = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    return np.asarray(cv2.GaussianBlur(cut, (0, 0), 0.8), dtype=np.float32) / np.float32(255)


def _drawn_subject(random: np.random.Generator) -> tuple[Pixels, NDArray[np.float32]]:
    mask = _shape(random)
    height, width = mask.shape
    noise = fractal(random, width, height, float(random.uniform(0.3, 0.9)))
    body = _mixed(noise, _colour(random), _colour(random))
    light = np.linspace(1.15, 0.75, height, dtype=np.float32)[:, None, None]
    return np.clip(body * light, 0, 255).astype(np.uint8), mask


@cache
def _cutting(name: str) -> tuple[Pixels, NDArray[np.float32]]:
    picture = _photograph(name)
    height, width = picture.shape[:2]
    x0, y0, x1, y1 = _CUTTINGS[name]
    area = (int(x0 * width), int(y0 * height), int((x1 - x0) * width), int((y1 - y0) * height))
    marks = np.zeros((height, width), dtype=np.uint8)
    cv2.setRNGSeed(1)
    cv2.grabCut(picture[..., ::-1].copy(), marks, area, np.zeros((1, 65)), np.zeros((1, 65)), 4, cv2.GC_INIT_WITH_RECT)
    mask = np.isin(marks, (cv2.GC_FGD, cv2.GC_PR_FGD)).astype(np.uint8)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask)
    largest = 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))
    mask = cv2.morphologyEx((labels == largest).astype(np.uint8), cv2.MORPH_CLOSE, np.ones((9, 9)))
    rows, columns = np.where(mask > 0)
    cut = (slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1))
    return picture[cut], cv2.GaussianBlur(mask[cut].astype(np.float32), (0, 0), 1.0)


def _cut_subject(random: np.random.Generator) -> tuple[Pixels, NDArray[np.float32]]:
    names: Sequence[str] = tuple(_CUTTINGS)
    picture, mask = _cutting(names[int(random.integers(len(names)))])
    if random.random() < 0.5:
        picture, mask = picture[:, ::-1], mask[:, ::-1]
    return np.clip(picture * float(random.uniform(0.7, 1.15)), 0, 255).astype(np.uint8), np.ascontiguousarray(mask)


def _paste_distractor(random: np.random.Generator, canvas: Pixels) -> None:
    """Something small or dull at the picture's border."""
    height, width = canvas.shape[:2]
    subject, mask = _drawn_subject(random)
    side = float(random.uniform(0.06, 0.16)) * min(width, height)
    fit = side / max(mask.shape)
    size = (max(4, round(mask.shape[1] * fit)), max(4, round(mask.shape[0] * fit)))
    subject, mask = cv2.resize(subject, size, interpolation=cv2.INTER_AREA), cv2.resize(mask, size) * 0.7
    edge = int(random.integers(4))
    x = {0: 0, 1: width - size[0]}.get(edge, int(random.integers(width - size[0] + 1)))
    y = {2: 0, 3: height - size[1]}.get(edge, int(random.integers(height - size[1] + 1)))
    part = canvas[y : y + size[1], x : x + size[0]]
    part[:] = (mask[..., None] * subject + (1 - mask[..., None]) * part).astype(np.uint8)


def _shade(random: np.random.Generator, canvas: Pixels, mask: NDArray[np.float32], x: int, y: int) -> None:
    """A soft shadow under the subject, sometimes."""
    if random.random() < 0.5:
        return
    height, width = canvas.shape[:2]
    shadow = np.zeros((height, width), dtype=np.float32)
    shadow[y : y + mask.shape[0], x : x + mask.shape[1]] = mask
    move = np.array([[1, 0, 0.08 * mask.shape[1]], [0, 1, 0.06 * mask.shape[0]]], dtype=np.float32)
    shadow = cv2.GaussianBlur(cv2.warpAffine(shadow, move, (width, height)), (0, 0), 0.05 * max(mask.shape) + 1)
    canvas[:] = (canvas * (1 - 0.4 * shadow[..., None])).astype(np.uint8)


def _vignette(canvas: Pixels) -> Pixels:
    height, width = canvas.shape[:2]
    rows, columns = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)[None, :]
    return (canvas * (1 - 0.25 * (rows**2 + columns**2))[..., None]).clip(0, 255).astype(np.uint8)
