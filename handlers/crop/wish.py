"""What a person wished for the crop of a picture, checked: a fixed box, a subject, things to leave out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from handlers.crop.window import Box, PixelBox, held_by_square
from sessions.refusal import Refusal

Unit = Literal["pixels", "share"]
FACES, CENTRE, SEGMENT = "faces", "centre", "segment"
_LEAST_SIDE = 64
_ADVICE = "Correct the line in crop.txt, or take it out: the subject is then looked for."


@dataclass(frozen=True)
class Wish:
    """What a person wished.

    Attributes:
        box: the part that the window must hold, in ``unit``; None where none is fixed.
        unit: upright source pixels, or shares (0..1) of the upright picture.
        subject: ``faces``, ``centre``, ``segment``, a noun, or "" for no wish.
        exclude: nouns of what is not the subject.
    """

    box: Box | None = None
    unit: Unit = "pixels"
    subject: str = ""
    exclude: tuple[str, ...] = ()

    @classmethod
    def of(cls, value: object) -> Wish:
        """Read the ``wish`` of a payload; None is no wish.

        Raises:
            Refusal: ``wish``: it is no box, or no words.
        """
        if value is None:
            return cls()
        if not isinstance(value, Mapping):
            raise Refusal("wish", f"The wish {value!r} for this crop is none.", _ADVICE)
        unit = value.get("unit") or "pixels"
        if unit not in ("pixels", "share"):
            raise Refusal("wish", f"The unit {unit!r} of the fixed box is neither pixels nor share.", _ADVICE)
        subject = value.get("subject") or ""
        exclude = value.get("exclude") or ()
        if (
            not isinstance(subject, str)
            or isinstance(exclude, str)
            or not all(isinstance(word, str) for word in exclude)
        ):
            raise Refusal("wish", "The subject and what is left out must be words.", _ADVICE)
        words = tuple(word.strip().lower() for word in exclude if word.strip())
        return cls(_box(value.get("box"), unit), cast("Unit", unit), subject.strip().lower(), words)

    def window(self, size: tuple[int, int]) -> PixelBox | None:
        """The window that the fixed box asks for: the square that holds it, or exactly it if it is square.

        Args:
            size: (width, height) of the upright picture.

        Raises:
            Refusal: ``wish``: the box leaves the picture or is too small.
        """
        if self.box is None:
            return None
        width, height = size
        across, down = (width, height) if self.unit == "share" else (1, 1)
        x0, y0, x1, y1 = (
            round(self.box[0] * across),
            round(self.box[1] * down),
            round(self.box[2] * across),
            round(self.box[3] * down),
        )
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise Refusal(
                "wish", f"The fixed box {list(self.box)} leaves the picture of {width} × {height} pixels.", _ADVICE
            )
        window = held_by_square(size, (x0, y0, x1, y1))
        if window[2] - window[0] < _LEAST_SIDE:
            raise Refusal(
                "wish",
                f"The fixed box is only {x1 - x0} × {y1 - y0} pixels of the picture; {_LEAST_SIDE} are the least.",
                _ADVICE,
            )
        return window

    def least_side(self, size: tuple[int, int]) -> int | None:
        """The side of the window that the fixed box asks for, before it is known which way up the picture is."""
        if self.box is None:
            return None
        sides = []
        for width, height in (size, size[::-1]):
            across, down = (width, height) if self.unit == "share" else (1, 1)
            longest = max((self.box[2] - self.box[0]) * across, (self.box[3] - self.box[1]) * down)
            sides.append(max(1, min(round(longest), width, height)))
        return min(sides)


def _box(value: Any, unit: str) -> Box | None:
    if value is None:
        return None
    try:
        numbers = [float(number) for number in value]
    except (TypeError, ValueError, OverflowError):
        numbers = []
    if len(numbers) != 4 or not all(math.isfinite(number) for number in numbers):
        raise Refusal("wish", f"The fixed box {value!r} is not four numbers: left, top, right, bottom.", _ADVICE)
    x0, y0, x1, y1 = numbers
    if x0 >= x1 or y0 >= y1:
        raise Refusal("wish", f"The fixed box {value!r} is empty: left, top, right, bottom are wanted.", _ADVICE)
    if min(numbers) < 0 or (unit == "share" and max(numbers) > 1):
        raise Refusal("wish", f"The fixed box {value!r} leaves the picture (unit: {unit}).", _ADVICE)
    return (x0, y0, x1, y1)
