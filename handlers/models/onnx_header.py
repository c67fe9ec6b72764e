"""What an ONNX file says it takes and gives, read from the file's structure alone: nothing is loaded or run.

ONNX is a protocol buffer: fields of a number, a kind and a value, nested. Weights are skipped, so that a file of a
gigabyte takes milliseconds. The numbers of the fields are those of onnx.proto3.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from handlers.models.headers import HeaderError

# ModelProto, GraphProto, ValueInfoProto, TypeProto, TypeProto.Tensor, TensorShapeProto, Dimension, TensorProto.
_VERSION, _GRAPH = 1, 7
_INITIALIZER, _INPUT, _OUTPUT = 5, 11, 12
_NAME, _TYPE = 1, 2
_TENSOR_TYPE = 1
_ELEMENT, _SHAPE = 1, 2
_DIMENSION = 1
_SIZE = 1
_TENSOR_NAME, _DATA_LOCATION = 8, 14
_FLOAT = 1
_MOST_FIELDS = 300_000
_LONGEST_NAME = 10_000
_LONGEST_VARINT = 10
LARGEST = 2**31
"""Bytes that a protocol buffer can have."""


@dataclass(frozen=True)
class Tensor:
    """An input or an output of a graph.

    Attributes:
        name: its name.
        is_float: whether its numbers have 32 bits.
        shape: its sizes; None for one that the file leaves open.
    """

    name: str
    is_float: bool
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class OnnxHeader:
    """What a graph takes and gives.

    Attributes:
        inputs: without the weights, which old files list among them.
        outputs: in the file's order.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


_Span = tuple[int, int]


def read_header(path: Path) -> OnnxHeader:
    """Read a file's inputs and outputs, and check that its parts fill it.

    Raises:
        HeaderError: it is no whole ONNX file, or its weights lie in another file.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > LARGEST:
            raise HeaderError(f"it has {size:,} bytes, and an ONNX file has at most {LARGEST:,}")
        reader = _Reader(file)
        graph: _Span | None = None
        has_version = False
        for number, value in reader.fields((0, size)):
            has_version = has_version or (number == _VERSION and isinstance(value, int))
            graph = value if number == _GRAPH and isinstance(value, tuple) else graph
        if graph is None or not has_version:
            raise HeaderError("it is no ONNX file, or ends before its graph")
        return _graph(reader, graph)


def _graph(reader: _Reader, graph: _Span) -> OnnxHeader:
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    weights: set[str] = set()
    for number, value in reader.fields(graph):
        if not isinstance(value, tuple):
            continue
        if number == _INITIALIZER:
            weights.add(_weights_name(reader, value))
        elif number in (_INPUT, _OUTPUT):
            (inputs if number == _INPUT else outputs).append(_tensor(reader, value))
    return OnnxHeader(tuple(tensor for tensor in inputs if tensor.name not in weights), tuple(outputs))


def _weights_name(reader: _Reader, span: _Span) -> str:
    name = ""
    for number, value in reader.fields(span):
        if number == _TENSOR_NAME and isinstance(value, tuple):
            name = reader.text(value)
        if number == _DATA_LOCATION and value:
            raise HeaderError("its weights lie in another file beside it")
    return name


def _tensor(reader: _Reader, span: _Span) -> Tensor:
    name, is_float, shape = "", False, []
    for number, value in reader.fields(span):
        if number == _NAME and isinstance(value, tuple):
            name = reader.text(value)
        for kind, inner in reader.inside(number == _TYPE, value):
            for part, content in reader.inside(kind == _TENSOR_TYPE, inner):
                is_float = is_float or (part == _ELEMENT and content == _FLOAT)
                for field, dimension in reader.inside(part == _SHAPE, content):
                    if field == _DIMENSION:
                        sizes = [size for key, size in reader.inside(True, dimension) if key == _SIZE]
                        shape.append(next((size for size in sizes if isinstance(size, int) and size > 0), None))
    return Tensor(name, is_float, tuple(shape))


class _Reader:
    """Walks the fields of a protocol buffer; each step seeks for itself, so that walks may be nested."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._seen = 0

    def fields(self, span: _Span) -> Iterator[tuple[int, int | _Span]]:
        """The fields between two places: number, and its value, or the place of its bytes.

        Raises:
            HeaderError: a field leaves the span, or is of no known kind.
        """
        place, end = span
        while place < end:
            self._seen += 1
            if self._seen > _MOST_FIELDS:
                raise HeaderError("it has more parts than any network")
            key, place = self._varint(place, end)
            number, kind = key >> 3, key & 7
            value: int | _Span
            if kind == 0:
                value, place = self._varint(place, end)
            elif kind == 2:
                length, place = self._varint(place, end)
                value = (place, place + length)
                place += length
            elif kind in (1, 5):
                length = 8 if kind == 1 else 4
                value = (place, place + length)
                place += length
            else:
                raise HeaderError("it is no ONNX file, or damaged")
            if place > end or number == 0:
                raise HeaderError("it is no ONNX file, or ends too early")
            yield number, value

    def inside(self, belongs: bool, value: int | _Span) -> Iterator[tuple[int, int | _Span]]:
        """The fields of a value that belongs and has some."""
        return self.fields(value) if belongs and isinstance(value, tuple) else iter(())

    def text(self, span: _Span) -> str:
        """A name."""
        if span[1] - span[0] > _LONGEST_NAME:
            raise HeaderError("it has a name that is none")
        self._file.seek(span[0])
        return self._file.read(span[1] - span[0]).decode("utf-8", errors="replace")

    def _varint(self, place: int, end: int) -> tuple[int, int]:
        self._file.seek(place)
        value = 0
        for index, byte in enumerate(self._file.read(min(_LONGEST_VARINT, end - place))):
            value |= (byte & 0x7F) << 7 * index
            if byte < 0x80:
                return value, place + index + 1
        raise HeaderError("it is no ONNX file, or ends too early")
