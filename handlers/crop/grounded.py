"""Which of the boxes that a captioner grounded is the subject. Pure."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from handlers.crop.window import Box

_LARGEST = 0.85
"""A box of more of the picture's area says little."""
_SMALLEST = 0.003
_FIRST = 2.0
"""How much more the thing that a caption names first weighs: it is what the sentence is about."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_GROUND = _words(
    """background beach bed bench building bush carpet ceiling chair city cloud couch desert desk dirt door field
    fence floor flooring forest grass grassland gravel ground hill house ice kitchen lake land landscape lawn leaf
    light meadow mountain mud night ocean park path pavement plate platform pond rain river road rock roof room sand
    scene sea shadow shelf shore sidewalk sky snow soil stage stone street sun sunset surface table tree view wall
    water wave window wood woods yard"""
)
"""Nouns of what a subject stands before or on: taken only where nothing else was named."""
PEOPLE = _words(
    """actor actress adult artist baby boy bride brother businessman businesswoman child couple crowd dad daughter
    face family father female friend girl grandfather grandmother groom group guy head human kid lady male man mom
    mother person player portrait self selfie singer sister son student team teen teenager toddler woman"""
)
_WORD = re.compile(r"[^\W\d_]+(?:[-'][^\W\d_]+)*")
_PLURALS = (("ies", "y"), ("ves", "f"), ("ves", "fe"), ("es", ""), ("s", ""))
_IRREGULAR = {
    "men": "man",
    "women": "woman",
    "children": "child",
    "people": "person",
    "mice": "mouse",
    "geese": "goose",
}


@dataclass(frozen=True)
class Entity:
    """A phrase of a caption and where it was seen.

    Attributes:
        phrase: "a brown dog".
        box: in 0..1 of the upright picture.
    """

    phrase: str
    box: Box

    @property
    def area(self) -> float:
        """Its share of the picture."""
        return (self.box[2] - self.box[0]) * (self.box[3] - self.box[1])

    @property
    def noun(self) -> str:
        """What it is: the last word before "of", "with", "in" …; the main one."""
        words = words_of(re.split(r"\b(?:of|with|in|on|at|and|that|who|which)\b", self.phrase.lower())[0])
        return words[-1] if words else ""


def entities_of(values: object) -> list[Entity]:
    """The entities of a payload; what is none is left out: a caption is no reason to fail."""
    found = []
    for value in values if isinstance(values, Sequence) and not isinstance(values, str) else ():
        if not isinstance(value, Mapping):
            continue
        box = _box(value.get("box"))
        if box is not None and isinstance(phrase := value.get("phrase"), str):
            found.append(Entity(phrase, box))
    return found


def _box(value: Any) -> Box | None:
    try:
        x0, y0, x1, y1 = (min(max(float(number), 0.0), 1.0) for number in value)
    except (TypeError, ValueError, OverflowError):
        return None
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def words_of(text: str) -> list[str]:
    """The words of a text, lower case."""
    return _WORD.findall(text.lower())


def forms(word: str) -> set[str]:
    """A word and what it may be the plural of."""
    found = {word, _IRREGULAR.get(word, word)}
    if len(word) > 3:
        found |= {word.removesuffix(plural) + single for plural, single in _PLURALS if word.endswith(plural)}
    return found


def is_one_of(word: str, words: Container[str]) -> bool:
    """Whether a word, or what it is the plural of, is among others."""
    return any(form in words for form in forms(word))


def named(entities: Iterable[Entity], words: Iterable[str]) -> list[Entity]:
    """The entities whose phrase holds one of the words (a word of several: all of it), in order."""
    wanted = [parts for word in words if (parts := words_of(word))]
    return [entity for entity in entities if any(_holds(words_of(entity.phrase), parts) for parts in wanted)]


def _holds(phrase: Sequence[str], parts: Sequence[str]) -> bool:
    return any(
        len(phrase) >= start + len(parts)
        and all(forms(phrase[start + index]) & forms(part) for index, part in enumerate(parts))
        for start in range(len(phrase))
    )


def boxes_of_words(entities: Sequence[Entity], words: Iterable[str]) -> list[Box]:
    """The boxes of what the words name, largest first; none where that is nothing, or nearly the whole picture."""
    return _boxes(entity for entity in named(entities, words) if _is_sensible(entity))


def main_boxes(entities: Sequence[Entity]) -> list[Box]:
    """The boxes of what a caption is about: the largest sensible one, where the first named weighs twice.

    Things of the same name count together. What a subject stands on or before (sky, grass, a wall) does not count.
    """
    usable = [entity for entity in entities if _is_sensible(entity) and not is_one_of(entity.noun, _GROUND)]
    if not usable:
        return []
    first = usable[0].noun
    best = max(usable, key=lambda entity: entity.area * (_FIRST if forms(entity.noun) & forms(first) else 1.0))
    return _boxes(entity for entity in usable if forms(entity.noun) & forms(best.noun) and entity.area >= best.area / 6)


def _is_sensible(entity: Entity) -> bool:
    return _SMALLEST <= entity.area <= _LARGEST


def _boxes(entities: Iterable[Entity]) -> list[Box]:
    return [entity.box for entity in sorted(entities, key=lambda entity: -entity.area)]
