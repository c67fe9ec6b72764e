"""Pictures for tests: real photographs that scikit-image carries, and files of every odd kind that people drop."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import skimage
from PIL import ExifTags, Image, ImageCms, ImageDraw

PHOTOGRAPHS = Path(skimage.__file__).parent / "data"
"""Only what lies in the package: nothing is fetched."""


def photograph(name: str) -> Path:
    """A real photograph: ``astronaut.png``, ``chelsea.png``, ``coffee.png``, ``rocket.jpg``, ``camera.png`` …"""
    path = PHOTOGRAPHS / name
    assert path.is_file(), f"scikit-image does not carry {name}"
    return path


def scene(size: tuple[int, int], spot: tuple[float, float] = (0.5, 0.5), radius: float = 0.12) -> Image.Image:
    """A red disc on a soft blue ground.

    Args:
        size: (width, height).
        spot: the disc's centre, in 0..1.
        radius: as a share of the shorter side.
    """
    width, height = size
    ramp = np.linspace(150, 190, width, dtype=np.float32)[None, :].repeat(height, 0)
    ground = np.stack([ramp * 0.6, ramp * 0.8, ramp], axis=2).astype(np.uint8)
    image = Image.fromarray(ground)
    x, y, r = spot[0] * width, spot[1] * height, radius * min(size)
    ImageDraw.Draw(image).ellipse((x - r, y - r, x + r, y + r), fill=(210, 30, 25))
    return image


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """A picture as the bytes of a file of this kind (Pillow's format name)."""
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def noisy(size: tuple[int, int], seed: int = 5) -> Image.Image:
    """A disc under noise: its file is long, so that there is much to cut off."""
    grain = np.random.default_rng(seed).integers(-40, 40, (size[1], size[0], 3))
    return Image.fromarray((np.asarray(scene(size)).astype(int) + grain).clip(0, 255).astype(np.uint8))


def truncated_jpeg() -> bytes:
    """A download that broke off in the middle."""
    whole = encoded(noisy((600, 400)), "JPEG", quality=90)
    return whole[: len(whole) // 2]


def zero_padded_jpeg() -> bytes:
    """As truncated, but the rest of the space was already there: zeros."""
    whole = encoded(noisy((600, 400)), "JPEG", quality=90)
    half = len(whole) // 2
    return whole[:half] + bytes(len(whole) - half)


def damaged_png() -> bytes:
    """A PNG whose pixels do not match their checksum."""
    whole = bytearray(encoded(noisy((300, 300)), "PNG"))
    place = len(whole) // 2
    whole[place : place + 64] = bytes(64)
    return bytes(whole)


def deep_grey_png(size: tuple[int, int] = (400, 300)) -> bytes:
    """16 bits of grey, a ramp from 0 to 65535 from left to right."""
    ramp = np.linspace(0, 65535, size[0]).astype(np.uint16)[None, :].repeat(size[1], 0)
    return encoded(Image.fromarray(ramp), "PNG")


def float_tiff(size: tuple[int, int] = (400, 300)) -> bytes:
    """32-bit floats from 0 to 1, with one pixel that is no number."""
    ramp = np.linspace(0, 1, size[0], dtype=np.float32)[None, :].repeat(size[1], 0)
    ramp[0, 0] = np.nan
    return encoded(Image.fromarray(ramp), "TIFF")


def cmyk_jpeg() -> bytes:
    """What printers' programs save."""
    return encoded(scene((500, 400)).convert("CMYK"), "JPEG", quality=95)


def transparent_palette_png() -> bytes:
    """A palette of which one colour is transparent: the left half."""
    image = Image.new("P", (400, 300), 1)
    image.putpalette([0, 0, 0, 200, 20, 20])
    image.paste(0, (0, 0, 200, 300))
    return encoded(image, "PNG", transparency=0)


def half_transparent_png() -> bytes:
    """Black everywhere; opaque on the right, half through in the middle, clear on the left."""
    alpha = np.zeros((300, 300), dtype=np.uint8)
    alpha[:, 100:200] = 128
    alpha[:, 200:] = 255
    image = Image.new("RGBA", (300, 300), (0, 0, 0, 0))
    image.putalpha(Image.fromarray(alpha))
    return encoded(image, "PNG")


def animation(kind: str) -> bytes:
    """Two frames, the first red, the second green: GIF, WEBP or PNG."""
    frames = [Image.new("RGB", (200, 150), colour) for colour in ((220, 20, 20), (20, 220, 20))]
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=100, **options)


def with_orientation(upright: Image.Image, orientation: int, kind: str = "PNG", **options: Any) -> bytes:
    """The same picture as a camera held another way saves it: turned pixels and the EXIF tag that says so."""
    turned = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    exif[ExifTags.Base.Make] = "A camera"
    return encoded(upright.transpose(turned) if turned is not None else upright, kind, exif=exif, **options)


def profiled_png(profile: bytes) -> bytes:
    """A picture with a colour profile that may be broken."""
    return encoded(scene((300, 200)), "PNG", icc_profile=profile)


def lab_profile() -> bytes:
    """A profile that does not describe RGB."""
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


def in_lab(image: Image.Image) -> Image.Image:
    """The same picture in CIELAB."""
    converted = ImageCms.profileToProfile(
        image, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert converted is not None
    return converted


def srgb_profile() -> bytes:
    """sRGB itself."""
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def swapped_profile() -> bytes:
    """sRGB's own profile with the primaries of red and green exchanged: a picture that uses it shows red as green."""
    content = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack_from(">I", content, 128)[0]
    for entry in range(132, 132 + 12 * count, 12):
        tag = bytes(content[entry : entry + 4])
        if tag in (b"rXYZ", b"gXYZ"):
            content[entry : entry + 4] = b"gXYZ" if tag == b"rXYZ" else b"rXYZ"
        if tag == b"desc":
            offset, length = struct.unpack_from(">II", content, entry + 4)
            text = bytes(content[offset : offset + length])
            content[offset : offset + length] = text.replace(b"\0s\0R\0G\0B", b"\0S\0w\0a\0p").replace(b"sRGB", b"Swap")
    return bytes(content)


def bomb_png(width: int, height: int) -> bytes:
    """A small file whose header promises very many pixels, and no pixel that fits the header."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10_000)))
        + chunk(b"IEND", b"")
    )


HTML = b"<!DOCTYPE html><html><head><title>404</title></head><body>Not found</body></html>"
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n"


def fifo(path: Path) -> Path:
    """A pipe under a picture's name: whoever opens it blindly waits for ever."""
    os.mkfifo(path)
    return path
