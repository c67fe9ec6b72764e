"""The header of a ``.safetensors`` file: read as ``handlers.models.headers`` reads it, and written in order.

Layout: eight bytes with the header's length (little endian), the header (JSON: name → dtype, shape, data_offsets; and
``__metadata__``, strings), then the tensors' bytes without holes. Nothing here imports torch or numpy.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

from handlers.models import headers
from handlers.models.headers import BITS, Header, HeaderError, TensorEntry
from sessions.refusal import Refusal

__all__ = ["Header", "TensorEntry", "bytes_of", "read_bytes", "read_header", "write_header"]


def read_header(path: Path) -> Header:
    """Read and check a header: lengths, types, no overlap, no hole, nothing behind the end.

    Raises:
        Refusal: code ``corrupt``: the file is no whole ``.safetensors``.
        OSError: it cannot be read.
    """
    try:
        return headers.read_header(path)
    except HeaderError as error:
        raise Refusal(
            "corrupt",
            f"{path.name} is no whole .safetensors file: {error}.",
            "Copy or download it again, or train again.",
        ) from None


def bytes_of(dtype: str, shape: Sequence[int]) -> int:
    """How many bytes a tensor takes."""
    return prod(shape) * BITS[dtype] // 8


def write_header(tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a file whose tensors follow in this order.

    Args:
        tensors: (name, dtype, shape) in the order of their bytes.
        metadata: strings for ``__metadata__``.

    Returns:
        Length and header, padded with spaces so that the data starts at a multiple of 8.
    """
    table: dict[str, object] = {"__metadata__": dict(metadata)}
    position = 0
    for name, dtype, shape in tensors:
        end = position + bytes_of(dtype, shape)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode("utf-8", errors="replace")
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def read_bytes(descriptor: int, begin: int, length: int) -> bytes:
    """Read ``length`` bytes at ``begin``; fewer only at the end of the file."""
    parts = []
    while length > 0 and (part := os.pread(descriptor, length, begin)):
        parts.append(part)
        begin += len(part)
        length -= len(part)
    return b"".join(parts)
