"""What people want of the lines that train: words left out, the token in the subject's place, words around. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast, get_args

from handlers.caption.clean import Entity, clean
from handlers.train.prompts import head_noun
from sessions.captions import one_line

Concept = Literal["object", "face", "style"]
_PERSONS = frozenset(
    {
        "person",
        "man",
        "woman",
        "boy",
        "girl",
        "child",
        "kid",
        "baby",
        "guy",
        "lady",
        "gentleman",
        "male",
        "female",
        "face",
    }
)


@dataclass(frozen=True)
class Rules:
    """How a clean caption becomes the line that is written.

    Attributes:
        prefix: before the line, with a space between.
        suffix: behind it; what begins with a punctuation mark follows at once.
        drop: words and phrases that are left out.
        never: words that the model must not say.
        instance: the token; empty: the line names none.
        noun: the class of the subject; empty: whatever is largest in the picture.
        concept: what the token stands for. For ``object`` and ``face``, "instance class" takes the subject's place,
            once; for ``style`` the line ends with ", in the style of instance".
    """

    prefix: str = ""
    suffix: str = ""
    drop: tuple[str, ...] = ()
    never: tuple[str, ...] = ()
    instance: str = ""
    noun: str = ""
    concept: Concept = "object"

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> Rules:
        """Read the keys of a payload, whose ``class`` is the noun.

        Raises:
            ValueError: the concept is none.
        """
        concept = value.get("concept") or "object"
        if concept not in get_args(Concept):
            message = f"there is no concept {concept!r}"
            raise ValueError(message)
        return cls(
            prefix=one_line(value.get("prefix") or ""),
            suffix=one_line(value.get("suffix") or ""),
            drop=tuple(value.get("drop") or ()),
            never=tuple(value.get("blacklist") or ()),
            instance=one_line(value.get("instance") or ""),
            noun=one_line(value.get("class") or ""),
            concept=cast("Concept", concept),
        )

    @property
    def subject(self) -> str:
        """Token and class: "zwx dog"."""
        return f"{self.instance} {self.noun}".strip()


@dataclass(frozen=True)
class Line:
    """A caption on its way.

    Attributes:
        text: one line.
        entities: phrases and boxes, their spans in ``text``.
        edits: what was done to it, a few words each.
    """

    text: str
    entities: tuple[Entity, ...]
    edits: tuple[str, ...] = field(default=())


def applied(text: str, entities: Sequence[Entity], rules: Rules) -> Line | None:
    """The line that is written; None where nothing is left of it.

    Args:
        text: a clean caption.
        entities: with their spans in it.
        rules: what people want.
    """
    line = without(Line(text, tuple(entities)), rules.drop)
    if line is None:
        return None
    if rules.instance:
        line = named(line, rules.subject, rules.noun, rules.concept)
    return _around(line, rules.prefix, rules.suffix)


def without(line: Line, drop: Sequence[str]) -> Line | None:
    """A line without some words and phrases, whole ones, case aside; None where no word is left."""
    text = line.text
    gone = []
    for words in drop:
        pattern = re.compile(rf"(?<!\w){re.escape(one_line(words))}(?!\w)", re.IGNORECASE)
        if one_line(words) and pattern.search(text):
            text = pattern.sub(" ", text)
            gone.append(words)
    if not gone:
        return line
    cleaned = clean(text)
    if cleaned is None:
        return None
    return Line(cleaned, _found_again(line.entities, cleaned), (*line.edits, f"left out: {', '.join(gone)}"))


def named(line: Line, subject: str, noun: str, concept: str) -> Line:
    """The line with the token in it, once.

    A line that says it already stays. For a style it is put at the end. Else it takes the place of the subject: of the
    phrase with the largest box among those whose noun is the class, or of the largest of all where there is no class;
    where no phrase is the subject it is put in front.

    Args:
        line: without the token.
        subject: token and class.
        noun: the class.
        concept: what the token stands for.
    """
    if re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", line.text, re.IGNORECASE):
        return line
    if concept == "style":
        return _grown(line, "", f", in the style of {subject}", "style named")
    place = _subject(line.entities, noun, concept)
    if place is None or place.span is None:
        return _grown(line, f"{subject}, ", "", "token put in front")
    begin, end = place.span
    text = line.text[:begin] + subject + line.text[end:]
    longer = len(subject) - (end - begin)
    moved = []
    for entity in line.entities:
        span = entity.span
        if span is not None and span == place.span:
            span = (begin, begin + len(subject))
        elif span is not None and span[0] >= end:
            span = (span[0] + longer, span[1] + longer)
        elif span is not None and span[1] > begin:
            span = None
        moved.append(replace(entity, span=span))
    edit = f"{line.text[begin:end]!r} became {subject!r}"
    return Line(text, tuple(moved), (*line.edits, edit))


def placed(caption: str, entities: Sequence[Mapping[str, Any]], subject: str, noun: str, concept: str) -> str:
    """A generated caption as it trains: the token in the subject's place, where its phrases are known.

    Args:
        caption: the line.
        entities: as a caption's record has them (``Entity.to_json``); spans that do not fit the line do not count.
        subject: token and class.
        noun: the class.
        concept: what the token stands for.
    """
    known = []
    for entity in entities:
        begin, end = entity.get("span") or (0, 0)
        if caption[begin:end].casefold() == str(entity["phrase"]).casefold() != "":
            x0, y0, x1, y1 = entity["box"]
            known.append(Entity(entity["phrase"], (begin, end), (x0, y0, x1, y1)))
    if concept == "style" or _subject(known, noun, concept) is None:
        return caption
    return named(Line(caption, tuple(known)), subject, noun, concept).text


def _subject(entities: Sequence[Entity], noun: str, concept: str) -> Entity | None:
    there = [entity for entity in entities if entity.span is not None]
    if noun or concept == "face":
        there = [entity for entity in there if _is_a(entity.phrase, noun, concept)]
    return max(there, key=lambda entity: _area(entity.box), default=None)


def _is_a(phrase: str, noun: str, concept: str) -> bool:
    head = head_noun(phrase)
    wanted = noun.casefold()
    persons = wanted in _PERSONS or (concept == "face" and not wanted)
    return bool(head) and (head == wanted or (persons and head in _PERSONS) or phrase.casefold().endswith(f" {wanted}"))


def _area(box: tuple[float, float, float, float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _around(line: Line, prefix: str, suffix: str) -> Line:
    before = f"{prefix} " if prefix else ""
    after = suffix if not suffix or suffix[0] in ".,;:!?" else f" {suffix}"
    return _grown(line, before, after, None) if before or after else line


def _grown(line: Line, before: str, after: str, edit: str | None) -> Line:
    moved = tuple(
        replace(entity, span=(entity.span[0] + len(before), entity.span[1] + len(before)) if entity.span else None)
        for entity in line.entities
    )
    return Line(f"{before}{line.text}{after}", moved, (*line.edits, edit) if edit else line.edits)


def _found_again(entities: Sequence[Entity], text: str) -> tuple[Entity, ...]:
    found: list[Entity] = []
    places: dict[str, tuple[int, int] | None] = {}
    behind = 0
    for entity in entities:
        if entity.phrase not in places:
            pattern = re.compile(rf"(?<!\w){re.escape(entity.phrase)}(?!\w)", re.IGNORECASE)
            match = pattern.search(text, behind) or pattern.search(text)
            places[entity.phrase] = match.span() if match else None
            behind = match.end() if match else behind
        found.append(replace(entity, span=places[entity.phrase]))
    return tuple(found)
