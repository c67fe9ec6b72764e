"""Salient-object networks as ONNX files: which there are, where one lies here, and what it takes and gives.

Light to import, for the daemon: files are looked for, and their headers read. Those that people put into ``Models/``
come first, then those that ``fastsd models get`` fetched; of several, the one that keeps the most subjects whole.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handlers.models import catalogue
from handlers.models.headers import HeaderError
from handlers.models.onnx_header import Tensor, read_header

SUFFIX = ".onnx"
MEMORY = 512_000_000
"""Bytes that a network may take in a worker, where nobody allows more: two of the three have room in it."""
_STEMS = ("isnet-general-use", "u2net", "u2netp")
_BIREFNET = "birefnet"
"""What begins so is one of many. It comes last: not every OpenCV can run it."""
GET = f"fastsd models get {catalogue.SEGMENT}"
ADVICE = (
    f"Get one with: {GET} (u2netp, 4.6 MB; u2net and isnet-general-use are larger), or put u2netp.onnx, u2net.onnx, "
    "isnet-general-use.onnx or a BiRefNet….onnx into Models/."
)
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CENTRED = ((0.5, 0.5, 0.5), (1.0, 1.0, 1.0))
_CHANNELS = 3
_SMALLEST, _LARGEST = 32, 2048


@dataclass(frozen=True)
class SegmentNetwork:
    """A network's file on this machine.

    Attributes:
        path: the file.
        bytes: its size: a file that was cut off and came again whole is another.
    """

    path: Path
    bytes: int

    @property
    def name(self) -> str:
        """What people call it: the file's name without its ending."""
        return self.path.stem

    def to_json(self) -> dict[str, Any]:
        """As the parameters of a crop tell it, without the place, which is another on each machine."""
        return {"name": self.name, "bytes": self.bytes}


@dataclass(frozen=True)
class Interface:
    """How a network is asked.

    Attributes:
        output: the name of the output that is the mask; the first, as all of them have it.
        side: pixels of the square that it takes.
        mean, deviation: what is taken from, and divides, each channel (red, green, blue in 0..1).
    """

    output: str
    side: int
    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]


def find(models_folder: Path | None, cache: Path) -> SegmentNetwork | None:
    """The network that crops are made with here, None where there is none.

    Args:
        models_folder: the tree's ``Models/``; None where there is none.
        cache: the folder of downloads.
    """
    return next(_networks(models_folder, cache), None)


def read_interface(file: Path) -> Interface:
    """How a network is asked, from the header of its file.

    Raises:
        HeaderError: it is no whole ONNX file, or no network that takes one picture and gives one mask.
        OSError: it cannot be read.
    """
    header = read_header(file)
    if len(header.inputs) != 1 or not header.outputs:
        counts = f"{len(header.inputs)} things and gives {len(header.outputs)}"
        raise HeaderError(f"it takes {counts}, not a picture and a mask")
    taken, mask = header.inputs[0], header.outputs[0]
    side = _side(taken, 320 if file.stem.casefold().startswith("u2net") else 1024)
    # Some exporters leave the shape of what comes out open.
    if not mask.is_float or (mask.shape and (len(mask.shape) != 4 or mask.shape[1] not in (1, None))):
        raise HeaderError(f"what it gives ({_told(mask)}) is no mask")
    mean, deviation = _CENTRED if file.stem.casefold().startswith("isnet") else _IMAGENET
    return Interface(mask.name, side, mean, deviation)


def _side(taken: Tensor, usual: int) -> int:
    """The side of the square that an input takes; the usual one where the file leaves it open."""
    told = HeaderError(
        f"what it takes ({_told(taken)}) is no square colour picture of {_SMALLEST} to {_LARGEST} pixels"
    )
    if not taken.is_float or len(taken.shape) != 4:
        raise told
    number, channels, height, width = taken.shape
    height, width = height or width or usual, width or height or usual
    if number not in (1, None) or channels != _CHANNELS or height != width or not _SMALLEST <= width <= _LARGEST:
        raise told
    return width


def _told(tensor: Tensor) -> str:
    return " × ".join("?" if size is None else str(size) for size in tensor.shape) or "no shape"


def _networks(models_folder: Path | None, cache: Path) -> Iterator[SegmentNetwork]:
    """All that are here, the one to take first."""
    if models_folder is not None:
        yield from _brought(models_folder)
    entries = [entry for entry in catalogue.ENTRIES.values() if entry.kind == catalogue.SEGMENT]
    files = [cache / "models" / entry.name / entry.index for entry in entries]
    for file in sorted(files, key=lambda file: _rank(file.stem)):
        size = _size(file)
        if size:
            yield SegmentNetwork(file, size)


def _brought(folder: Path) -> Iterator[SegmentNetwork]:
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError:
        return
    top = os.path.realpath(folder)
    named = [name for name in names if name.lower().endswith(SUFFIX) and _rank(Path(name).stem) <= len(_STEMS)]
    for name in sorted(named, key=lambda name: _rank(Path(name).stem)):
        file = folder / name
        size = _size(file)
        # As with every other model: a link may not lead out of the folder.
        if size and os.path.realpath(file).startswith(top + os.sep):
            yield SegmentNetwork(file, size)


def _rank(stem: str) -> int:
    """The place of a name in the order of trust; more than ``len(_STEMS)`` is none of them."""
    folded = stem.casefold()
    if folded.startswith(_BIREFNET):
        return len(_STEMS)
    return _STEMS.index(folded) if folded in _STEMS else len(_STEMS) + 1


def _size(file: Path) -> int:
    """Bytes of a regular file, 0 for anything else."""
    try:
        found = file.stat()
    except (OSError, ValueError):
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) else 0
