"""What Kosmos-2 says, taken apart: plain text, phrases and their boxes, all validated.

Own code instead of the processor's post-processing, which passes inverted boxes through, loses unclosed ones, and
removes everything in angle brackets from the text, tag or not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from handlers.crop.window import Box

GRID = 32
"""Boxes are pairs of cells of a GRID × GRID raster over the whole picture."""
_TAGS = ("phrase", "/phrase", "object", "/object", "grounding", "image", "/image", "/doc", "/chunk", "/line", "s", "/s")
_TOKEN = re.compile(
    r"<patch_index_(?P<cell>\d{1,6})>|<(?P<delimiter>/delimiter_of_multi_objects/)>|<(?P<tag>" + "|".join(_TAGS) + r")>"
)


@dataclass(frozen=True)
class Grounded:
    """A phrase and where it is.

    Attributes:
        phrase: as it stands in the text, without white space around it.
        boxes: at least one.
    """

    phrase: str
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class Utterance:
    """A model's output without its tags.

    Attributes:
        text: everything it said, white space as it came.
        grounded: in the order of the text.
        dropped: how many boxes were unusable: inverted, outside the grid, half, or without a phrase.
    """

    text: str
    grounded: tuple[Grounded, ...]
    dropped: int


def parse(raw: str) -> Utterance:
    """Take a raw output apart. Any string is fine; whatever is no tag of Kosmos-2 is text."""
    text: list[str] = []
    grounded: list[Grounded] = []
    dropped = 0
    phrase: list[str] | None = None  # the pieces of an open <phrase>
    named = ""  # the phrase that just closed and may get boxes
    cells: list[int | None] | None = None  # the cells of an open <object>; None marks a delimiter
    for kind, value in _tokens(raw):
        if cells is not None and kind in ("cell", "delimiter"):
            cells.append(int(value) if kind == "cell" else None)
            continue
        if cells is not None:
            # </object>, or something that cannot stand inside one: it was never closed.
            boxes, bad = _boxes(cells)
            dropped += bad if named else bad + len(boxes)
            if named and boxes:
                grounded.append(Grounded(named, tuple(boxes)))
            cells, named = None, ""
        match kind, value:
            case "text", _:
                text.append(value)
                if phrase is not None:
                    phrase.append(value)
                elif value.strip():
                    named = ""
            case "tag", "phrase":
                phrase, named = [], ""
            case "tag", "/phrase":
                named, phrase = " ".join("".join(phrase or []).split()), None
            case "tag", "object":
                cells, phrase = [], None
            case _:  # other tags, cells outside an object
                pass
    return Utterance("".join(text), tuple(grounded), dropped)


def without_tags(text: str) -> str:
    """Somebody's words without anything that the model would take for a tag."""
    before = ""
    while before != text:  # taking one out may join two halves to another
        before, text = text, _TOKEN.sub(" ", text)
    return text


def _tokens(raw: str) -> Iterator[tuple[str, str]]:
    """("text" | "cell" | "delimiter" | "tag", value), ended by an empty tag that closes what is open."""
    place = 0
    for match in _TOKEN.finditer(raw):
        if match.start() > place:
            yield "text", raw[place : match.start()]
        place = match.end()
        yield match.lastgroup or "tag", match.group(match.lastgroup or 0)
    if place < len(raw):
        yield "text", raw[place:]
    yield "tag", ""


def _boxes(cells: list[int | None]) -> tuple[list[Box], int]:
    """The valid boxes of an object, and the number of those that are not."""
    boxes: list[Box] = []
    bad = 0
    group: list[int] = []
    for cell in [*cells, None]:
        if cell is not None:
            group.append(cell)
            continue
        for start in range(0, len(group), 2):
            box = box_of(*group[start : start + 2]) if start + 1 < len(group) else None
            if box:
                boxes.append(box)
            else:
                bad += 1
        group = []
    return boxes, bad


def box_of(upper_left: int, lower_right: int) -> Box | None:
    """The box between two cells, or None where it is inverted or leaves the grid.

    Kosmos-2's own decoding: cells count along rows from the upper left. A box that is one cell wide or high covers
    its cells to their edges; any other runs from the centre of one cell to the centre of the other.
    """
    if not (0 <= upper_left < GRID * GRID and 0 <= lower_right < GRID * GRID):
        return None
    top, left = divmod(upper_left, GRID)
    bottom, right = divmod(lower_right, GRID)
    if right < left or bottom < top:
        return None
    begin, end = (0.0, 1.0) if right == left or bottom == top else (0.5, 0.5)
    return ((left + begin) / GRID, (top + begin) / GRID, (right + end) / GRID, (bottom + end) / GRID)
