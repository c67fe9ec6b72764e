"""The header of a ``.safetensors`` file: read with suspicion, written in order.

Layout: eight bytes with the header's length (little endian), the header (JSON: name → dtype, shape, data_offsets; and
``__metadata__``, strings), then the tensors' bytes without holes. Nothing here imports torch or numpy.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TypeGuard

from sessions.refusal import Refusal

SIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
}
_LONGEST = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file.

    Attributes:
        dtype: the format's name of it: F32, F16, BF16 …
        shape: its sides.
        begin: absolute offset of its first byte in the file.
        length: how many bytes it takes.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    length: int


@dataclass(frozen=True)
class Header:
    """What a file says of itself: its tensors by name, and its metadata."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """Read and check a header: lengths, types, no overlap, no hole, nothing behind the end.

    Raises:
        Refusal: code ``corrupt``: the file is no whole ``.safetensors``.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_LONGEST, size - 8):
            raise _corrupt(path, "its header is cut off")
        raw = file.read(length)
    try:
        value = json.loads(raw, object_pairs_hook=_no_doubles)
    except (ValueError, RecursionError):
        raise _corrupt(path, "its header cannot be read") from None
    if not isinstance(value, dict):
        raise _corrupt(path, "its header is no table")
    metadata = value.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise _corrupt(path, "its metadata is no text")
    tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in value.items()}
    _check_layout(path, tensors, 8 + length, size)
    return Header(tensors, metadata)


def _no_doubles(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError
    return value


def _tensor(path: Path, name: str, entry: object, data: int) -> Tensor:
    if not isinstance(entry, dict):
        raise _corrupt(path, f"its entry {name!r} is damaged")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not (isinstance(dtype, str) and dtype in SIZES and _naturals(shape) and _naturals(offsets)) or len(offsets) != 2:
        raise _corrupt(path, f"its entry {name!r} is damaged")
    begin, end = offsets
    if end - begin != prod(shape) * SIZES[dtype]:
        raise _corrupt(path, f"the size of {name!r} does not fit its shape")
    return Tensor(dtype, tuple(shape), data + begin, end - begin)


def _naturals(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def _check_layout(path: Path, tensors: Mapping[str, Tensor], data: int, size: int) -> None:
    position = data
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].length)):
        if tensor.begin != position:
            raise _corrupt(path, f"{name!r} overlaps another tensor, or there is a hole before it")
        position += tensor.length
    if position != size:
        lacking = position - size
        raise _corrupt(path, f"{lacking} bytes are missing" if lacking > 0 else f"{-lacking} bytes too many")


def _corrupt(path: Path, why: str) -> Refusal:
    return Refusal(
        "corrupt", f"{path.name} is no whole .safetensors file: {why}.", "Copy or download it again, or train again."
    )


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
        end = position + prod(shape) * SIZES[dtype]
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
