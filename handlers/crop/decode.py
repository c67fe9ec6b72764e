"""From a file that a person dropped to upright pixels in sRGB, without trusting the file.

Nothing is decoded before the limits are checked, JPEG is decoded at the reduced scale that is enough
(libjpeg's 1/2, 1/4, 1/8), and a damaged file is refused, never half shown.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import ExifTags, Image, UnidentifiedImageError

from handlers.crop.colour import to_srgb
from sessions.refusal import Refusal

PIXEL_LIMIT = 200_000_000
"""Pixels in a picture, where nothing else was asked for."""
LEAST_SIDE = 64
"""Pixels of the shorter side below which there is nothing to learn from."""
_BYTE_LIMIT = 1 << 30
# Raster formats with a decoder of their own. Pillow also knows some that start other programs (EPS) or are no pictures.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "DIB", "GIF", "JPEG2000", "HEIF")
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
# EXIF orientation → what brings it upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class SourceFile:
    """The bytes of a file, read once: what was hashed is what gets decoded.

    Attributes:
        path: where it lies.
        content: all of it.
        sha256: of ``content``, 64 hex digits.
    """

    path: Path
    content: bytes
    sha256: str


@dataclass(frozen=True)
class Decoded:
    """A picture ready to look at.

    Attributes:
        image: mode RGB, sRGB, upright, no metadata; perhaps smaller than the source.
        size: (width, height) of the source in upright pixels.
        warnings: sentences for people about what was lost or is odd.
    """

    image: Image.Image
    size: tuple[int, int]
    warnings: tuple[str, ...]


def read_source(path: Path) -> SourceFile:
    """Read a regular file whole. Links are followed; whether a link may be is its caller's business.

    Raises:
        Refusal: ``not-a-file`` (a folder, a FIFO, a device: never opened), ``empty``, ``too-large``, ``unreadable``.
        FileNotFoundError: it is gone.
        OSError: the disk or the mount failed.
    """
    try:
        _require_regular(path, path.stat())
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except PermissionError as error:
        raise Refusal(
            "unreadable",
            f"{path.name} may not be read by the user that fastsd runs as.",
            "Give that user the right to read it, then save or copy the file again.",
        ) from error
    with os.fdopen(descriptor, "rb") as file:
        # Once more on what was opened: the name may have been given to something else since.
        _require_regular(path, os.fstat(descriptor))
        content = file.read(_BYTE_LIMIT + 1)
    if not content:
        raise Refusal("empty", f"{path.name} is empty (0 bytes).", "Copy the picture here again.")
    if len(content) > _BYTE_LIMIT:
        raise Refusal(
            "too-large", f"{path.name} is larger than 1 GiB.", "Save the picture as JPEG or at a smaller size."
        )
    return SourceFile(path, content, hashlib.sha256(content).hexdigest())


def _require_regular(path: Path, facts: os.stat_result) -> None:
    if not stat.S_ISREG(facts.st_mode):
        kind = "a folder" if stat.S_ISDIR(facts.st_mode) else "a pipe, a socket or a device"
        raise Refusal(
            "not-a-file", f"{path.name} is {kind}, not a file.", "Remove it or give it a name that is no picture's."
        )


class OpenPicture:
    """A picture whose header was read and found acceptable; no pixel is decoded yet."""

    def __init__(self, source: SourceFile, pixel_limit: int = PIXEL_LIMIT) -> None:
        """Read the header.

        Raises:
            Refusal: ``not-a-picture``, ``corrupt``, ``too-large`` (more pixels than ``pixel_limit``), ``too-small``.
        """
        self._source = source
        self._notes: list[str] = []
        try:
            with _decoding(self._notes):
                self._image: Image.Image = Image.open(io.BytesIO(source.content), formats=_readable_formats())
        except UnidentifiedImageError as error:
            raise _no_picture(source) from error
        except MemoryError:
            raise
        except Exception as error:  # decoders answer hostile bytes with exceptions of every kind
            raise _corrupt(source, error) from error
        width, height = self._image.size
        self.shorter_side: int = min(width, height)
        """Pixels of the shorter side of the whole picture."""
        self.longer_side: int = max(width, height)
        """Pixels of the longer side of the whole picture."""
        if width * height > pixel_limit:
            raise Refusal(
                "too-large",
                f"{source.path.name} has {width} × {height} pixels, more than the limit of {pixel_limit:,}.",
                "Make the picture smaller, or raise limits: picture_pixels in fastsd.yaml.",
            )
        if self.shorter_side < LEAST_SIDE:
            raise Refusal(
                "too-small",
                f"{source.path.name} has {width} × {height} pixels; the shorter side must have at least {LEAST_SIDE}.",
                "Use a larger version of the picture.",
            )

    def decode(self, scale: float) -> Decoded:
        """Decode the first frame. Can be called once: the pixels are not kept.

        Args:
            scale: how much of the picture's resolution is needed at least: 0.25 may give a quarter of each side, 1 or
                more gives all. What comes back is never smaller than asked, and up to twice as large and a bit, so that
                whoever resizes it has something to filter.

        Raises:
            Refusal: ``corrupt``: the pixels cannot be decoded whole.
        """
        image, source, notes = self._image, self._source, list(self._notes)
        if _ends_in_zeros(source.content):
            raise _corrupt(source, "its end is missing, only zeros are there")
        stored = image.size
        try:
            with _decoding(notes):
                if scale < 1:
                    # JPEG alone honours this; the result is at least this large.
                    image.draft(None, (_at_least_one(stored[0] * scale), _at_least_one(stored[1] * scale)))
                image.load()
                # After loading: a PNG may tell its orientation behind the pixels.
                orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
                colours, warning = to_srgb(image)
        except MemoryError:
            raise
        except Exception as error:  # as above
            raise _corrupt(source, error) from error
        if warning:
            notes.append(warning)
        colours = _reduced(colours, int(_shorter(colours) / (self.shorter_side * scale) / 2))
        image.close()
        if orientation in _UPRIGHT:
            colours = colours.transpose(_UPRIGHT[orientation])
        swapped = orientation in (5, 6, 7, 8)
        colours.info = {}
        return Decoded(colours, (stored[1], stored[0]) if swapped else stored, tuple(dict.fromkeys(notes)))


def _reduced(image: Image.Image, factor: int) -> Image.Image:
    """A picture of its own, without metadata, 1 / factor as large on each side."""
    return image.reduce(factor) if factor > 1 else image.copy()


def _shorter(image: Image.Image) -> int:
    return min(image.size)


def _at_least_one(length: float) -> int:
    return max(1, int(length))


def _readable_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


@contextmanager
def _decoding(notes: list[str]) -> Iterator[None]:
    """Pillow's own bomb limit gives way to ours, and its warnings become notes."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before
    for warning in caught:
        if not issubclass(warning.category, UserWarning):  # about our code, not about the file
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
            continue
        text = " ".join(str(warning.message).split())
        notes.append(f"The file has a defect that was worked around: {text}")


