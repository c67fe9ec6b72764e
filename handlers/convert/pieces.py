"""The bytes of a planned tensor, from wherever its pieces lie: copied by the kernel, cast, or turned."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Self

from handlers.convert.header import read_bytes
from handlers.convert.plan import Entry, Piece
from handlers.models.headers import BITS

_BLOCK = 1 << 20


class Sources:
    """Source files, each opened once. A context manager."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._opened: dict[Path, IO[bytes]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def descriptor(self, path: Path) -> int:
        """The descriptor of a file.

        Raises:
            OSError: it cannot be opened.
        """
        if path not in self._opened:
            self._opened[path] = self._stack.enter_context(path.open("rb", buffering=0))
        return self._opened[path].fileno()

    def read(self, entry: Entry) -> Iterator[bytes]:
        """A whole tensor as it is to be written, in blocks.

        Raises:
            OSError: a source cannot be read or ended early.
            ValueError: a value does not fit into the type asked for.
        """
        if entry.made:
            yield entry.made(self, entry)
            return
        for piece in entry.pieces:
            descriptor = self.descriptor(piece.file)
            step = piece.length if piece.turned else _BLOCK
            for begin in range(0, piece.length, step or 1):
                raw = exactly(descriptor, piece.begin + begin, min(step, piece.length - begin))
                yield converted(raw, piece, entry)

    def read_range(self, entry: Entry, first: int, count: int) -> bytes:
        """Values ``first`` to ``first + count`` of a tensor whose pieces lie as they are written (none is turned)."""
        parts = []
        for piece in entry.pieces:
            size = BITS[piece.dtype] // 8
            values = piece.length // size
            begin, end = max(0, first), min(values, first + count)
            if begin < end:
                raw = exactly(self.descriptor(piece.file), piece.begin + begin * size, (end - begin) * size)
                parts.append(converted(raw, piece, entry))
            first -= values
        return b"".join(parts)


def exactly(descriptor: int, begin: int, length: int) -> bytes:
    """Read a range.

    Raises:
        OSError: the file ends before it.
    """
    raw = read_bytes(descriptor, begin, length)
    if len(raw) != length:
        raise OSError(f"the source ended {length - len(raw)} bytes early")
    return raw


def converted(raw: bytes, piece: Piece, entry: Entry) -> bytes:
    """Bytes of a piece in the type, and the order, of its entry."""
    if piece.turned:
        import numpy as np  # only where a tensor changes: copying needs neither its time nor its memory

        width = BITS[piece.dtype] // 8
        raw = np.frombuffer(raw, f"<u{width}").reshape(piece.turned).T.tobytes()
    if piece.dtype == entry.dtype:
        return raw
    from handlers.convert.cast import cast

    try:
        return cast(raw, piece.dtype, entry.dtype)
    except ValueError as error:
        raise ValueError(f"{entry.name}: {error}") from None


def is_copied(entry: Entry) -> bool:
    """Whether a tensor's bytes are those of its source."""
    return not entry.made and all(piece.dtype == entry.dtype and piece.turned is None for piece in entry.pieces)


def copy_range(source: int, out: IO[bytes], begin: int, length: int) -> None:
    """Copy bytes inside the kernel; through memory where file systems or kernels do not offer that.

    Raises:
        OSError: the source ended early, or the disk is full.
    """
    end = begin + length
    while begin < end:
        try:
            copied = os.copy_file_range(source, out.fileno(), min(64 * _BLOCK, end - begin), begin)
        except (AttributeError, OSError):
            break
        if copied == 0:
            break
        begin += copied
    while begin < end:
        block = exactly(source, begin, min(_BLOCK, end - begin))
        write_all(out, block)
        begin += len(block)


def write_all(out: IO[bytes], data: bytes) -> None:
    """Write all of it to an unbuffered file."""
    view = memoryview(data)
    while view:
        view = view[out.write(view) :]
