"""Words that a translation must not touch: the token that stands for the subject. Pure.

A model is given the whole line first, token and all: it then knows the sentence. Where it loses the token, doubles it
or changes a letter of it, what stands around the token is translated in parts, and the token is set between them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from sessions.captions import one_line

How = Literal["", "kept", "around", "in front"]
_CLOSING = ".,;:!?"


@dataclass(frozen=True)
class Translated:
    """A line in another language.

    Attributes:
        text: one line.
        how: what became of the protected words: "" (there were none), ``kept`` (the model left them alone), ``around``
            (only what stands around them was translated), ``in front`` (likewise, and nothing stood before them).
    """

    text: str
    how: How


def translated(
    lines: Sequence[str], words: Sequence[str], translate: Callable[[Sequence[str]], Sequence[str]]
) -> list[Translated]:
    """Translate lines; each protected word of a line stands in its translation as often, as it is, in this order.

    Args:
        lines: one line each.
        words: what must stay; a phrase stands for its words.
        translate: texts in, as many texts out.
    """
    lines = [one_line(line) for line in lines]
    pattern = _pattern(words)
    found = [one_line(text) for text in translate(lines)]
    if pattern is None:
        return [Translated(text, "") for text in found]
    tokens = [_tokens(pattern, line) for line in lines]
    lost = [index for index, text in enumerate(found) if _tokens(pattern, text) != tokens[index] or not text]
    pieces = {index: [one_line(piece) for piece in pattern.split(lines[index])] for index in lost}
    parts = list(dict.fromkeys(piece for index in lost for piece in pieces[index] if _says_something(piece)))
    known = dict(zip(parts, translate(parts), strict=True)) if parts else {}
    results = []
    for index, text in enumerate(found):
        how: How = "kept" if tokens[index] else ""
        if index in pieces and tokens[index]:
            around = [_without(pattern, one_line(known.get(piece, piece))) for piece in pieces[index]]
            text = _joined(pattern, around, tokens[index])
            how = "around" if around[0] else "in front"
        elif index in pieces:
            text = _without(pattern, text)  # the model said a token that is none of this line's
        results.append(Translated(text, how))
    return results


def _pattern(words: Sequence[str]) -> re.Pattern[str] | None:
    """Any of the words, whole, whatever their case; the longest first."""
    single = {word for phrase in words for word in one_line(phrase).split()}
    if not single:
        return None
    ordered = sorted(single, key=lambda word: (-len(word), word))
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, ordered))})(?!\w)", re.IGNORECASE)


def _tokens(pattern: re.Pattern[str], text: str) -> list[str]:
    return pattern.findall(text)


def _says_something(piece: str) -> bool:
    return any(character.isalnum() for character in piece)


def _without(pattern: re.Pattern[str], text: str) -> str:
    before = ""
    while before != text:  # taking one out may join what stood around it
        before, text = text, one_line(pattern.sub(" ", text))
    return text


def _joined(pattern: re.Pattern[str], around: Sequence[str], tokens: Sequence[str]) -> str:
    """The parts with a token between each two of them. No token has a space in it, and no part has a token."""
    pieces = [around[0]]
    for token, part in zip(tokens, around[1:], strict=True):
        pieces += [token, part]
    loose = " ".join(piece for piece in pieces if piece)
    tight = loose
    for mark in _CLOSING:
        tight = tight.replace(f" {mark}", mark)
    return tight if _tokens(pattern, tight) == list(tokens) else loose