def _no_picture(source: SourceFile) -> Refusal:
    if source.content[4:8] == b"ftyp" and source.content[8:12] in _HEIF_BRANDS:
        return Refusal(
            "not-a-picture",
            f"{source.path.name} is a HEIC picture, which this installation cannot read.",
            "Save it as JPEG, or set the phone's camera to its most compatible format.",
        )
    if _is_signed(source.content):
        return _corrupt(source, "its header cannot be read")
    return Refusal(
        "not-a-picture",
        f"{source.path.name} is not a picture that can be read{_guess(source.content)}.",
        "Use JPEG, PNG, WebP, AVIF, TIFF, BMP or GIF.",
    )


def _guess(content: bytes) -> str:
    head = content[:512].lstrip().lower()
    if head.startswith((b"<!doctype html", b"<html", b"<head")):
        return ": it is a web page, probably saved in place of the picture"
    if head.startswith((b"<svg", b"<?xml")):
        return ": it is a drawing or other XML"
    if content.startswith(b"%PDF"):
        return ": it is a PDF document"
    if not content[:4096].strip(b"\0"):
        return ": it holds only zeros, as after a copy that broke off"
    return ""


def _is_signed(content: bytes) -> bool:
    return (
        content.startswith(_SIGNATURES)
        or (content.startswith(b"RIFF") and content[8:12] == b"WEBP")
        or (content[4:8] == b"ftyp" and content[8:12] in (b"avif", b"avis"))
    )


def _ends_in_zeros(content: bytes) -> bool:
    """Whether a JPEG's pixels run out into zeros, as where space was set aside and the copy broke off.

    Zeros are valid pixel data to a JPEG decoder: it would paint the rest grey and not complain. A whole picture has an
    end mark (FF D9) behind the start of its pixels, and pixel data cannot hold these bytes by chance.
    """
    if not content.startswith(b"\xff\xd8") or content[-2:] != b"\0\0":
        return False
    place = 2
    while content[place : place + 1] == b"\xff" and content[place + 1 : place + 2] != b"\xda":
        place += 2 + int.from_bytes(content[place + 2 : place + 4], "big")
    return content.find(b"\xff\xd9", place) < 0


def _corrupt(source: SourceFile, error: Exception | str) -> Refusal:
    reason = " ".join(str(error).split()) or type(error).__name__
    return Refusal(
        "corrupt",
        f"{source.path.name} is damaged or incomplete: {reason.rstrip('.')}.",
        "Copy the picture here again from where it is whole.",
    )
