"""What a picture is of, as the mask of a salient-object network that people fetched or brought (``models/segments``).

OpenCV's reader of ONNX files ends the process over some damaged ones, and a network may want more memory or time than
a worker has. So each file is tried in a process of its own before it is loaded, once a worker:
``python -m handlers.crop.segment FILE MEMORY PARENT``.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from handlers.crop.limits import limited_memory
from handlers.crop.saliency import densest_box
from handlers.crop.window import Box
from handlers.models import segments
from handlers.models.headers import HeaderError
from handlers.pipe import die_with

Mask = NDArray[np.float32]
_TRIAL_SECONDS = 45
"""How long loading a network and asking it once may take; the largest takes 5."""
_WEAK = 0.3
"""A mask that is nowhere surer shows nothing."""
_LEVEL = 0.5
"""The share of the surest place's value from which a place belongs to the subject."""
_ALL = 0.97
"""A mask of more of the picture says nothing."""
_TAIL = 0.01


@dataclass(frozen=True)
class NetworkFile:
    """A network to ask.

    Attributes:
        path: its ONNX file.
        memory: bytes that it may take beyond what the process holds.
    """

    path: Path
    memory: int = segments.MEMORY


class SegmentError(Exception):
    """A network cannot be used; the message says why, and what helps."""


class SegmentFinder:
    """The network, loaded when it is first needed. One that fails is not tried again until its file changes."""

    def __init__(self) -> None:
        self._key: tuple[NetworkFile, int, int] | None = None
        self._network: _Network | None = None
        self._problem = ""

    def mask(self, image: Image.Image, file: NetworkFile) -> Mask:
        """How likely each part of an upright RGB picture is to belong to its subject.

        Returns:
            [height, width] in 0..1 over the whole picture, of a size of the network's own.

        Raises:
            SegmentError: the network cannot be used.
        """
        network = self._loaded(file)
        try:
            with limited_memory(file.memory):
                return network.mask(image)
        except (cv2.error, MemoryError, ValueError) as error:
            self._network, self._problem = None, _told(file, error)
            raise SegmentError(self._problem) from error

    def _loaded(self, file: NetworkFile) -> _Network:
        try:
            found = file.path.stat()
            key = (file, found.st_size, found.st_mtime_ns)
        except OSError:
            key = (file, 0, 0)
        if key != self._key:
            self._key, self._network, self._problem = key, None, ""
            try:
                try_out(file)
                with limited_memory(file.memory):
                    self._network = _Network(file.path)
            except SegmentError as error:
                self._problem = str(error)
            except (cv2.error, MemoryError, HeaderError, OSError) as error:
                self._problem = _told(file, error)
        if self._network is None:
            raise SegmentError(self._problem)
        return self._network


class _Network:
    """A network in memory.

    Raises:
        HeaderError: its file is none.
        OSError: it cannot be read.
        cv2.error: OpenCV cannot load it.
    """

    def __init__(self, file: Path) -> None:
        self._interface = segments.read_interface(file)
        with file.open("rb") as opened:
            # Not by its name, which may be no UTF-8; nor from memory, which would hold it twice.
            self._network: Any = cv2.dnn.readNetFromONNX(f"/dev/fd/{opened.fileno()}")

    def mask(self, image: Image.Image) -> Mask:
        """As ``SegmentFinder.mask``.

        Raises:
            cv2.error: OpenCV cannot run it.
            ValueError: what it gives is no mask.
        """
        asked = self._interface
        small = image.resize((asked.side, asked.side), Image.Resampling.BILINEAR, reducing_gap=2.0)
        values: Mask = np.asarray(small).astype(np.float32) / 255.0
        values -= np.asarray(asked.mean, np.float32)
        values /= np.asarray(asked.deviation, np.float32)
        self._network.setInput(np.ascontiguousarray(values.transpose(2, 0, 1)[None]))
        found = np.asarray(self._network.forward(asked.output))
        if found.ndim != 4 or found.shape[:2] != (1, 1) or not np.isfinite(found).all():
            message = f"what it gives ({' × '.join(map(str, found.shape))}) is no mask"
            raise ValueError(message)
        mask: Mask = found[0, 0].astype(np.float32)
        if mask.min() < -1e-3 or mask.max() > 1 + 1e-3:
            # BiRefNet gives logits.
            mask = 0.5 * (1.0 + np.tanh(0.5 * mask))
        return mask.clip(0.0, 1.0)


def mask_box(mask: Mask, size: tuple[int, int], excluded: Sequence[Box] = ()) -> Box | None:
    """The box around what a mask shows, as far as a square window can hold it; None where it shows nothing or all.

    Args:
        mask: [height, width] in 0..1, of any size.
        size: (width, height) of the picture.
        excluded: boxes in which nothing counts.
    """
    height, width = mask.shape
    counted = mask.copy()
    for x0, y0, x1, y1 in excluded:
        counted[round(y0 * height) : round(y1 * height), round(x0 * width) : round(x1 * width)] = 0
    if float(counted.max()) < _WEAK:
        return None
    inside = counted >= _LEVEL * counted.max()
    if inside.mean() > _ALL:
        return None
    return densest_box(np.where(inside, counted, 0), size[0] >= size[1], min(size) / max(size), _TAIL)


def try_out(file: NetworkFile) -> None:
    """Load a network and ask it once, in a process of its own.

    Raises:
        SegmentError: it cannot be used.
    """
    command = [sys.executable, "-m", "handlers.crop.segment", os.fspath(file.path), str(file.memory), str(os.getpid())]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TRIAL_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise SegmentError(_problem(file, f"it takes more than {_TRIAL_SECONDS} s for a picture")) from None
    if done.returncode:
        # What it says itself, or nothing, where it crashed.
        said = done.stdout.decode("utf-8", errors="replace").strip()
        raise SegmentError(said or _problem(file, "OpenCV crashes over it: it is damaged, or of an unknown kind"))


def _told(file: NetworkFile, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return _problem(file, "it is not there any more")
    if isinstance(error, OSError):
        return _problem(file, f"it cannot be read: {error.strerror}")
    if isinstance(error, HeaderError | ValueError):
        return _problem(file, str(error))
    memory = isinstance(error, MemoryError) or getattr(error, "code", 0) == cv2.Error.StsNoMem
    if memory or "bad_alloc" in str(error):
        return (
            f"{file.path.name} needs more than {file.memory // 1_000_000} MB of memory. Allow more "
            f"(limits.segment_memory in fastsd.yaml), or take a smaller one: {segments.GET}"
        )
    return _problem(file, "OpenCV cannot run it")


def _problem(file: NetworkFile, why: str) -> str:
    return f"{file.path.name} cannot be used: {why}. Remove it, and get one with: {segments.GET}"


def _trial(path: str, memory: str, parent: str) -> int:
    """Exit code 0 if the network can be used; else the reason goes to stdout."""
    die_with(int(parent))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    cv2.setNumThreads(1)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    file = NetworkFile(Path(path), int(memory))
    try:
        with limited_memory(file.memory):
            _Network(file.path).mask(Image.new("RGB", (64, 64), (90, 120, 60)))
    except (cv2.error, MemoryError, HeaderError, ValueError, OSError) as error:
        # Names may hold bytes that are no UTF-8.
        sys.stdout.buffer.write(_told(file, error).encode("utf-8", errors="replace"))
        return 1
    return 0


if __name__ == "__main__":
    sys.stdout.flush()
    code = _trial(*sys.argv[1:4])
    sys.stdout.flush()
    # Without taking the network down: nothing may go wrong any more.
    os._exit(code)
