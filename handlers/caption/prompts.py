"""What Kosmos-2 can be asked, as the prompts that it was taught. Pure.

Peng et al., "Kosmos-2: Grounding Multimodal Large Language Models to the World" (arXiv 2306.14824), section 4; the
wording is that of the published checkpoint's card.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from handlers.caption.boxes import GRID, without_tags
from handlers.crop.window import Box
from sessions.captions import one_line
from sessions.refusal import Refusal

Mode = Literal["brief", "detailed"]
QuestionKind = Literal["ask", "ground", "refer"]
_GROUNDING = "<grounding>"
BRIEF = "<grounding>An image of"
"""The prompt that Kosmos-2 was taught short grounded captions with."""
DETAILED = "<grounding>Describe this image in detail:"
MODES: Mapping[str, str] = {"brief": BRIEF, "detailed": DETAILED}
# A brief caption is done long before; a detailed one is a paragraph with boxes.
MOST_TOKENS: Mapping[str, int] = {"brief": 64, "detailed": 192}
QUESTION_TOKENS = 48


@dataclass(frozen=True)
class Question:
    """One thing to ask about a picture besides its caption.

    Attributes:
        kind: ``ask`` (a question), ``ground`` (where is this phrase?), ``refer`` (what is in this box?).
        text: the question or the phrase; for ``refer`` empty.
        box: for ``refer``: (x0, y0, x1, y1) in 0..1.
    """

    kind: QuestionKind
    text: str = ""
    box: Box | None = None

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> Question:
        """Read what ``to_json`` wrote. Raises ``KeyError``, ``TypeError`` or ``ValueError`` where it is none."""
        box = value.get("box")
        if box is None:
            return cls(value["kind"], str(value.get("text") or ""))
        x0, y0, x1, y1 = (float(side) for side in box)
        return cls(value["kind"], str(value.get("text") or ""), (x0, y0, x1, y1))

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {"kind": self.kind, "text": self.text, "box": list(self.box) if self.box else None}

    def prompt(self) -> str:
        """The prompt.

        Raises:
            Refusal: it asks nothing, or the box is none.
        """
        words = one_line(without_tags(self.text))
        if self.kind == "refer":
            first, last = cells_of(self.box)
            return (
                f"<grounding><phrase> It</phrase><object><patch_index_{first:04d}><patch_index_{last:04d}></object> is"
            )
        if not words:
            raise Refusal("question", "The question is empty.", "Write what you want to know about the picture.")
        if self.kind == "ground":
            return f"<grounding><phrase> {words}</phrase>"
        return f"<grounding>Question: {words} Answer:"


def caption_prompt(mode: str, own: str | None) -> tuple[str, int]:
    """The prompt of a caption, and how many tokens it may take.

    Args:
        mode: a key of ``MODES``.
        own: a person's prompt, which stands in the mode's place; boxes are asked for unless it says how itself.

    Raises:
        Refusal: there is no such mode, or the prompt holds a picture.
    """
    if mode not in MODES:
        raise Refusal("mode", f"There is no mode {mode!r}.", f"Choose one of: {', '.join(MODES)}.")
    if not own or not own.strip():
        return MODES[mode], MOST_TOKENS[mode]
    words = one_line(own)
    if re.search(r"</?image>|</?s>", words):
        raise Refusal("prompt", "The prompt holds a tag of a picture.", "Leave <image> out: fastsd puts it there.")
    return (words if words.startswith(_GROUNDING) else f"{_GROUNDING}{words}"), MOST_TOKENS[mode]


def is_instruction(prompt: str) -> bool:
    """Whether a prompt is no part of the caption that follows it: "Describe this:", "Question: … Answer:"."""
    return prompt.rstrip().endswith((":", "?"))


def cells_of(box: Box | None) -> tuple[int, int]:
    """The two cells of the model's raster that hold a box's corners.

    Raises:
        Refusal: it is no box in 0..1.
    """
    if box is None or not all(map(math.isfinite, box)) or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        advice = "Write left, top, right, bottom in parts of the picture, like 0.1,0.2,0.5,0.9."
        raise Refusal("box", f"{box} is no box.", advice)
    # The exact inverse of ``boxes.box_of`` for boxes that came from there; the edge 1.0 belongs to the last cell.
    left, top = (min(GRID - 1, math.floor(side * GRID + 1e-9)) for side in box[:2])
    right, bottom = (max(0, math.ceil(side * GRID - 1e-9) - 1) for side in box[2:])
    return top * GRID + left, bottom * GRID + right
