"""Where a picture's subject is: a wish, faces, what the caption grounded, a network's mask, what stands out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from PIL import Image

from handlers.crop import grounded
from handlers.crop.faces import FaceFinder, head_of, main_heads, overlap
from handlers.crop.foreground import ForegroundFinder
from handlers.crop.grounded import Entity
from handlers.crop.saliency import salient_box
from handlers.crop.segment import NetworkFile, SegmentError, SegmentFinder, mask_box
from handlers.crop.window import Box
from handlers.crop.wish import CENTRE, FACES, SEGMENT, Wish
from handlers.models import segments

Finding = Literal["face", "grounded", "segment", "saliency", "centre"]
_FACE_WORDS = frozenset({"face", "head"})
_INSIDE = 0.6
_NO_NETWORK = "There is no salient-object network here: the subject was looked for by other means."


@dataclass(frozen=True)
class Subject:
    """What was found.

    Attributes:
        finding: how it was found, the most trusted way first.
        boxes: where, largest first; empty for ``centre``.
        warning: a sentence where a wish could not be met; "" else.
        problem: why the salient-object network could not be asked, and what helps; "" where it was, or need not be.
    """

    finding: Finding
    boxes: tuple[Box, ...]
    warning: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Clues:
    """What is known of a picture beside its pixels.

    Attributes:
        entities: what its caption grounded.
        words: what its session is about (class and instance nouns), perhaps nothing.
        wish: of a person.
        network: the salient-object network that is asked where nothing surer is known, if one is here.
    """

    entities: Sequence[Entity] = ()
    words: Sequence[str] = ()
    wish: Wish = field(default_factory=Wish)
    network: NetworkFile | None = None


class Finders:
    """The detectors, loaded once."""

    def __init__(self) -> None:
        self.faces = FaceFinder()
        self.foreground = ForegroundFinder()
        self.segments = SegmentFinder()

    def give_buffers_up(self) -> None:
        """Load the small ones anew: they keep the buffers of the largest picture that they saw, some 50 MB."""
        self.faces = FaceFinder()
        self.foreground = ForegroundFinder()


def find_subject(image: Image.Image, finders: Finders, clues: Clues | None = None) -> Subject:
    """The subject of an upright RGB picture of any scale.

    In order of trust: what a person named; the thing that the session is about, if it is no person and the caption
    grounded it; faces, each widened to its head (people far in the background of a large one do not count); what the
    caption is about; what a salient-object network shows; what stands out; the centre. Who wishes for ``segment`` gets
    the network's answer at once.
    """
    clues = clues or Clues()
    wish = clues.wish
    excluded = [entity.box for entity in grounded.named(clues.entities, wish.exclude)]
    entities = [entity for entity in clues.entities if entity.box not in excluded]
    warning = ""
    if wish.subject == CENTRE:
        return Subject("centre", ())
    if wish.subject not in ("", FACES, SEGMENT):
        if boxes := grounded.boxes_of_words(entities, [wish.subject]):
            return Subject("grounded", tuple(boxes))
        warning = f"The caption shows no {wish.subject}: the subject was looked for by other means."
    if wish.subject != SEGMENT:
        things = [
            word
            for word in clues.words
            if not any(grounded.is_one_of(w, grounded.PEOPLE) for w in grounded.words_of(word))
        ]
        if wish.subject != FACES and (boxes := grounded.boxes_of_words(entities, things)):
            return Subject("grounded", tuple(boxes), warning)
        heads = _heads(image, finders, excluded, wish)
        if heads:
            return Subject("face", tuple(heads), warning)
        if wish.subject == FACES:
            warning = "No face was found: the subject was looked for by other means."
        boxes = grounded.boxes_of_words(entities, clues.words) or grounded.main_boxes(entities)
        if boxes:
            return Subject("grounded", tuple(boxes), warning)
    box, problem = _segmented(image, finders, excluded, clues)
    if box is not None:
        return Subject("segment", (box,), warning)
    box = salient_box(image, finders.foreground.of(image), excluded)
    if box is not None:
        return Subject("saliency", (box,), warning, problem)
    return Subject("centre", (), warning, problem)


def _segmented(image: Image.Image, finders: Finders, excluded: Sequence[Box], clues: Clues) -> tuple[Box | None, str]:
    """What the network shows, and what is to be said where it was wished for or tried in vain."""
    if clues.network is None:
        return None, f"{_NO_NETWORK} {segments.ADVICE}" if clues.wish.subject == SEGMENT else ""
    try:
        return mask_box(finders.segments.mask(image, clues.network), image.size, excluded), ""
    except SegmentError as error:
        return None, f"{error}. The subject was looked for by other means."


def _heads(image: Image.Image, finders: Finders, excluded: Sequence[Box], wish: Wish) -> list[Box]:
    """The heads of the people whom nobody left out."""
    if any(grounded.is_one_of(word, _FACE_WORDS) for phrase in wish.exclude for word in grounded.words_of(phrase)):
        return []
    faces = finders.faces.faces(image)
    return main_heads([head_of(face) for face in faces if all(overlap(face, box) < _INSIDE for box in excluded)])
