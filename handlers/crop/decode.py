"""From a file that a person dropped to upright pixels in sRGB, without trusting the file.

Nothing is decoded before the limits are checked, JPEG is decoded at the reduced scale that is enough
(libjpeg's 1/2, 1/4, 1/8), and a damaged file is refused, never half shown.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import ExifTags, Image, UnidentifiedImageError

from handlers.crop import stream
from handlers.crop.colour import GROUND, Ground, to_srgb
from handlers.crop.limits import DECODE_BYTES
from handlers.crop.rows import Rows, reduced_srgb
from handlers.crop.sniff import corrupt, ends_in_zeros, holds_too_little, no_picture, webp_size
from sessions.refusal import Refusal

PIXEL_LIMIT = 200_000_000
"""Pixels in a picture, where nothing else was asked for."""
LEAST_SIDE = 64
"""Pixels of the shorter side below which there is nothing to learn from."""
_BYTE_LIMIT = 1 << 30
# Raster formats with a decoder of their own. Pillow also knows some that start other programs (EPS) or are no pictures.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "DIB", "GIF", "JPEG2000", "HEIF")
_JPEG = ("JPEG", "MPO")
_LARGE = 16_000_000
"""Pixels above which a picture is not held whole at four bytes a pixel, where its format allows."""
_TAIL_BYTES = 1 << 20
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
    except OSError as error:
        if error.errno == errno.ELOOP or (isinstance(error, FileNotFoundError) and path.is_symlink()):
            raise Refusal(
                "not-a-file",
                f"{path.name} is a link that leads to no file.",
                "Put the picture itself here.",
            ) from error
        if not isinstance(error, PermissionError):
            raise
        raise Refusal(
            "unreadable",
            f"{path.name} may not be read by the user that fastsd runs as.",
            "Give that user the right to read it, then save or copy the file again.",
        ) from error
    with os.fdopen(descriptor, "rb") as file:
        # Once more on what was opened: the name may have been given to something else since.
        facts = os.fstat(descriptor)
        _require_regular(path, facts)
        # No more than its size and a byte: where more is asked for, memory for all of it is set aside.
        content = file.read(min(facts.st_size, _BYTE_LIMIT) + 1)
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
        self._comes_upright = False
        try:
            with _decoding(self._notes):
                self._image = _opened(source.content)
        except UnidentifiedImageError as error:
            raise no_picture(source.path, source.content, reads_heif=_reads_heif()) from error
        except MemoryError:
            raise
        except Exception as error:  # decoders answer hostile bytes with exceptions of every kind
            raise corrupt(source.path, error) from error
        width, height = self._image.size
        self.size: tuple[int, int] = (width, height)
        """(width, height) as it is stored, perhaps not upright."""
        self.shorter_side: int = min(width, height)
        """Pixels of the shorter side of the whole picture."""
        self.longer_side: int = max(width, height)
        """Pixels of the longer side of the whole picture."""
        self.takes_much_memory: bool = width * height > _LARGE and self._image.format not in _JPEG
        """Whether many pixels must be decoded, however few of them are asked for."""
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

    def decode(self, scale: float, ground: Ground = GROUND) -> Decoded:
        """Decode the first frame. Can be called once: the pixels are not kept.

        Args:
            scale: how much of the picture's resolution is needed at least: 0.25 may give a quarter of each side, 1 or
                more gives all. What comes back is never smaller than asked, and up to twice as large and a bit, so that
                whoever resizes it has something to filter.
            ground: what shows through where the picture is transparent.

        Raises:
            Refusal: ``corrupt``: the pixels cannot be decoded whole.
            MemoryError: they need more memory than there is, or than one picture may take (``limits.DECODE_BYTES``).
        """
        source, notes, stored = self._source, list(self._notes), self._image.size
        if ends_in_zeros(source.content):
            raise corrupt(source.path, "its end is missing, only zeros are there")
        self._check_jpeg()
        try:
            with _decoding(notes):
                colours, warning = self._colours(scale, ground)
                # After loading: a PNG may tell its orientation behind the pixels.
                orientation = self._image.getexif().get(ExifTags.Base.Orientation, 1)
        except MemoryError:
            raise
        except Exception as error:  # as above
            if "memory" in str(error).lower():
                raise MemoryError(str(error)) from error
            raise corrupt(source.path, error) from error
        if warning:
            notes.append(warning)
        self._image.close()
        if orientation in _UPRIGHT and not self._comes_upright:
            colours = colours.transpose(_UPRIGHT[orientation])
        # Pillow tells the size of a TIFF as it is upright.
        swapped = orientation in (5, 6, 7, 8) and self._image.format != "TIFF"
        colours.info = {}
        return Decoded(colours, (stored[1], stored[0]) if swapped else stored, tuple(dict.fromkeys(notes)))

    def _colours(self, scale: float, ground: Ground) -> tuple[Image.Image, str | None]:
        """The pixels as they are stored, in sRGB and reduced, and a sentence about a profile that does not fit."""
        image, wanted = self._image, self.shorter_side * scale
        factor = max(1, int(self.shorter_side / wanted / 2))
        if scale < 1 and image.format in _JPEG:
            # The result is at least this large.
            image.draft(None, (max(1, int(image.width * scale)), max(1, int(image.height * scale))))
        elif self.takes_much_memory and image.format in stream.FORMATS and stream.is_available():
            if image.format == "PNG":
                self._note_late_orientation()
            self._comes_upright = image.format == "AVIF"
            return to_srgb(stream.reduced(self._source.content, image.format, factor, ground))
        elif self.takes_much_memory and image.format == "HEIF":
            return reduced_srgb(Rows.of_heif(self._source.content), factor, ground)
        promised = image.size
        image.load()
        if image.size != promised:
            raise ValueError(f"its header promises {promised[0]} × {promised[1]} pixels, and it has others")
        return reduced_srgb(Rows.of(image), max(1, int(min(image.size) / wanted / 2)), ground)

    def _note_late_orientation(self) -> None:
        """Nothing of Pillow's reads on behind the pixels of a PNG that it does not decode: take its EXIF from there."""
        content = self._source.content
        place = content.rfind(b"eXIf", max(0, len(content) - _TAIL_BYTES))
        exif = b""
        if place >= 4:
            exif = content[place + 4 : place + 4 + int.from_bytes(content[place - 4 : place], "big")]
        self._image.info.setdefault("exif", exif)  # without it, Pillow would decode all to look for it

    def _check_jpeg(self) -> None:
        """See that the bytes can hold what the header promises, and the memory what a progressive JPEG needs.

        The latter is whole in memory before its first pixel, at any scale: two bytes a coefficient.
        """
        image = self._image
        if image.format not in _JPEG:
            return
        # Samples of each channel beside those of the finest one.
        layers = [layer[1] * layer[2] for layer in getattr(image, "layer", ())] or [1]
        coefficients = image.width * image.height * sum(layers) / max(layers)
        if holds_too_little(self._source.content, coefficients / 64):
            raise corrupt(self._source.path, "it is much too short for the size that it promises")
        if image.info.get("progressive") and coefficients * 2 > DECODE_BYTES:
            raise MemoryError("a progressive JPEG of this size cannot be read in parts")


def _opened(content: bytes) -> Image.Image:
    width, height = webp_size(content)
    if width * height > _LARGE and stream.is_available():
        return stream.webp_header(content)
    return Image.open(io.BytesIO(content), formats=_readable_formats())


def _readable_formats() -> tuple[str, ...]:
    Image.init()
    _reads_heif()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


@cache
def _reads_heif() -> bool:
    """Whether HEIC can be read; pillow-heif is optional. Tells Pillow of it."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener(thumbnails=False)
    return True


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
