"""What a file is that no decoder took: a refusal that names it, from its first bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sessions.refusal import Refusal

_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ", b"BM")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_AVIF_BRANDS = (b"avif", b"avis")


def no_picture(path: Path, content: bytes, *, reads_heif: bool) -> Refusal:
    """Why a file cannot be opened.

    Args:
        path: it, for its name.
        content: its bytes.
        reads_heif: whether this installation has a decoder for HEIC.
    """
    if _brand(content) in _HEIF_BRANDS:
        if reads_heif:
            return corrupt(path, "its header cannot be read")
        return Refusal(
            "not-a-picture",
            f"{path.name} is a HEIC picture, which this installation cannot read.",
            "Install the package pillow-heif, or save the picture as JPEG.",
        )
    if _is_signed(content):
        return corrupt(path, "its header cannot be read")
    return Refusal(
        "not-a-picture",
        f"{path.name} is not a picture that can be read{_guess(content)}.",
        "Use JPEG, PNG, WebP, AVIF, HEIC, TIFF, BMP or GIF.",
    )


def corrupt(path: Path, error: Exception | str) -> Refusal:
    """A picture whose bytes are not what they should be."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return Refusal(
        "corrupt",
        f"{path.name} is damaged or incomplete: {reason.rstrip('.')}.",
        "Copy the picture here again from where it is whole.",
    )


def _brand(content: bytes) -> bytes:
    return content[8:12] if content[4:8] == b"ftyp" else b""


def _guess(content: bytes) -> str:
    head = content[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith((b"<!doctype html", b"<html", b"<head")):
        return ": it is a web page, probably saved in place of the picture"
    if head.startswith((b"<svg", b"<?xml")):
        return ": it is a drawing or other XML"
    if content.startswith(b"%PDF"):
        return ": it is a PDF document"
    if content.startswith((b"%!PS", b"8BPS")):
        return ": it is a document of a drawing program"
    if content.startswith((b"PK\3\4", b"Rar!", b"7z\xbc\xaf", b"\x1f\x8b")):
        return ": it is an archive; unpack it"
    if _brand(content) or content.startswith(b"\x1aE\xdf\xa3"):
        return ": it is a film"
    if not content[:4096].strip(b"\0"):
        return ": it holds only zeros, as after a copy that broke off"
    return ""


def _is_signed(content: bytes) -> bool:
    return (
        content.startswith(_SIGNATURES)
        or (content.startswith(b"RIFF") and content[8:12] == b"WEBP")
        or _brand(content) in _AVIF_BRANDS
    )


def ends_in_zeros(content: bytes) -> bool:
    """Whether a JPEG's pixels run out into zeros, as where space was set aside and the copy broke off.

    Zeros are valid pixel data to a JPEG decoder: it would paint the rest grey and not complain. A whole picture has an
    end mark (FF D9) behind the start of its pixels, and pixel data cannot hold these bytes by chance.
    """
    if not content.startswith(b"\xff\xd8") or content[-2:] != b"\0\0":
        return False
    *_, (_, place) = jpeg_markers(content)
    return content.find(b"\xff\xd9", place) < 0


def jpeg_markers(content: bytes) -> Iterator[tuple[int, int]]:
    """(marker's second byte, its place) from the start of a JPEG to the start of its pixels (DA), or where it ends."""
    place = 2
    while content[place : place + 1] == b"\xff" and place + 2 <= len(content):
        yield content[place + 1], place
        if content[place + 1] == 0xDA:
            return
        place += 2 + int.from_bytes(content[place + 2 : place + 4], "big")
    yield 0, place


def holds_too_little(content: bytes, blocks: float) -> bool:
    """Whether a JPEG promises more blocks of 8 × 8 than its bytes can hold.

    The decoder would paint what is missing grey. By Huffman's code a block takes two bits at least (one code for its
    mean, one for its end), in a progressive picture one; other codes have no such bound.
    """
    frame = next((marker for marker, _ in jpeg_markers(content) if marker in range(0xC0, 0xC4)), None)
    bits = {0xC0: 2, 0xC1: 2, 0xC2: 1}.get(frame or 0, 0)
    return len(content) * 8 < blocks * bits


def webp_size(content: bytes) -> tuple[int, int]:
    """(width, height) that the header of a WebP promises; zeros where it is none."""
    if not content.startswith(b"RIFF") or content[8:12] != b"WEBP":
        return (0, 0)
    numbers = content[20:30].ljust(10, b"\0")
    match content[12:16]:
        case b"VP8X":
            width, height = (int.from_bytes(numbers[at : at + 3], "little") + 1 for at in (4, 7))
        case b"VP8L":
            bits = int.from_bytes(numbers[1:5], "little")
            width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case b"VP8 ":
            width, height = (int.from_bytes(numbers[at : at + 2], "little") & 0x3FFF for at in (6, 8))
        case _:
            return (0, 0)
    return (width, height)
