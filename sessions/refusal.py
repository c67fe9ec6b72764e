"""A refusal: what is wrong with a file that a person put there, and what the person can do about it."""

from __future__ import annotations

from typing import Any


class Refusal(Exception):  # noqa: N818 - the word the people of this project use
    """The input is at fault. It is told beside the file, once, and everything else goes on.

    Attributes:
        code: a short word for programs: ``empty``, ``corrupt``, ``too-large``, ``spec`` …
        what: one sentence: what happened.
        advice: one sentence: what to do.
        line: the line in the file, counted from 1, where there is one.
    """

    def __init__(self, code: str, what: str, advice: str, line: int | None = None) -> None:
        super().__init__(what)
        self.code = code
        self.what = what
        self.advice = advice
        self.line = line

    def __str__(self) -> str:
        place = f"line {self.line}: " if self.line else ""
        return f"{place}{self.what} {self.advice}".strip()

    def to_json(self) -> dict[str, Any]:
        """The refusal as JSON values, to cross a process border."""
        return {"code": self.code, "what": self.what, "advice": self.advice, "line": self.line}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Refusal:
        """The inverse of ``to_json``."""
        return cls(value["code"], value["what"], value["advice"], value.get("line"))
