"""Files that no library writes, byte by byte: 16-bit and interlaced PNG, bombs, headers that lie."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from tests.corpus.pattern import pattern
from tests.pictures import encoded

_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""(first column, first row, columns apart, rows apart) of each pass."""
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(
    values: NDArray[np.uint8] | NDArray[np.uint16], *, interlaced: bool = False, behind: Iterable[bytes] = ()
) -> bytes:
    """A PNG of 8 or 16 bits.

    Args:
        values: [height, width, 1 to 4].
        interlaced: by Adam7.
        behind: chunks between the pixels and the end.
    """
    height, width, channels = values.shape
    depth = 16 if values.dtype == np.uint16 else 8
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, int(interlaced))
    passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    rows = b"".join(
        b"\0" + row.astype(">u2" if depth == 16 else "u1").tobytes()
        for x, y, across, down in passes
        for row in values[y::down, x::across]
    )
    return (
        PNG_SIGNATURE
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + b"".join(behind)
        + chunk(b"IEND", b"")
    )


def late_orientation() -> bytes:
    """A PNG that tells behind its pixels that it lies on its side."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    turned = np.asarray(pattern().transpose(Image.Transpose.ROTATE_90))
    return png(turned, behind=[chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))])


def text_bomb() -> bytes:
    """A PNG with a text that is 100 MB long when it is unpacked."""
    packed = zlib.compress(bytes(100_000_000), 9)
    return png(np.asarray(pattern()), behind=[chunk(b"zTXt", b"Comment\0\0" + packed)])


def flat_png(width: int, height: int, colour: tuple[int, int, int]) -> bytes:
    """A true PNG of one colour: few bytes, very many pixels."""
    block = (b"\0" + bytes(colour) * width) * 16
    assert height % 16 == 0
    packer = zlib.compressobj(9, wbits=-15)
    part = packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)
    check = 1
    for _ in range(height // 16):
        check = zlib.adler32(block, check)
    pixels = b"\x78\xda" + part * (height // 16) + b"\3\0" + struct.pack(">I", check)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return PNG_SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def top_down_bmp() -> bytes:
    """A BMP whose height is negative: its rows go from the top."""
    content = bytearray(encoded(pattern(), "BMP"))
    start, height = struct.unpack_from("<I", content, 10)[0], struct.unpack_from("<i", content, 22)[0]
    line = (len(content) - start) // height
    rows = [content[start + line * y : start + line * (y + 1)] for y in range(height)]
    struct.pack_into("<i", content, 22, -height)
    return bytes(content[:start]) + b"".join(bytes(row) for row in reversed(rows))


def lying_bmp(width: int, height: int) -> bytes:
    """A BMP whose header promises many pixels that are not there."""
    content = bytearray(encoded(pattern(), "BMP"))
    struct.pack_into("<ii", content, 18, width, height)
    return bytes(content)


def lying_jpeg(width: int, height: int) -> bytes:
    """A JPEG whose frame header says another size than was encoded."""
    content = bytearray(encoded(pattern(), "JPEG", quality=90))
    place = content.index(b"\xff\xc0")
    struct.pack_into(">HH", content, place + 5, height, width)
    return bytes(content)


def lying_gif(width: int, height: int) -> bytes:
    """A GIF whose frame is larger than its screen."""
    content = bytearray(encoded(pattern().quantize(16), "GIF"))
    place = content.rindex(b"\x2c\0\0\0\0")
    struct.pack_into("<HH", content, place + 5, width, height)
    return bytes(content)


def lying_tiff(width: int, height: int) -> bytes:
    """An uncompressed TIFF whose tags promise very many pixels."""
    content = bytearray(encoded(pattern(), "TIFF"))
    start = struct.unpack_from("<I", content, 4)[0]
    for entry in range(struct.unpack_from("<H", content, start)[0]):
        place = start + 2 + 12 * entry
        tag = struct.unpack_from("<H", content, place)[0]
        if tag in (256, 257, 278):  # width, height, rows a strip
            struct.pack_into("<HHII", content, place, tag, 4, 1, width if tag == 256 else height)
    return bytes(content)


def scans_bomb(scans: int) -> bytes:
    """A progressive JPEG with one scan repeated very often: small, and slow to decode."""
    content = encoded(pattern((1600, 1200)), "JPEG", quality=50, progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * scans + content[-2:]


def late_exif_jpeg() -> bytes:
    """A whole JPEG with kilobytes of another program's data behind its end."""
    return encoded(pattern(), "JPEG", quality=95) + b"garbage" * 1000
