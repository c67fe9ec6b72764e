"""Torch's zip form of a checkpoint (``.ckpt``), written without torch, one tensor at a time.

Members are ``data.pkl``, ``version`` and ``data/N`` only, and the pickle names nothing but OrderedDict,
``_rebuild_tensor_v2`` and storages: WebUIs' safe readers accept no more (checkpoints.md, trap 2).
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path

from handlers.convert.pieces import Sources
from handlers.convert.plan import Entry
from handlers.models.pickles import STORAGES

_ROOT = "archive"
_TORCH = {dtype: storage for storage, dtype in STORAGES.items()}
_DATE = (1980, 1, 1, 0, 0, 0)


def write_checkpoint(target: Path, plan: Sequence[Entry], progress: Callable[[int], None]) -> None:
    """Write a plan to a ``.ckpt`` file, as ``{"state_dict": {name: tensor}}``.

    Args:
        target: a fresh path (the caller syncs and renames it).
        plan: the tensors.
        progress: called with the bytes written since the last call; may raise to stop.

    Raises:
        OSError: reading or writing failed.
        ValueError: a value does not fit into the type asked for, or a type has no place in a checkpoint.
    """
    with Sources() as sources, zipfile.ZipFile(target, "x", zipfile.ZIP_STORED, allowZip64=True) as archive:
        archive.writestr(_member("data.pkl"), _pickle(plan))
        for number, entry in enumerate(plan):
            with archive.open(_member(f"data/{number}"), "w", force_zip64=True) as out:
                for block in sources.read(entry):
                    out.write(block)
            progress(entry.length)
        archive.writestr(_member("version"), b"3\n")


def _member(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(f"{_ROOT}/{name}", _DATE)


def _pickle(plan: Sequence[Entry]) -> bytes:
    """``{"state_dict": {name: _rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())}}``, protocol 2."""
    parts = [pickle.PROTO, b"\x02", pickle.EMPTY_DICT, pickle.MARK, _text("state_dict"), pickle.EMPTY_DICT, pickle.MARK]
    for number, entry in enumerate(plan):
        parts += [_text(entry.name), *_tensor(number, entry)]
    parts += [pickle.SETITEMS, pickle.SETITEMS, pickle.STOP]
    return b"".join(parts)


def _tensor(number: int, entry: Entry) -> list[bytes]:
    if entry.dtype not in _TORCH:
        raise ValueError(f"{entry.name} is {entry.dtype}, which a .ckpt cannot hold; write a .safetensors file")
    storage = [
        pickle.MARK,
        _text("storage"),
        _global("torch", _TORCH[entry.dtype]),
        _text(str(number)),
        _text("cpu"),
        _number(prod(entry.shape)),
        pickle.TUPLE,
        pickle.BINPERSID,
    ]
    nothing = [_global("collections", "OrderedDict"), pickle.EMPTY_TUPLE, pickle.REDUCE]
    arguments = [pickle.MARK, *storage, _number(0), *_numbers(entry.shape), *_numbers(_strides(entry.shape))]
    rebuild = _global("torch._utils", "_rebuild_tensor_v2")
    return [rebuild, *arguments, pickle.NEWFALSE, *nothing, pickle.TUPLE, pickle.REDUCE]


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(shape[place + 1 :]) for place in range(len(shape)))


def _text(value: str) -> bytes:
    raw = value.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(raw)) + raw


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _number(value: int) -> bytes:
    if value < 1 << 31:
        return pickle.BININT + struct.pack("<i", value)
    raw = value.to_bytes(9, "little")
    return pickle.LONG1 + bytes([len(raw)]) + raw


def _numbers(values: tuple[int, ...]) -> list[bytes]:
    return [pickle.MARK, *(_number(value) for value in values), pickle.TUPLE]
