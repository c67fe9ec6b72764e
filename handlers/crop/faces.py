"""Faces, by YuNet: found at a small size, and looked at once more where that is in doubt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from handlers.crop.window import Box

YUNET = Path(__file__).parent / "yunet" / "face_detection_yunet_2023mar.onnx"
_SIDE = 320
"""The detector sees the picture letterboxed to so many pixels: 4 times faster than 640, as good for large faces."""
_FINE_SIDE = 640
_WEAK, _SURE = 0.6, 0.8
"""Scores: what is at least weak is looked at again at the fine size; what is sure counts."""
_SURE_FINE = 0.85
"""At the fine size false faces are surer, too."""
_SMALL = 28
"""Faces of fewer pixels at 320 are a crowd's, or far away: others beside them may have been missed."""
_LONG = 2.0
"""A picture of a greater aspect is letterboxed to too little."""
_NMS = 0.3
_MOST_FACES = 200
# A face is the skin between brows and chin; a head is more: shares of the face's width or height.
_HEAD_ABOVE, _HEAD_BESIDE, _HEAD_BELOW = 0.25, 0.10, 0.08
_MINOR = 1 / 3
"""Heads smaller than this share of the largest (by height) are people in the background."""
_SAME = 0.4


@dataclass(frozen=True)
class Face:
    """A face.

    Attributes:
        box: in 0..1 of the picture.
        score: 0..1.
        pixels: of its shorter side where it was found.
    """

    box: Box
    score: float
    pixels: float


class FaceFinder:
    """YuNet, loaded once."""

    def __init__(self) -> None:
        self._detector: Any = cv2.FaceDetectorYN.create(
            str(YUNET), "", (_SIDE, _SIDE), score_threshold=_WEAK, nms_threshold=_NMS, top_k=_MOST_FACES
        )

    def faces(self, image: Image.Image) -> list[Box]:
        """The faces in an upright RGB picture, the surest first, cut at the picture's borders."""
        found = self.detect(image, _SIDE)
        sure = [face for face in found if face.score >= _SURE]
        crowd = bool(sure) and max(face.pixels for face in sure) < _SMALL
        doubt = not sure and bool(found)
        long = max(image.size) > _LONG * min(image.size)
        if crowd or doubt or (long and not sure):
            sure += [face for face in self.detect(image, _FINE_SIDE) if face.score >= _SURE_FINE]
        return [face.box for face in distinct(sure)]

    def detect(self, image: Image.Image, side: int) -> list[Face]:
        """All that may be faces, at so many pixels of the longer side."""
        scale = side / max(image.size)
        small = _resized(image, scale)
        canvas: NDArray[np.uint8] = np.zeros((side, side, 3), dtype=np.uint8)
        height, width = small.shape[:2]
        canvas[:height, :width] = small[:, :, ::-1]  # the detector expects BGR
        self._detector.setInputSize((side, side))
        _, rows = self._detector.detect(canvas)
        found = []
        for row in [] if rows is None else rows.tolist():
            x, y, w, h = row[:4]
            box = clipped((x / width, y / height, (x + w) / width, (y + h) / height))
            if box[2] > box[0] and box[3] > box[1]:
                found.append(Face(box, float(row[14]), min(w, h)))
        return found


def distinct(faces: Sequence[Face]) -> list[Face]:
    """The faces without those that lie on a surer one, the surest first."""
    kept: list[Face] = []
    for face in sorted(faces, key=lambda face: -face.score):
        if all(overlap(face.box, other.box) < _SAME for other in kept):
            kept.append(face)
    return kept


def overlap(one: Box, other: Box) -> float:
    """The area that two boxes share, as a share of the smaller one's."""
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    least = min((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return max(0.0, wide) * max(0.0, high) / least if least > 0 else 0.0


def head_of(face: Box) -> Box:
    """The head around a face, cut at the picture's borders."""
    x0, y0, x1, y1 = face
    width, height = x1 - x0, y1 - y0
    return clipped(
        (x0 - _HEAD_BESIDE * width, y0 - _HEAD_ABOVE * height, x1 + _HEAD_BESIDE * width, y1 + _HEAD_BELOW * height)
    )


def main_heads(heads: Sequence[Box]) -> list[Box]:
    """The heads without those that are much smaller than the largest, largest first."""
    ordered = sorted(heads, key=lambda box: box[1] - box[3])
    return [box for box in ordered if box[3] - box[1] >= _MINOR * (ordered[0][3] - ordered[0][1])]


def clipped(box: Box) -> Box:
    """A box, cut at the picture's borders."""
    x0, y0, x1, y1 = (min(max(value, 0.0), 1.0) for value in box)
    return (x0, y0, x1, y1)


def _resized(image: Image.Image, scale: float) -> NDArray[np.uint8]:
    width, height = (max(1, round(length * scale)) for length in image.size)
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0))
