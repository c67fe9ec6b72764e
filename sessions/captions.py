"""Captions as text files: reading them kindly, writing exactly one line, and whose line wins.

Pure: bytes and strings in, strings out. Trainers disagree about files (one reads line 1 and fails on an empty file,
another takes every line for a caption), so fastsd writes exactly one line that is not empty, in UTF-8.
"""

from __future__ import annotations

import codecs
import hashlib
import unicodedata
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

Origin = Literal["edit", "beside", "generated"]


@dataclass(frozen=True)
class Chosen:
    """The line that trains.

    Attributes:
        line: one line, not empty.
        origin: ``edit`` (a person's text in captions/), ``beside`` (a person's text beside the picture), ``generated``.
    """

    line: str
    origin: Origin


def one_line(text: str) -> str:
    """All of a text as one line: every run of white space is one space, control characters are gone. May be empty."""
    visible = "".join(
        " " if character.isspace() else character
        for character in text
        if character.isspace() or unicodedata.category(character) not in ("Cc", "Cs")
    )
    return " ".join(visible.split())


def file_bytes(line: str) -> bytes:
    """What a caption file holds.

    Raises:
        ValueError: nothing is left of the line; a caption file is never empty.
    """
    cleaned = one_line(line)
    if not cleaned:
        raise ValueError("a caption must not be empty")
    return f"{cleaned}\n".encode()


def sha256_of(content: bytes) -> str:
    """How a caption file is told from an edited one: 64 hex digits."""
    return hashlib.sha256(content).hexdigest()


def first_line(content: bytes) -> str | None:
    """The first line of a caption file that is not empty, cleaned; None where there is none.

    Byte order marks, any line ends, UTF-16 with a mark, and Latin-1 where it is no UTF-8 are all read.
    """
    cleaned = (one_line(line) for line in decoded(content).splitlines())
    return next((line for line in cleaned if line), None)


def decoded(content: bytes) -> str:
    """The text of a file that a person wrote with whatever was at hand; no bytes are refused."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16", errors="replace")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def is_ours(content: bytes, ours: Collection[str | None]) -> bool:
    """Whether a caption file still is as fastsd wrote it: its hash is one of ``ours``."""
    return sha256_of(content) in ours


def read_caption(in_captions: bytes | None, beside: bytes | None, ours: Collection[str | None]) -> Chosen | None:
    """The line that trains: a person's edit, else a person's text beside the picture, else what was generated.

    Files without a line that says something count as absent.

    Args:
        in_captions: the content of captions/<stem>.txt, None where it is absent.
        beside: the content of <stem>.txt beside the picture, None where it is absent.
        ours: the hashes of what fastsd wrote to captions/<stem>.txt.
    """
    generated = in_captions is not None and is_ours(in_captions, ours)
    candidates: list[tuple[bytes | None, Origin]] = [(beside, "beside")]
    candidates.insert(1 if generated else 0, (in_captions, "generated" if generated else "edit"))
    for content, origin in candidates:
        line = first_line(content) if content is not None else None
        if line:
            return Chosen(line, origin)
    return None
