"""Where a picture's subject is: faces, else what stands out, else the centre."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from handlers.crop.saliency import salient_box
from handlers.crop.window import Box

Finding = Literal["face", "grounded", "saliency", "centre"]
YUNET = Path(__file__).parent / "yunet" / "face_detection_yunet_2023mar.onnx"
_SIDE = 320
"""The detector sees the picture letterboxed to this many pixels: 640 finds one face more of 96, and four false ones."""
_SCORE = 0.8
_NMS = 0.3
_MOST_FACES = 200
# A face is the skin between brows and chin; a head is more: shares of the face's width or height.
_HEAD_ABOVE, _HEAD_BESIDE, _HEAD_BELOW = 0.25, 0.10, 0.08
_MINOR = 1 / 3
"""Heads smaller than this share of the largest (by height) are people in the background."""


@dataclass(frozen=True)
class Subject:
    """What was found.

    Attributes:
        finding: how it was found, the most trusted way first.
        boxes: where, largest first; empty for ``centre``.
    """

    finding: Finding
    boxes: tuple[Box, ...]


class FaceFinder:
    """YuNet, loaded once."""

    def __init__(self) -> None:
        self._detector: Any = cv2.FaceDetectorYN.create(
            str(YUNET), "", (_SIDE, _SIDE), score_threshold=_SCORE, nms_threshold=_NMS, top_k=_MOST_FACES
        )

    def faces(self, image: Image.Image) -> list[Box]:
        """The faces in an upright RGB picture, the surest first, cut at the picture's borders."""
        scale = _SIDE / max(image.size)
        small = _resized(image, scale)
        canvas: NDArray[np.uint8] = np.zeros((_SIDE, _SIDE, 3), dtype=np.uint8)
        height, width = small.shape[:2]
        canvas[:height, :width] = small[:, :, ::-1]  # the detector expects BGR
        _, rows = self._detector.detect(canvas)
        if rows is None:
            return []
        ordered = sorted(rows.tolist(), key=lambda row: -row[14])
        boxes = [
            _clipped((x / width, y / height, (x + w) / width, (y + h) / height))
            for x, y, w, h in (r[:4] for r in ordered)
        ]
        return [box for box in boxes if box[2] > box[0] and box[3] > box[1]]


def find_subject(image: Image.Image, finder: FaceFinder) -> Subject:
    """The subject of an upright RGB picture of any scale.

    Faces win, each widened to its head; people far in the background of a large one do not count. Without faces
    it is what stands out from the picture's border; where nothing does, the centre.
    """
    heads = main_heads([head_of(face) for face in finder.faces(image)])
    if heads:
        return Subject("face", tuple(heads))
    box = salient_box(image)
    return Subject("saliency", (box,)) if box else Subject("centre", ())


def head_of(face: Box) -> Box:
    """The head around a face, cut at the picture's borders."""
    x0, y0, x1, y1 = face
    width, height = x1 - x0, y1 - y0
    return _clipped(
        (x0 - _HEAD_BESIDE * width, y0 - _HEAD_ABOVE * height, x1 + _HEAD_BESIDE * width, y1 + _HEAD_BELOW * height)
    )


def main_heads(heads: Sequence[Box]) -> list[Box]:
    """The heads without those that are much smaller than the largest, largest first."""
    ordered = sorted(heads, key=lambda box: box[1] - box[3])
    return [box for box in ordered if box[3] - box[1] >= _MINOR * (ordered[0][3] - ordered[0][1])]


def _clipped(box: Box) -> Box:
    x0, y0, x1, y1 = (min(max(value, 0.0), 1.0) for value in box)
    return (x0, y0, x1, y1)


def _resized(image: Image.Image, scale: float) -> NDArray[np.uint8]:
    width, height = (max(1, round(length * scale)) for length in image.size)
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0))
