"""The error file beside a file: what happened, what to do. It goes when the file is mended."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from sessions.files import write_text
from sessions.layout import error_name
from sessions.refusal import Refusal


def error_path(file: Path) -> Path:
    """Where the error file of ``file`` lies."""
    return file.with_name(error_name(file.name))


def error_text(name: str, refusal: Refusal) -> str:
    """The text of an error file."""
    place = f" (line {refusal.line})" if refusal.line else ""
    return (
        f"fastsd could not use {name}{place}.\n\n"
        f"What happened: {refusal.what}\n"
        f"What to do:    {refusal.advice}\n\n"
        "This note goes away by itself once the file is mended. Delete it to have the file tried again.\n"
    )


def write_error(file: Path, refusal: Refusal) -> None:
    """Say beside ``file`` what is wrong with it; nothing is written where the same already stands.

    Raises:
        OSError: the folder cannot be written.
    """
    path = error_path(file)
    text = error_text(file.name, refusal)
    with suppress(OSError, UnicodeDecodeError):
        if path.read_text(encoding="utf-8", errors="surrogateescape") == text:
            return
    write_text(path, text)


def remove_error(file: Path) -> bool:
    """Take the error file of ``file`` away. Returns whether there was one."""
    try:
        error_path(file).unlink()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
