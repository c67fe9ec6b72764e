"""Figures that say whether a picture is worth learning from: sharpness, exposure, likeness. Pure.

All are taken from the picture at a fixed size, so that they do not depend on the scale at which it was decoded.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

_SIDE = 256
"""Pixels of the shorter side at which sharpness and exposure are measured; smaller pictures keep theirs."""
_LONGEST = 1024
_TILE = 64
_CLIPPED_DARK, _CLIPPED_BRIGHT = 4, 251
_HASH_SIDE = 8


def health(image: Image.Image, size: tuple[int, int]) -> dict[str, Any]:
    """The figures of an upright RGB picture.

    Args:
        image: it, of any scale.
        size: (width, height) of the source in upright pixels.

    Returns:
        ``sharpness``: the standard deviation of the Laplacian of the lightness (0..255) in the sharpest part of the
        picture (the 90th percentile of its tiles), when its shorter side has 256 pixels: below about 5 it is blurred,
        20 and more is sharp. ``exposure``: ``mean`` lightness in 0..1, and the shares of pixels that are clipped to
        ``dark`` and ``bright``. ``dhash``: a 64-bit difference hash as 16 hex digits; copies differ in a few bits.
        ``shorter_side``: pixels.
    """
    small = _grey(image)
    return {
        "sharpness": round(_sharpness(small), 2),
        "exposure": {
            "mean": round(float(small.mean()) / 255, 4),
            "dark": round(float((small <= _CLIPPED_DARK).mean()), 4),
            "bright": round(float((small >= _CLIPPED_BRIGHT).mean()), 4),
        },
        "dhash": difference_hash(small),
        "shorter_side": min(size),
    }


def difference_hash(grey: NDArray[np.uint8]) -> str:
    """Whether each of 8 × 8 places is lighter than its right neighbour, row by row: 16 hex digits.

    (N. Krawetz, "Kind of like that", 2013.)
    """
    tiny = cv2.resize(grey, (_HASH_SIDE + 1, _HASH_SIDE), interpolation=cv2.INTER_AREA).astype(np.int16)
    bits = np.packbits((tiny[:, :-1] > tiny[:, 1:]).ravel())
    return bits.tobytes().hex()


def _grey(image: Image.Image) -> NDArray[np.uint8]:
    scale = min(_SIDE / min(image.size), _LONGEST / max(image.size), 1.0)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    values = cv2.cvtColor(np.asarray(image), cv2.COLOR_RGB2GRAY)
    small: NDArray[np.uint8] = cv2.resize(values, size, interpolation=cv2.INTER_AREA)
    return small


def _sharpness(grey: NDArray[np.uint8]) -> float:
    edges = cv2.Laplacian(grey, cv2.CV_32F)
    height, width = edges.shape
    tiles = [
        float(edges[y : y + _TILE, x : x + _TILE].std())
        for y in range(0, height, _TILE)
        for x in range(0, width, _TILE)
    ]
    return float(np.percentile(tiles, 90))
