"""Header first, then the tensors' bytes, copied by the kernel; only a changed tensor passes through memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from handlers.convert.header import write_header
from handlers.convert.pieces import Sources, copy_range, is_copied, write_all
from handlers.convert.plan import Entry


def write_safetensors(
    target: Path, plan: Sequence[Entry], metadata: Mapping[str, str], progress: Callable[[int], None]
) -> None:
    """Write a plan to a ``.safetensors`` file.

    Args:
        target: a fresh path (the caller syncs and renames it).
        plan: the tensors in order.
        metadata: for the header.
        progress: called with the bytes written since the last call; may raise to stop.

    Raises:
        OSError: reading or writing failed, or a source ended early.
        ValueError: a value does not fit into the type asked for.
    """
    with Sources() as sources, target.open("xb", buffering=0) as out:
        write_all(out, write_header([(entry.name, entry.dtype, entry.shape) for entry in plan], metadata))
        for entry in plan:
            if is_copied(entry):
                for piece in entry.pieces:
                    copy_range(sources.descriptor(piece.file), out, piece.begin, piece.length)
            else:
                for block in sources.read(entry):
                    write_all(out, block)
            progress(entry.length)
