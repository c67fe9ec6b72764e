"""``crop.txt``: what a person wants the crops of a session to show. Their word wins over whatever is found.

One wish a line, as people write on a phone: ``subject: dog``, ``exclude: logo``, ``IMG_1.jpg: 120 40 900 820``,
``IMG_2.jpg: 10% 5% 80% 90%``, ``IMG_3.jpg: centre``. Pure: the text in, wishes out. A line that cannot be used costs
only itself, and is told with its reason and a fix.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sessions.layout import is_picture_name
from sessions.refusal import Refusal

CODE = "wish"
"""The code of a refusal of a wish, here or by the crop of the picture that cannot fulfil it."""
SUBJECTS: dict[str, str | None] = {
    **dict.fromkeys(("face", "faces", "people", "heads"), "faces"),
    **dict.fromkeys(("centre", "center", "middle"), "centre"),
    **dict.fromkeys(("segment", "segmentation"), "segment"),
    **dict.fromkeys(("auto", "smart"), None),
}
"""Words that are no noun → what a payload calls them; None leaves the choice to fastsd."""
_BOX = re.compile(r"[\d.,;%+\-\s]*\d[\d.,;%+\-\s]*")
_NUMBER = re.compile(r"(\d+(?:\.\d+)?)(%?)")
_LONGEST_WORD = 60
_MOST_LINES = 20_000
_FORMS = "`subject: dog`, `exclude: logo`, `IMG_1.jpg: 120 40 900 820` or `IMG_1.jpg: centre`"


@dataclass(frozen=True)
class PictureWish:
    """What is wanted of one picture.

    Attributes:
        box: x0, y0, x1, y1 of the window, None where none is fixed.
        unit: of the box: ``pixels`` of the upright picture, or ``share``: 0..1 of its sides.
        subject: ``faces``, ``centre``, ``segment`` or a noun; None leaves the choice to fastsd.
    """

    box: tuple[float, float, float, float] | None = None
    unit: str = "pixels"
    subject: str | None = None


@dataclass(frozen=True)
class Wishes:
    """All wishes of a session.

    Attributes:
        subject: for every picture without a line of its own; None leaves the choice to fastsd.
        exclude: nouns that are never the subject.
        pictures: the lines of single pictures, by the name that was written, folded (``folded``).
        written: the same names as they were written, and their lines.
    """

    subject: str | None = None
    exclude: tuple[str, ...] = ()
    pictures: Mapping[str, PictureWish] = field(default_factory=dict)
    written: Mapping[str, tuple[str, int]] = field(default_factory=dict)

    def of(self, relative: str) -> dict[str, Any]:
        """The wish for one picture as a crop's payload has it; empty where there is none.

        Args:
            relative: the picture's path in the session.
        """
        if not self.pictures and not self.subject and not self.exclude:
            return {}
        line = next((self.pictures[name] for name in names_of(relative) if name in self.pictures), None)
        if line is not None and line.box is not None:
            return {"box": list(line.box), "unit": line.unit}
        subject = self.subject if line is None else line.subject
        wish: dict[str, Any] = {"subject": subject} if subject else {}
        return wish | ({"exclude": list(self.exclude)} if self.exclude and subject != "centre" else {})

    def line_of(self, relative: str) -> int | None:
        """The line about this picture alone, None where there is none."""
        return next((self.written[name][1] for name in names_of(relative) if name in self.written), None)

    def unmatched(self, relatives: list[str]) -> list[str]:
        """The names that no picture of the session has, as they were written."""
        known = {name for relative in relatives for name in names_of(relative)}
        return [self.written[name][0] for name in self.pictures if name not in known]


def folded(name: str) -> str:
    """Names that people would call the same: NFC, case folded, white space as one space."""
    return " ".join(unicodedata.normalize("NFC", name).casefold().split())


def names_of(relative: str) -> tuple[str, str, str]:
    """What a picture may be called in a wish: its path in the session, its name, its name without the ending."""
    name = relative.rsplit("/", 1)[-1]
    return folded(relative), folded(name), folded(name.rpartition(".")[0] or name)


def parse_wishes(text: str) -> tuple[Wishes, Refusal | None]:
    """Read the text of a ``crop.txt``.

    Returns:
        The wishes of all lines that can be used; and what is wrong with the first of the others, None when all can.
    """
    reader = _Reader()
    lines = text.splitlines()
    for number, line in enumerate(lines[:_MOST_LINES], 1):
        reader.read(line, number)
    if len(lines) > _MOST_LINES:
        reader.complain(_MOST_LINES + 1, "It has too many lines.", f"Write at most {_MOST_LINES:,}.")
    wishes = Wishes(reader.subject, tuple(reader.exclude), reader.pictures, reader.written)
    return wishes, _first_of(reader.problems)


def _first_of(problems: list[Refusal]) -> Refusal | None:
    if not problems:
        return None
    first, *others = problems
    advice = f"{first.advice} The other lines count."
    if others:
        places = ", ".join(str(other.line) for other in others[:5]) + (" …" if len(others) > 5 else "")
        advice += f" (Look at line {places} as well.)"
    return Refusal(first.code, first.what, advice, first.line)


class _Reader:
    """Collects wishes and problems, line by line."""

    def __init__(self) -> None:
        self.subject: str | None = None
        self.exclude: list[str] = []
        self.pictures: dict[str, PictureWish] = {}
        self.written: dict[str, tuple[str, int]] = {}
        self.problems: list[Refusal] = []
        self._subject_line = 0

    def complain(self, line: int, what: str, advice: str) -> None:
        """Note what is wrong with a line."""
        self.problems.append(Refusal(CODE, what, advice, line))

    def read(self, line: str, number: int) -> None:
        """Take one line."""
        # A full-width colon is what some keyboards have.
        bare = line.replace("：", ":").strip()
        if not bare or bare.startswith(("#", "//")):
            return
        name, colon, value = (part.strip() for part in bare.rpartition(":"))
        value = value.split(" #", 1)[0].strip()
        if not colon or not name:
            self.complain(number, f"There is no colon in `{_short(bare)}`.", _missing_colon(bare))
        elif not value:
            self.complain(number, f"`{_short(name)}:` says nothing.", f"Write {_FORMS}, or remove the line.")
        elif folded(name) == "subject":
            self._read_subject(value, number)
        elif folded(name) == "exclude":
            self._read_exclude(value, number)
        elif not is_picture_name(name) and (meant := difflib.get_close_matches(folded(name), _KEYS, 1, 0.75)):
            self.complain(number, f"There is no key `{_short(name)}`.", f"Did you mean `{meant[0]}`?")
        else:
            self._read_picture(name, value, number)

    def _read_subject(self, value: str, number: int) -> None:
        if self._subject_line:
            what = f"`subject` stands there twice (first in line {self._subject_line})."
            self.complain(number, what, "Keep one. A single picture's: `IMG_1.jpg: dog`.")
        elif _BOX.fullmatch(value):
            self.complain(number, "A box belongs to one picture.", f"Write its name in front: `IMG_1.jpg: {value}`.")
        elif (subject := self._subject(value, number)) is not None:
            self.subject, self._subject_line = subject or None, number

    def _read_exclude(self, value: str, number: int) -> None:
        for word in value.strip("[]").split(","):
            if (noun := _unquoted(word)) and (checked := self._noun(noun, number)) and checked not in self.exclude:
                self.exclude.append(checked)

    def _read_picture(self, name: str, value: str, number: int) -> None:
        name = _unquoted(name)
        key = folded(name)
        if key in self.pictures:
            what = f"`{_short(name)}` stands there twice (first in line {self.written[key][1]})."
            self.complain(number, what, "Keep one of the two lines.")
            return
        wish: PictureWish | None
        if _BOX.fullmatch(value):
            wish = self._box(value, number)
        else:
            subject = self._subject(value, number)
            wish = None if subject is None else PictureWish(subject=subject or None)
        if wish is not None:
            self.pictures[key] = wish
            self.written[key] = (name, number)

    def _subject(self, value: str, number: int) -> str | None:
        """A subject; "" leaves it to fastsd, None is none."""
        value = _unquoted(value)
        if folded(value) in SUBJECTS:
            return SUBJECTS[folded(value)] or ""
        return self._noun(value, number)

    def _noun(self, value: str, number: int) -> str | None:
        noun = folded(value)
        if len(noun) <= _LONGEST_WORD and any(character.isalpha() for character in noun):
            return noun
        self.complain(number, f"`{_short(value)}` is no word for a thing.", "Write a noun, like `dog` or `red car`.")
        return None

    def _box(self, value: str, number: int) -> PictureWish | None:
        # 1,5 is a number to some and two to others; a comma between four numbers separates.
        numbers = re.split(r"[\s,;]+", value.strip(" ,;"))
        matches = [_NUMBER.fullmatch(part) for part in numbers]
        shares = [bool(match and match[2]) for match in matches]
        if len(numbers) != 4 or None in matches:
            what = f"`{_short(value)}` is no box."
            self.complain(number, what, "Write four numbers: left, top, right and bottom, like `120 40 900 820`.")
            return None
        if any(shares) and not all(shares):
            self.complain(number, f"`{_short(value)}` mixes pixels and percent.", "Write all four with %, or none.")
            return None
        x0, y0, x1, y1 = (float(match[1]) / (100 if match[2] else 1) for match in matches if match)
        if any(shares) and max(x0, y0, x1, y1) > 1:
            self.complain(number, f"`{_short(value)}` goes beyond 100 %.", "Write four numbers from 0% to 100%.")
            return None
        if x0 >= x1 or y0 >= y1:
            what = f"`{_short(value)}` is an empty box."
            self.complain(number, what, "Write left, top, right and bottom, in this order: right is more than left.")
            return None
        return PictureWish((x0, y0, x1, y1), "share" if any(shares) else "pixels")


_KEYS = ("subject", "exclude")


def _missing_colon(line: str) -> str:
    name, _, value = line.partition(" ")
    if is_picture_name(name) or folded(name) in _KEYS:
        return f"Write `{name}: {_short(value.strip()) or 'centre'}`."
    return f"Write {_FORMS}."


def _unquoted(text: str) -> str:
    return text.strip().strip("\"'`“”‘’„").strip()


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}…"
