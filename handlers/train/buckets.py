"""Shapes for pictures that are not square (``buckets: true``). Pure: sizes and boxes in, shapes and windows out.

A full figure or a landscape does not fit into a square. A bucket is a shape with about as many pixels as the square of
the training's resolution; a picture goes into the bucket whose aspect is nearest to its own, with its stored square
window grown along its longer side.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from handlers.crop.window import PixelBox

Shape = tuple[int, int]
"""(width, height) in pixels."""
# A UNet halves the VAE's eighth three times: sides of another kind would be padded inside of it, and WebUIs offer none.
SIDE_STEP = 64
# At 64 pixels that would leave the square alone; the miniatures stand the padding.
MINIATURE_SIDE_STEP = 8
_LONGEST = 2
"""The longer side is at most so many times the shorter one."""


@dataclass(frozen=True)
class Frame:
    """What is cut from a picture, and what it becomes.

    Attributes:
        window: in upright source pixels.
        shape: pixels of the picture that is trained on.
    """

    window: PixelBox
    shape: Shape


def bucket_shapes(resolution: int, step: int) -> tuple[Shape, ...]:
    """The buckets of a resolution, from the tallest to the widest; the square is among them.

    For each longer side, the largest shorter one with which a picture has no more pixels than the square (as kohya's
    trainers have it), so that no bucket takes more memory than the resolution promised.

    Args:
        resolution: pixels of the square's side.
        step: all sides are multiples of it, in pixels.

    Raises:
        ValueError: ``step`` does not divide ``resolution``.
    """
    if resolution <= 0 or resolution % step:
        raise ValueError(f"{step} does not divide {resolution}")
    shapes = set()
    for longer in range(resolution, _LONGEST * resolution, step):
        shorter = resolution * resolution // longer // step * step
        if longer <= _LONGEST * shorter:
            shapes |= {(longer, shorter), (shorter, longer)}
    return tuple(sorted(shapes))


def bucket_window(size: tuple[int, int], square: PixelBox, shape: Shape) -> PixelBox:
    """A window with a bucket's aspect around a square one.

    It has the same centre as far as the picture's ends allow. The square stays whole where the picture is long enough
    for the bucket; where it is not, the window is as large as the picture allows.

    Args:
        size: (width, height) of the upright picture.
        square: the stored window.
        shape: the bucket.

    Returns:
        Whole pixels; the aspect is the bucket's to within half a pixel of the shorter side.

    Raises:
        ValueError: the square is empty or leaves the picture.
    """
    x0, y0, x1, y1 = square
    if not (0 <= x0 < x1 <= size[0] and 0 <= y0 < y1 <= size[1]):
        raise ValueError(f"the window {square} is empty or leaves the picture of {size[0]} × {size[1]}")
    if shape[0] >= shape[1]:
        width, height = _grown(x1 - x0, size[0], shape)
    else:
        height, width = _grown(y1 - y0, size[1], shape[::-1])
    left = min(max((x0 + x1 - width) // 2, 0), size[0] - width)
    top = min(max((y0 + y1 - height) // 2, 0), size[1] - height)
    return left, top, left + width, top + height


def bucket_frame(size: tuple[int, int], square: PixelBox, shapes: Iterable[Shape]) -> Frame:
    """The bucket of a picture and its window: nearest in aspect (by ratio) of those that its pixels fill.

    A picture too small for all of them gets the nearest: it is enlarged, as its square would be.

    Args:
        size: (width, height) of the upright picture.
        square: the stored window.
        shapes: the buckets, at least one.

    Raises:
        ValueError: as ``bucket_window``.
    """
    nearest = sorted(shapes, key=lambda shape: (_distance(size, shape), _distance((1, 1), shape), shape))
    frames = [Frame(bucket_window(size, square, shape), shape) for shape in nearest]
    return next((frame for frame in frames if is_filled(frame)), frames[0])


def is_filled(frame: Frame) -> bool:
    """Whether the window has all the pixels that the shape wants, so that nothing is enlarged."""
    (x0, y0, x1, y1), (width, height) = frame.window, frame.shape
    return x1 - x0 >= width and y1 - y0 >= height


def bucket_counts(inputs: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The buckets of a run's inputs for its record: ``{"size": [width, height], "pictures"}``, tallest first."""
    counted = Counter(tuple(entry["bucket"]) for entry in inputs if "bucket" in entry)
    return [{"size": list(size), "pictures": count} for size, count in sorted(counted.items())]


def told_of(buckets: Sequence[Mapping[str, Any]], batch: int) -> list[str]:
    """Lines for the log about ``bucket_counts``: what there is, and which buckets have fewer pictures than a batch."""
    if not buckets:
        return []
    lines = [f"buckets: {_named(buckets)}"]
    small = [bucket for bucket in buckets if bucket["pictures"] < batch]
    if small:
        lines.append(
            f"fewer pictures than a batch of {batch}, so that they repeat within it: {_named(small)}; more pictures "
            "of these shapes, or a smaller batch_size, would teach more"
        )
    return lines


def _named(buckets: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{bucket['pictures']} of {bucket['size'][0]} × {bucket['size'][1]}" for bucket in buckets)


def _grown(side: int, length: int, shape: Shape) -> tuple[int, int]:
    """(longer, shorter) side of a window around a square one, in a picture of ``length`` that way."""
    longer = min(_rounded(side * shape[0], shape[1]), length)
    return longer, max(1, min(side, _rounded(longer * shape[1], shape[0])))


def _rounded(value: int, by: int) -> int:
    return (2 * value + by) // (2 * by)


def _distance(size: Shape, other: Shape) -> Fraction:
    """How far two aspects are apart, 1 for not at all: the ratio orders them as the difference of logarithms does."""
    ratio = Fraction(size[0] * other[1], size[1] * other[0])
    return max(ratio, 1 / ratio)
