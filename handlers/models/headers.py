"""The header of a safetensors file, checked: what tensors it says it has, and whether the file can hold them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

# The format's own limit; a header is a few kilobytes for a small model and under 1 MB for a large one.
LONGEST_HEADER = 100_000_000
BITS: dict[str, int] = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}


class HeaderError(ValueError):
    """The file is no whole model file; the message says where it goes wrong."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor: its dtype as the format spells it, its shape, and where its bytes lie in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def length(self) -> int:
        """How many bytes it takes."""
        return self.end - self.begin


@dataclass(frozen=True)
class Header:
    """A checked header.

    Attributes:
        tensors: by name, in the file's order.
        metadata: the strings under ``__metadata__``.
        data_start: the first byte after the header.
    """

    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    data_start: int


def read_header(path: Path) -> Header:
    """Read and check a file's header.

    Raises:
        HeaderError: the header cannot be read, a tensor does not fit its bytes, tensors overlap or leave
            gaps, or the file is shorter or longer than its tensors.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        return parse_header(file, size)


def parse_header(file: IO[bytes], size: int) -> Header:
    """Like ``read_header``, for an open file of ``size`` bytes."""
    start = file.read(8)
    if len(start) < 8:
        raise HeaderError("it ends before its header")
    length = int.from_bytes(start, "little")
    if length > LONGEST_HEADER or 8 + length > size:
        raise HeaderError(f"its header would be {length:,} bytes long, and the file has {size:,}")
    try:
        table = json.loads(file.read(length), object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"its header is no JSON: {error}") from None
    if not isinstance(table, dict):
        raise HeaderError("its header is no JSON object")
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise HeaderError("its metadata are not all strings")
    tensors = {name: _entry(name, row, 8 + length) for name, row in table.items()}
    _check_extents(tensors, 8 + length, size)
    return Header(tensors, metadata, 8 + length)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name stands in it twice")
    return table


def _entry(name: str, row: Any, data_start: int) -> TensorEntry:
    try:
        dtype, shape, (begin, end) = row["dtype"], tuple(row["shape"]), row["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise HeaderError(f"the entry of {name} is incomplete") from None
    for number in (*shape, begin, end):
        if type(number) is not int or number < 0:
            raise HeaderError(f"the entry of {name} has numbers that are no sizes")
    if dtype not in BITS:
        raise HeaderError(f"{name} has the unknown dtype {dtype}")
    if math.prod(shape) * BITS[dtype] != 8 * (end - begin):
        raise HeaderError(f"{name} is {dtype} {list(shape)} and has {end - begin:,} bytes")
    return TensorEntry(dtype, shape, data_start + begin, data_start + end)


def _check_extents(tensors: Mapping[str, TensorEntry], data_start: int, size: int) -> None:
    position = data_start
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            relation = "overlaps another tensor" if entry.begin < position else "leaves a gap before it"
            raise HeaderError(f"{name} {relation}")
        position = entry.end
    if position != size:
        missing = position - size
        raise HeaderError(
            f"{missing:,} bytes are missing at its end" if missing > 0 else f"{-missing:,} bytes too many"
        )


def dtype_of(tensors: Mapping[str, TensorEntry]) -> str | None:
    """The one dtype of all floating tensors, ``mixed``, or None where there are none."""
    kinds = {entry.dtype for entry in tensors.values() if "F" in entry.dtype}
    return None if not kinds else kinds.pop() if len(kinds) == 1 else "mixed"


def parameters_of(tensors: Mapping[str, TensorEntry]) -> int:
    """How many numbers the tensors hold."""
    return sum(8 * entry.length // BITS[entry.dtype] for entry in tensors.values())
