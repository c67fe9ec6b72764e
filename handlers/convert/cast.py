"""Other number types, one tensor at a time, through numpy.

numpy has no bfloat16: it is the upper half of a float32 (16 bits of sign, exponent and 7 bits of fraction), rounded to
nearest, ties to even, as torch does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


def cast(raw: bytes, source: str, target: str) -> bytes:
    """The bytes of a tensor in another floating type.

    Args:
        raw: little-endian values of type ``source``.
        source: F64, F32, F16 or BF16.
        target: F32, F16 or BF16.

    Raises:
        ValueError: a finite value does not fit (above 65504 in F16).
    """
    if source == target:
        return raw
    values = decode(raw, source)
    encoded = encode(values, target)
    again = decode(encoded, target)
    if not np.array_equal(np.isfinite(again), np.isfinite(values)):
        # Not nanmax: a signalling NaN beside a number makes it NaN.
        largest = float(np.abs(values[np.isfinite(values)]).max())
        raise ValueError(f"a value of {largest:g} does not fit into {target}")
    return encoded


def decode(raw: bytes, dtype: str) -> NDArray[Any]:
    """Values as numpy has them: bfloat16 as float32."""
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(raw, _NUMPY[dtype])


def encode(values: NDArray[Any], dtype: str) -> bytes:
    """Values in a type, rounded to nearest; what is too large becomes infinite."""
    # Signalling NaNs and numbers that are too large are looked for by the caller.
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype != "BF16":
            return values.astype(_NUMPY[dtype]).tobytes()
        bits = values.astype("<f4").view("<u4")
        rounded = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
        quiet = (bits >> 16) | 0x40  # a NaN stays one: rounding could carry its fraction away
        return np.where(np.isnan(values), quiet, rounded).astype("<u2").tobytes()
