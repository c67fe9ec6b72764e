"""Florence-2's places in a picture: 1000 × 1000 bins, written as ``<loc_0>`` … ``<loc_999>``, four a box. Pure.

Xiao et al., "Florence-2: Advancing a Unified Representation for a Variety of Vision Tasks" (arXiv 2311.06242),
section 3.1. Own code instead of the processor's, which passes inverted boxes through, loses letters beyond ASCII from
phrases, and rounds boxes to whole pixels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection

from handlers.caption.boxes import Grounded
from handlers.crop.window import Box

BINS = 1000
_PIECE = re.compile(r"([^<]*)((?:<loc_\d{1,6}>)+)")
_PLACE = re.compile(r"<loc_(\d{1,6})>")
_TAG = re.compile(r"</?(?:s|pad|unk|ground|obj|od|box|bbox|poly|loc_\d{1,6})>")


def grounded(raw: str, banned: Collection[str] = ()) -> tuple[tuple[Grounded, ...], int]:
    """The phrases of an answer with their boxes, and how many boxes were unusable: inverted, half, without a phrase.

    Args:
        raw: "a dog<loc_1><loc_2><loc_3><loc_4> …", other tags as they come.
        banned: phrases that stand for no thing, such as "it".
    """
    found: list[Grounded] = []
    dropped = 0
    text = re.sub(r"<(?!loc_\d{1,6}>)[^<>]{0,40}>", "", raw)
    for match in _PIECE.finditer(text):
        phrase = " ".join(match[1].split())
        places = [int(place[1]) for place in _PLACE.finditer(match[2])]
        boxes = []
        for start in range(0, len(places), 4):
            box = box_of(places[start : start + 4])
            if box is None or not phrase:
                dropped += 1
            else:
                boxes.append(box)
        if boxes and phrase not in banned:
            found.append(Grounded(phrase, tuple(boxes)))
    return tuple(found), dropped


def box_of(bins: list[int]) -> Box | None:
    """The box from the centre of a bin to the centre of another; None where it is none."""
    if len(bins) != 4 or not all(0 <= place < BINS for place in bins):
        return None
    x0, y0, x1, y1 = ((place + 0.5) / BINS for place in bins)
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def written(box: Box) -> str:
    """A box in 0..1 as the model reads it."""
    return "".join(f"<loc_{min(BINS - 1, max(0, math.floor(side * BINS + 1e-9)))}>" for side in box)


def without_locations(text: str) -> str:
    """Somebody's words, or the model's, without anything that it would take for a tag."""
    before = ""
    while before != text:  # taking one out may join two halves to another
        before, text = text, _TAG.sub(" ", text)
    return text
