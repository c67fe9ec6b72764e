"""From what the model said to a line that trains: no opener, no repeats, never empty. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from handlers.caption.boxes import Grounded
from handlers.crop.window import Box
from sessions.captions import one_line

NEUTRAL = "a picture"
"""What is written where the model said nothing usable."""
_KIND = r"(?:image|photo|photograph|picture)"
_OPENER = re.compile(
    rf"^(?:describe this {_KIND}(?: in detail)?\s*:\s*|(?:this is |here is )?(?:an? |the |this )?{_KIND}"
    r"\s*(?:of|showing|shows|depicts|depicting|features|featuring)(?:\s+|$|(?=[^\w\s])))+",
    re.IGNORECASE,
)
_WORD = re.compile(r"[^\W\d_]{2,}")
_PUNCTUATION = ".,;:!?"
# Tokenizers set a space between a tag and the comma behind it.
_LOOSE = re.compile(r"\s+([.,;:!?])(?=\s|$)")
_LONGEST_REPEAT = 12


@dataclass(frozen=True)
class Entity:
    """One phrase with one box, as the sidecar has it.

    Attributes:
        phrase: the words.
        span: (first, behind the last) character of the phrase in the caption; None where it is no longer in it.
        box: (x0, y0, x1, y1) in 0..1 of the upright picture.
    """

    phrase: str
    span: tuple[int, int] | None
    box: Box

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {"phrase": self.phrase, "span": list(self.span) if self.span else None, "box": list(self.box)}


def clean(text: str) -> str | None:
    """The caption in a model's text without tags; None where nothing usable is left.

    Openers such as "An image of" go, words and phrases that repeat at once stand once, the full stop at the end goes.
    """
    line = _OPENER.sub("", _LOOSE.sub(r"\1", one_line(text.replace("\ufffd", " "))))
    line = without_repeats(line).strip(" -" + _PUNCTUATION)
    return line if _WORD.search(line) else None


def without_repeats(line: str) -> str:
    """A line in which no run of up to 12 words follows itself, case and punctuation aside."""
    words = line.split()
    before = len(words) + 1
    while len(words) < before:
        before = len(words)
        for length in range(min(_LONGEST_REPEAT, len(words) // 2), 0, -1):
            words = _collapsed(words, length)
    return " ".join(words)


def _collapsed(words: Sequence[str], length: int) -> list[str]:
    kept: list[str] = []
    for word in words:
        kept.append(word)
        if len(kept) >= 2 * length and _same(kept[-2 * length : -length], kept[-length:]):
            # The first of the two stays, with the punctuation behind the second: "a dog, a dog." is "a dog."
            first = kept[-length - 1].rstrip(_PUNCTUATION)
            ending = kept[-1][len(kept[-1].rstrip(_PUNCTUATION)) :]
            del kept[-length:]
            kept[-1] = first + ending
    return kept


def _same(first: Sequence[str], second: Sequence[str]) -> bool:
    return [_bare(word) for word in first] == [_bare(word) for word in second]


def _bare(word: str) -> str:
    return word.strip(_PUNCTUATION).casefold() or word


def place(grounded: Sequence[Grounded], caption: str) -> list[Entity]:
    """One entity a box, each with the place of its phrase in the caption; phrases are looked for in their order."""
    entities: list[Entity] = []
    behind = 0
    for item in grounded:
        span = _find(item.phrase, caption, behind) or _find(item.phrase, caption, 0)
        behind = span[1] if span else behind
        entities += [Entity(item.phrase, span, box) for box in item.boxes]
    return entities


def _find(phrase: str, caption: str, start: int) -> tuple[int, int] | None:
    if not phrase:
        return None
    pattern = re.compile(rf"(?<!\w){re.escape(phrase)}(?!\w)", re.IGNORECASE)
    match = pattern.search(caption, start)
    return match.span() if match else None
