"""What can be asked of a conversion, what comes of it, and what both directions look at first."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from handlers.context import JobContext, Stopping, Waiting
from handlers.convert.source import Pipeline
from sessions.refusal import Refusal

Verify = Literal["header", "sample", "all", "forward"]
Weights = Literal["trained", "ema"]
Progress = Callable[[int, int, str], None]
DTYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}


@dataclass(frozen=True)
class Converted:
    """What was made: the numbers that ``fastsd convert --json`` and the manifest show.

    Attributes:
        output: the file or folder.
        pipeline: what it is.
        bytes, tensors: of the output.
        verified: how far it was proven.
        seconds: how long it took.
        beside: files that lie beside the output because programs need them.
    """

    output: Path
    pipeline: Pipeline
    bytes: int
    tensors: int
    verified: Verify
    seconds: float
    beside: tuple[Path, ...] = ()


def dtype_of(name: str | None) -> str | None:
    """The format's name of a type.

    Raises:
        Refusal: code ``dtype``: there is none such.
    """
    if name is None:
        return None
    if name not in DTYPES:
        raise Refusal("dtype", f"There is no number type {name}.", f"Use one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def check_room(folder: Path, needed: int) -> None:
    """Look whether a disk has room.

    Raises:
        Waiting: it has not; the reason says how much is needed and how much is free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise Waiting(
            f"The model needs {needed / 1e9:.2f} GB in {folder.name}; {free / 1e9:.2f} GB are free. Make room there.",
            retry_after=300.0,
        )


def counted(progress: Progress, total: int) -> Callable[[int], None]:
    """What a writer tells of each piece, as the sum of all."""
    done = 0

    def wrote(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total, "writing")

    return wrote


def progress_of(context: JobContext) -> Progress:
    """Tells the daemon how far a job is, and stops it where the daemon stops.

    Raises:
        Cancelled, Stopping: when it is called, as the daemon wishes.
    """

    def progress(done: int, total: int, note: str) -> None:
        context.progress(done, total, note)
        if context.is_stopping():
            raise Stopping

    return progress


def silent(_done: int, _total: int, _note: str) -> None:
    """The progress of whoever does not want to know."""
