"""In which numbers a captioner computes: what is asked for, and what ``auto`` picks. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Precision = Literal["fp32", "bf16", "fp16", "int8", "4bit"]
PRECISIONS: tuple[str, ...] = get_args(Precision)
CHOICES = ("auto", *PRECISIONS)
# Bytes a weight: int8 keeps embeddings in fp32 (CPU) or fp16 (CUDA); 4-bit has scales besides.
_BYTES: dict[str, float] = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "int8": 1.35, "4bit": 0.7}
# Below this size nothing is gained, and fp32 is exact.
_SMALL = 64_000_000
_ROOM = 1 << 30


@dataclass(frozen=True)
class Machine:
    """What ``auto`` goes by.

    Attributes:
        device: ``cpu`` or ``cuda``.
        free: bytes that are free there.
        bfloat16: whether the device computes in it by itself.
        bitsandbytes: whether that package can be loaded.
    """

    device: str
    free: int
    bfloat16: bool = True
    bitsandbytes: bool = False


def weight_bytes(parameters: int, precision: Precision) -> int:
    """About what the weights take in a precision."""
    return int(parameters * _BYTES[precision])


def choose(parameters: int, machine: Machine) -> Precision:
    """The precision for ``auto``: the fastest one that fits.

    On a CPU that is int8 (3.5 CPU-seconds a picture at batch 4, against 14.8 in fp32 and 5.4 in bf16), which needs room
    for fp32 first, because it is made of it. On a GPU half precision, and smaller only where memory asks for it.
    """
    if parameters <= _SMALL:
        return "fp32"
    if machine.device == "cpu":
        first = weight_bytes(parameters, "fp32") + weight_bytes(parameters, "int8") // 2
        return "int8" if machine.free >= first + _ROOM else "bf16"
    half: Precision = "bf16" if machine.bfloat16 else "fp16"
    fitting: list[Precision] = [half, "int8", "4bit"] if machine.bitsandbytes else [half]
    for precision in fitting:
        if machine.free >= weight_bytes(parameters, precision) + _ROOM:
            return precision
    return fitting[-1]
