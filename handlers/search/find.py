"""Which vectors are nearest: cosine over a file of float16 rows, a slice at a time. Numpy only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

_SLICE = 8192
_MOST_PAIRS = 2000

Vectors = npt.NDArray[np.float32]


def to_bytes(vector: Vectors) -> bytes:
    """A vector as the store keeps it: float16, little-endian."""
    return vector.astype("<f2").tobytes()


class Matrix:
    """A file of vectors, mapped into memory.

    Args:
        file: rows of float16.
        width: numbers of a row.
    """

    def __init__(self, file: Path, width: int) -> None:
        rows = file.stat().st_size // (2 * width)
        # An empty file cannot be mapped.
        self._rows: npt.NDArray[np.float16] = (
            np.memmap(file, dtype="<f2", mode="r", shape=(rows, width)) if rows else np.empty((0, width), np.float16)
        )

    def vectors(self, rows: Sequence[int]) -> Vectors:
        """Some rows, [rows, width]."""
        return self._rows[np.asarray(rows, np.int64)].astype(np.float32)

    def cosines(self, query: Vectors, rows: Sequence[int]) -> Vectors:
        """How near each of the rows is to a query of length 1, [rows]."""
        wanted = np.asarray(rows, np.int64)
        scores = np.empty(len(self._rows), np.float32)
        for start in range(0, len(self._rows), _SLICE):
            part = self._rows[start : start + _SLICE].astype(np.float32)
            np.matmul(part, query, out=scores[start : start + len(part)])
        return scores[wanted]


def nearest(scores: Vectors, count: int) -> list[int]:
    """The places of the highest scores, the highest first; of equal ones the first."""
    return [int(place) for place in np.argsort(-scores, kind="stable")[:count]]


def pairs(vectors: Vectors, least: float) -> Iterator[tuple[int, int, float]]:
    """(one, other, cosine) of rows that are nearer than ``least``, one before other; at most 2,000."""
    told = 0
    for start in range(0, len(vectors), 1024):
        scores = vectors[start : start + 1024] @ vectors.T
        for one, other in zip(*np.nonzero(scores >= least), strict=True):
            if start + one < other:
                yield start + int(one), int(other), float(scores[one, other])
                told += 1
                if told >= _MOST_PAIRS:
                    return
