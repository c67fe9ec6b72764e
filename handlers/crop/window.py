"""Which square of a picture to keep. Pure: sizes and boxes in, a box out.

The window is the largest square that the picture holds, moved along the longer side to where the subject is. Larger
is better: a window that holds more can only hold more of the subject.
"""

from __future__ import annotations

from collections.abc import Sequence

Box = tuple[float, float, float, float]
"""(x0, y0, x1, y1) in 0..1 of the upright picture."""
PixelBox = tuple[int, int, int, int]
"""(x0, y0, x1, y1) in upright source pixels."""
_WHOLE = 0.95
"""A subject of which this share of its width and of its height is inside counts as kept."""


def square_window(size: tuple[int, int], boxes: Sequence[Box]) -> PixelBox:
    """The largest square inside the picture that keeps as many of the boxes as any does, centred on those it keeps.

    Args:
        size: (width, height) of the upright picture in pixels.
        boxes: the subjects; none of them gives the centre square.

    Returns:
        Whole pixels; x1 - x0 == y1 - y0 == min(size).
    """
    width, height = size
    side = min(width, height)
    left = _place(width, side, [(x0 * width, x1 * width) for x0, _, x1, _ in boxes])
    top = _place(height, side, [(y0 * height, y1 * height) for _, y0, _, y1 in boxes])
    return (left, top, left + side, top + side)


def held_by_square(size: tuple[int, int], box: PixelBox) -> PixelBox:
    """The smallest square inside the picture that holds a box, centred on it as far as the picture's ends allow.

    A box that is square is returned as it is. One that is longer than any square gives the largest, in its middle.

    Args:
        size: (width, height) of the picture.
        box: inside it, not empty.
    """
    side = min(max(box[2] - box[0], box[3] - box[1]), *size)
    corner = []
    for length, start, end in zip(size, box[:2], box[2:], strict=True):
        corner.append(min(max((start + end - side) // 2, 0), length - side))
    return (corner[0], corner[1], corner[0] + side, corner[1] + side)


def whole_picture(size: tuple[int, int]) -> PixelBox:
    """The window that leaves nothing out."""
    return (0, 0, size[0], size[1])


def _place(length: int, span: int, intervals: Sequence[tuple[float, float]]) -> int:
    """Where a span of pixels begins on a line of ``length`` pixels.

    It keeps the most intervals; among equals, those with the most length; among these, the one nearest to the centre.
    """
    if not intervals or span >= length:
        return (length - span) // 2
    candidates = [_centred(length, span, intervals)]
    for start, end in intervals:
        candidates += [_inside(start, length, span), _inside(end - span, length, span)]
        candidates.append(_centred(length, span, [(start, end)]))
    best = max(candidates, key=lambda begin: _worth(begin, length, span, intervals))
    kept = [interval for interval in intervals if _kept(begin=best, span=span, interval=interval)]
    centred = _centred(length, span, kept)
    loses = _worth(centred, length, span, intervals)[0] < len(kept)
    return round(best if loses else centred)


def _centred(length: int, span: int, intervals: Sequence[tuple[float, float]]) -> float:
    middle = (min(start for start, _ in intervals) + max(end for _, end in intervals)) / 2
    return _inside(middle - span / 2, length, span)


def _inside(begin: float, length: int, span: int) -> float:
    return min(max(begin, 0.0), float(length - span))


def _kept(begin: float, span: int, interval: tuple[float, float]) -> bool:
    start, end = interval
    overlap = min(end, begin + span) - max(start, begin)
    # A subject longer than any window is kept where the window is full of it.
    return overlap >= _WHOLE * min(end - start, span) - 1e-6


def _worth(begin: float, length: int, span: int, intervals: Sequence[tuple[float, float]]) -> tuple[int, float, float]:
    kept = [interval for interval in intervals if _kept(begin, span, interval)]
    off_centre = abs(begin + span / 2 - length / 2)
    return (len(kept), sum(end - start for start, end in kept), -off_centre)
