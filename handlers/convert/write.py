"""Header first, then the tensors' bytes, copied by the kernel; only a changed type passes through memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from handlers.convert.cast import cast
from handlers.convert.header import read_bytes, write_header
from handlers.convert.plan import Entry

_BLOCK = 1 << 20
_KERNEL_BLOCK = 64 << 20


def write_single(
    target: Path, plan: Sequence[Entry], metadata: Mapping[str, str], progress: Callable[[int], None]
) -> None:
    """Write a plan to a file.

    Args:
        target: a fresh path (the caller syncs and renames it).
        plan: the tensors in order.
        metadata: for the header.
        progress: called with the bytes written since the last call; may raise to stop.

    Raises:
        OSError: reading or writing failed, or a source ended early.
        ValueError: a value does not fit into the type asked for.
    """
    with ExitStack() as stack:
        out = stack.enter_context(target.open("xb", buffering=0))
        _write_all(out, write_header([(entry.name, entry.dtype, entry.shape) for entry in plan], metadata))
        opened: dict[Path, IO[bytes]] = {}
        for entry in plan:
            path = entry.source.file
            if path not in opened:
                opened[path] = stack.enter_context(path.open("rb", buffering=0))
            _copy_tensor(opened[path], out, entry)
            progress(entry.length)


def _copy_tensor(source: IO[bytes], out: IO[bytes], entry: Entry) -> None:
    tensor = entry.source.tensor
    if entry.dtype == tensor.dtype:
        _copy(source.fileno(), out, tensor.begin, tensor.length)
        return
    raw = read_bytes(source.fileno(), tensor.begin, tensor.length)
    try:
        _write_all(out, cast(raw, tensor.dtype, entry.dtype))
    except ValueError as error:
        raise ValueError(f"{entry.component}/{entry.key}: {error}") from None


def _copy(source: int, out: IO[bytes], begin: int, length: int) -> None:
    """Copy bytes inside the kernel; through memory where file systems or kernels do not offer that."""
    end = begin + length
    while begin < end:
        try:
            copied = os.copy_file_range(source, out.fileno(), min(_KERNEL_BLOCK, end - begin), begin)
        except (AttributeError, OSError):
            break
        if copied == 0:
            break
        begin += copied
    while begin < end:
        block = os.pread(source, min(_BLOCK, end - begin), begin)
        if not block:
            raise OSError(f"the source ended {end - begin} bytes early")
        _write_all(out, block)
        begin += len(block)


def _write_all(out: IO[bytes], data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[out.write(view) :]
