"""Large pictures that have no reduced decoding of their own, read in passing by libvips: never whole in memory.

Pillow holds four bytes a pixel of the whole picture; libvips reads PNG and TIFF line by line and shrinks as it goes,
and asks the decoder of WebP for a smaller picture. Each loader is named: nothing else that libvips can read is tried.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from handlers.crop.colour import GROUND, Ground
from handlers.crop.sniff import webp_size

FORMATS = ("PNG", "TIFF", "WEBP", "AVIF")
"""Formats (Pillow's names) that can be read so."""


def is_available() -> bool:
    """Whether libvips is installed."""
    try:
        _library()
    except (ImportError, OSError):
        return False
    return True


def reduced(content: bytes, kind: str, factor: int, ground: Ground = GROUND) -> Image.Image:
    """The first frame of a picture, 1 / ``factor`` as large on each side; as it is stored, but AVIF comes upright.

    Args:
        content: the file.
        kind: one of ``FORMATS``.
        factor: 1 and more; each pixel is the mean of factor × factor.
        ground: what shows through where the picture is transparent.

    Returns:
        Mode L, RGB or CMYK, 8 bits (deeper ones are scaled), transparency on the ground; the colour profile, if there
        is one, in ``info``.

    Raises:
        MemoryError: it needs more memory than there is.
        OSError: it is damaged.
        ImportError: libvips is not installed.
    """
    vips = _library()
    try:
        picture = _loader(vips, kind)(content, factor)
        if picture.format not in ("uchar", "ushort"):
            raise OSError(f"its numbers are of the kind {picture.format}, which is only read in smaller pictures")
        if picture.hasalpha():
            full = 257 if picture.format == "ushort" else 1
            below = ground if picture.bands > 2 else (round(sum(ground) / 3),)
            picture = picture.flatten(background=[value * full for value in below])
        if kind != "WEBP" and factor > 1:
            picture = picture.shrink(factor, factor, ceil=True)
        if picture.format == "ushort":
            picture = picture.linear(1 / 257, 0).rint()
        profile = picture.get("icc-profile-data") if picture.get_typeof("icc-profile-data") else None
        space = picture.interpretation
        values: Any = picture.cast("uchar").numpy()
    except vips.Error as error:
        text = " ".join(str(error).split())
        # Without a word on why, writing to memory fails for want of it.
        if "out of memory" in text.lower() or text == "unable to write to memory":
            raise MemoryError(text) from error
        raise OSError(text) from error
    mode = {1: "L", 3: "RGB", 4: "CMYK" if space == "cmyk" else "RGBX"}.get(1 if values.ndim == 2 else values.shape[2])
    if mode in (None, "RGBX"):
        raise OSError(f"it has {values.shape[2]} channels of the kind {space}")
    image = Image.fromarray(np.ascontiguousarray(values.squeeze()), mode=mode if mode == "CMYK" else None)
    if profile is not None:
        image.info["icc_profile"] = bytes(profile)
    return image


def webp_header(content: bytes) -> Image.Image:
    """What the header of a WebP says, as a picture without pixels: Pillow takes eight bytes a pixel to tell it.

    Raises:
        OSError: it is damaged.
    """
    vips = _library()
    try:
        # Asked for a tiny picture, the decoder sets little aside.
        found = vips.Image.webpload_buffer(content, scale=0.01)
    except vips.Error as error:
        raise OSError(" ".join(str(error).split())) from error
    image = Image.Image()
    image._size = webp_size(content)  # noqa: SLF001 - a picture without pixels has no other way
    image.format = "WEBP"
    for key, name in (("exif", "exif-data"), ("icc_profile", "icc-profile-data")):
        if found.get_typeof(name):
            image.info[key] = bytes(found.get(name))
    return image


def _loader(vips: Any, kind: str) -> Callable[[bytes, int], Any]:
    """How libvips opens a format; damage ends the reading, never a grey rest."""
    common = {"access": "sequential", "fail_on": "warning"}
    load = vips.Image
    return {
        "PNG": lambda content, _: load.pngload_buffer(content, **common),
        "TIFF": lambda content, _: load.tiffload_buffer(content, **common),
        "WEBP": lambda content, factor: load.webpload_buffer(content, scale=1 / factor, **common),
        "AVIF": lambda content, _: load.heifload_buffer(content, unlimited=True, **common),
    }[kind]


def _library() -> Any:
    """libvips, one thread of it: the lane runs a worker a core. Nothing is kept between pictures."""
    os.environ.setdefault("VIPS_CONCURRENCY", "1")
    import pyvips

    pyvips.cache_set_max(0)
    return pyvips
