"""From a window to pixels: for people in ``crops/``, and for training from the original."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from handlers.crop.decode import PIXEL_LIMIT, Decoded, OpenPicture, read_source
from sessions import files

_JPEG_QUALITY = 95


def render_window(
    source: Path, box: Sequence[int], size: int | tuple[int, int], pixel_limit: int = PIXEL_LIMIT
) -> Image.Image:
    """A window of a picture file at exactly the size that training needs, from the original's own resolution.

    Args:
        source: the picture.
        box: (x0, y0, x1, y1) in upright source pixels, as the crop's facts have it.
        size: pixels; one number is a square. A window smaller than this is enlarged (the crop's facts warn of it).
        pixel_limit: refuse pictures with more pixels.

    Returns:
        Mode RGB, sRGB, upright.

    Raises:
        Refusal: as ``read_source``, ``OpenPicture`` and ``OpenPicture.decode``.
        ValueError: the box is empty or leaves the picture.
    """
    wanted = (size, size) if isinstance(size, int) else size
    opened = OpenPicture(read_source(source), pixel_limit)
    decoded = opened.decode(needed_scale(box, wanted))
    return render(decoded, box, wanted)


def needed_scale(box: Sequence[int], size: tuple[int, int]) -> float:
    """The scale of the whole picture at which the window has at least ``size`` pixels; more than 1 if it never has."""
    width, height = box[2] - box[0], box[3] - box[1]
    if width <= 0 or height <= 0:
        raise ValueError(f"the window {tuple(box)} is empty")
    return max(size[0] / width, size[1] / height)


def render(decoded: Decoded, box: Sequence[int], size: tuple[int, int]) -> Image.Image:
    """A window of a decoded picture at ``size`` pixels (Lanczos).

    Raises:
        ValueError: the box leaves the picture.
    """
    width, height = decoded.size
    if not (0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height):
        raise ValueError(f"the window {tuple(box)} is empty or leaves the picture of {width} × {height}")
    across, down = decoded.image.width / width, decoded.image.height / height
    part = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
    return decoded.image.resize(size, Image.Resampling.LANCZOS, box=part, reducing_gap=2.0)


def shrunk_to(size: tuple[int, int], shorter_side: int) -> tuple[int, int]:
    """The size with the same aspect whose shorter side is at most ``shorter_side``; never larger than ``size``."""
    scale = min(1.0, shorter_side / min(size))
    return (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))


def write_picture(image: Image.Image, output: Path) -> None:
    """Write a picture atomically and without metadata.

    JPEG 95 with full colour resolution; PNG or WebP, both without loss, where the name ends so.
    """
    content = io.BytesIO()
    match output.suffix.lower():
        case ".png":
            image.save(content, "PNG", compress_level=1)
        case ".webp":
            image.save(content, "WEBP", lossless=True)
        case _:
            image.save(content, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    files.write_bytes(output, content.getvalue())
