"""Every colour mode that Pillow opens, as 8-bit sRGB on a white ground."""

from __future__ import annotations

import io
from functools import cache

import numpy as np
from PIL import Image, ImageCms

GROUND = (255, 255, 255)
"""What shows through where a picture is transparent."""
_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
# The colour space in a profile's header → the modes that it can describe.
_PROFILE_MODES = {"RGB": ("RGB",), "GRAY": ("L",), "CMYK": ("CMYK",), "Lab": ("LAB",)}


def to_srgb(image: Image.Image) -> tuple[Image.Image, str | None]:
    """A loaded picture of any mode in mode RGB, sRGB.

    16-bit grey is scaled (v / 257), not clipped; integers and floats of other ranges are stretched to theirs.
    Transparency lies on ``GROUND``.

    Returns:
        The picture (the given one, if nothing had to change), and a sentence if its colour profile could not be used.
    """
    profile = image.info.get("icc_profile")
    if image.mode in _DEEP_MODES:
        image = _scaled(image)
    if image.mode == "1":
        image = image.convert("L")
    if image.has_transparency_data:
        image = _flattened(image.convert("RGBA"))
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


def _flattened(image: Image.Image) -> Image.Image:
    ground = Image.new("RGB", image.size, GROUND)
    ground.paste(image, mask=image.getchannel("A"))
    return ground


def _scaled(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float32)
    values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if image.mode.startswith("I;16") or (image.mode == "I" and low >= 0 and 255 < high <= 65535):
        low, high = 0.0, 65535.0
    elif image.mode == "F" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    elif low >= 0 and high <= 255:
        low, high = 0.0, 255.0
    scaled = (values - low) * (255.0 / (high - low))
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
