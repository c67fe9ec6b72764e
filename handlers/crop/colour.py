"""Every colour mode that Pillow opens, as 8-bit sRGB on a white ground."""

from __future__ import annotations

import io
from collections.abc import Iterable
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageColor

Ground = tuple[int, int, int]
GROUND: Ground = (255, 255, 255)
"""What shows through where a picture is transparent, where nothing else was asked for."""
DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
"""More than 8 bits a channel, or floats."""
# The colour space in a profile's header → the modes that it can describe.
_PROFILE_MODES = {"RGB": ("RGB",), "GRAY": ("L",), "CMYK": ("CMYK",), "Lab": ("LAB",)}


Span = tuple[float, float]
"""The values that become black and white."""


def to_srgb(image: Image.Image, span: Span | None = None, ground: Ground = GROUND) -> tuple[Image.Image, str | None]:
    """A loaded picture of any mode in mode RGB, sRGB.

    16-bit grey is scaled (v / 257), not clipped; integers and floats of other ranges are stretched to theirs.
    Transparency lies on a ground.

    Args:
        image: it, or a part of it.
        span: of the whole picture, where only a part is given (``span_of``).
        ground: what transparency lies on.

    Returns:
        The picture (the given one, if nothing had to change), and a sentence if its colour profile could not be used.
    """
    profile = image.info.get("icc_profile")
    if image.mode in DEEP_MODES:
        image = _scaled(image, span or span_of([image]))
    if image.mode == "1":
        image = image.convert("L")
    if image.has_transparency_data:
        image = _flattened(image.convert("RGBA"), ground)
    elif image.mode == "P":
        image = image.convert("RGB")
    if image.mode == "LAB" and not profile:
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    if profile and isinstance(profile, bytes):
        return _through_profile(image, profile)
    return _as_rgb(image), None


def _as_rgb(image: Image.Image) -> Image.Image:
    """The picture itself, where nothing has to change: a copy of 200 megapixels is 600 MB."""
    return image if image.mode == "RGB" else image.convert("RGB")


def _flattened(image: Image.Image, ground: Ground) -> Image.Image:
    below = Image.new("RGB", image.size, ground)
    below.paste(image, mask=image.getchannel("A"))
    if profile := image.info.get("icc_profile"):
        below.info["icc_profile"] = profile
    return below


def ground_of(value: object) -> Ground:
    """A colour by name ("white", "#808080") or as three numbers; None is ``GROUND``. Raises ``ValueError``."""
    if value is None:
        return GROUND
    if isinstance(value, str):
        red, green, blue = ImageColor.getrgb(value)[:3]
    else:
        red, green, blue = (int(number) for number in value)  # type: ignore[attr-defined]
    if not all(0 <= number <= 255 for number in (red, green, blue)):
        raise ValueError(f"the ground {value!r} is no colour")
    return (red, green, blue)


def span_of(parts: Iterable[Image.Image]) -> Span:
    """The values that stand for black and white in a picture of a deep mode, which is given in parts.

    Sixteen bits go from 0 to 65535, floats within 0..1 from 0 to 1, what fits in a byte from 0 to 255; others from
    their least to their greatest.
    """
    low, high, mode = np.inf, -np.inf, ""
    for part in parts:
        mode = part.mode
        if mode.startswith("I;16"):
            return (0.0, 65535.0)
        values = _numbers(part)
        low, high = min(low, float(values.min())), max(high, float(values.max()))
    if mode == "I" and low >= 0 and 255 < high <= 65535:
        return (0.0, 65535.0)
    if mode == "F" and low >= 0 and high <= 1:
        return (0.0, 1.0)
    return (0.0, 255.0) if low >= 0 and high <= 255 else (low, high)


def _numbers(image: Image.Image) -> NDArray[np.float32]:
    return np.nan_to_num(np.asarray(image).astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)


def _scaled(image: Image.Image, span: Span) -> Image.Image:
    low, high = span
    scaled = (_numbers(image) - low) * (255.0 / (high - low))
    return Image.fromarray(np.rint(scaled).clip(0, 255).astype(np.uint8))


@cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def _through_profile(image: Image.Image, profile: bytes) -> tuple[Image.Image, str | None]:
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(opened).lower() and image.mode == "RGB":
            return image, None
        space = opened.profile.xcolor_space.strip()
        if image.mode not in _PROFILE_MODES.get(space, ()):
            return _as_rgb(image), (
                f"The colour profile ({space}) does not fit the picture's colours ({image.mode}) and was left aside."
            )
        converted = ImageCms.profileToProfile(image, opened, _srgb(), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        return _as_rgb(image), f"The colour profile could not be used and was left aside: {error}."
    if converted is None:  # only when asked to convert in place
        return _as_rgb(image), None
    return converted, None
