"""Captions as files: exactly one line written, anything read, and whose line wins."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sessions import captions


@given(st.text())
def test_what_is_written_is_one_line_that_reads_back(text: str) -> None:
    line = captions.one_line(text)
    if not line:
        with pytest.raises(ValueError, match="empty"):
            captions.file_bytes(text)
        return
    content = captions.file_bytes(text)
    assert content.decode("utf-8").splitlines() == [line]
    assert content.endswith(b"\n")
    assert captions.first_line(content) == line
    assert captions.one_line(line) == line


@given(st.binary())
def test_no_bytes_stop_the_reading(content: bytes) -> None:
    line = captions.first_line(content)
    assert line is None or (line == captions.one_line(line) and line)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"a cat", "a cat"),
        (b"\xef\xbb\xbfa cat\r\n", "a cat"),
        (b"\r\n  \r\n\ta  cat \r\nsecond line\r\n", "a cat"),
        (b"a cat\rsecond", "a cat"),
        ("a café".encode("latin-1"), "a café"),
        ("a café".encode(), "a café"),
        ("a café\n".encode("utf-16"), "a café"),
        ("\ufeffa café\n".encode("utf-16-be"), "a café"),
        (b"a\0 cat", "a cat"),
        (b"", None),
        (b"\xef\xbb\xbf\r\n \t\n", None),
    ],
)
def test_reading_is_kind(content: bytes, line: str | None) -> None:
    assert captions.first_line(content) == line


OURS = captions.file_bytes("a generated line")
HASH = captions.sha256_of(OURS)
EDIT = b"a better line\n"
BESIDE = b"a line beside the picture\n"


@pytest.mark.parametrize(
    ("in_captions", "beside", "ours", "line", "origin"),
    [
        (OURS, None, {HASH}, "a generated line", "generated"),
        (OURS, BESIDE, {HASH}, "a line beside the picture", "beside"),
        (EDIT, None, {HASH}, "a better line", "edit"),
        (EDIT, BESIDE, {HASH}, "a better line", "edit"),
        (EDIT, BESIDE, set(), "a better line", "edit"),
        (None, BESIDE, {None}, "a line beside the picture", "beside"),
        (b"\n", BESIDE, {HASH}, "a line beside the picture", "beside"),
        (OURS, b" \r\n", {None, HASH}, "a generated line", "generated"),
        # One changed byte makes it a person's.
        (OURS + b"\n", BESIDE, {HASH}, "a generated line", "edit"),
    ],
)
def test_whose_line_wins(
    in_captions: bytes | None, beside: bytes | None, ours: set[str | None], line: str, origin: str
) -> None:
    assert captions.read_caption(in_captions, beside, ours) == captions.Chosen(line, origin)  # type: ignore[arg-type]


@pytest.mark.parametrize(("in_captions", "beside"), [(None, None), (b"", None), (b"\n", b"\xef\xbb\xbf")])
def test_no_line_at_all(in_captions: bytes | None, beside: bytes | None) -> None:
    assert captions.read_caption(in_captions, beside, {HASH}) is None
