"""A decoded picture taken strip by strip, so that its conversions do not need it several times in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from handlers.crop.colour import DEEP_MODES, GROUND, Ground, span_of, to_srgb

_STRIP_PIXELS = 2_000_000
# Modes in which the mean of pixels is the pixel of the mean: what is reduced first is converted faster.
_PLAIN_MODES = ("RGB", "L", "CMYK")


@dataclass(frozen=True)
class Rows:
    """The pixels of a picture, as they are stored.

    Attributes:
        size: (width, height).
        mode: Pillow's.
        take: the rows from .. to (not included) as a picture.
    """

    size: tuple[int, int]
    mode: str
    take: Callable[[int, int], Image.Image]

    @classmethod
    def of(cls, image: Image.Image) -> Rows:
        """A loaded picture's."""
        profile = image.info.get("icc_profile")

        def take(start: int, end: int) -> Image.Image:
            if (start, end) == (0, image.height):
                return image
            part = image.crop((0, start, image.width, end))
            part.info = {key: image.info[key] for key in ("transparency",) if key in image.info}
            if profile:
                part.info["icc_profile"] = profile
            return part

        return cls(image.size, image.mode, take)

    @classmethod
    def of_heif(cls, content: bytes) -> Rows:
        """Those of the main picture of a HEIC file, without Pillow's copy of them. Needs pillow-heif."""
        import pillow_heif

        picture = pillow_heif.open_heif(content, convert_hdr_to_8bit=True)
        profile = picture.info.get("icc_profile")
        values: Any = np.asarray(picture)

        def take(start: int, end: int) -> Image.Image:
            part = Image.fromarray(np.ascontiguousarray(values[start:end]))
            if profile:
                part.info["icc_profile"] = profile
            return part

        return cls(picture.size, picture.mode, take)


def reduced_srgb(rows: Rows, factor: int, ground: Ground = GROUND) -> tuple[Image.Image, str | None]:
    """The picture in sRGB, 1 / ``factor`` as large on each side (rounded up), as an image of its own without metadata.

    Returns:
        It, and a sentence if its colour profile could not be used.
    """
    width, height = rows.size
    span = span_of(part for _, part in _strips(rows, 1)) if rows.mode in DEEP_MODES else None
    target: Image.Image | None = None
    warning = None
    for start, part in _strips(rows, factor):
        if part.mode in _PLAIN_MODES and factor > 1 and not part.has_transparency_data:
            profile = part.info.get("icc_profile")
            part = part.reduce(factor)
            part.info = {"icc_profile": profile} if profile else {}
            colours, warning = to_srgb(part, span, ground)
        else:
            colours, warning = to_srgb(part, span, ground)
            colours = colours.reduce(factor) if factor > 1 else colours
        if colours.height == -(-height // factor):
            target = colours.copy()
            break
        target = target or Image.new("RGB", (-(-width // factor), -(-height // factor)))
        target.paste(colours, (0, start // factor))
    if target is None:
        raise ValueError("the picture has no rows")
    target.info = {}
    return target, warning


def _strips(rows: Rows, factor: int) -> Iterator[tuple[int, Image.Image]]:
    """(first row, strip) from the top; strips begin at multiples of ``factor``."""
    width, height = rows.size
    step = max(1, _STRIP_PIXELS // (width * factor)) * factor
    for start in range(0, height, step):
        yield start, rows.take(start, min(height, start + step))
