"""What the model answers to questions about a picture, as the sidecar has it. Pure."""

from __future__ import annotations

from typing import Any

from handlers.caption.boxes import parse
from handlers.caption.clean import clean, place
from handlers.caption.prompts import Question
from handlers.caption.speaking import Spoken
from sessions.captions import one_line


def answered(question: Question, prompt: str, said: Spoken) -> dict[str, Any]:
    """A question with its answer: ``kind``, what was asked, ``prompt``, ``raw``, ``answer`` and ``entities``.

    For ``ground`` the entities are where the phrase is (none: the model did not find it), and ``answer`` is empty. The
    box of ``refer`` is the person's, not the model's, and is not among the entities.
    """
    if question.kind == "ground":
        # The phrase stands in the prompt, its boxes behind it; what the model says about other things does not count.
        first = parse(said.raw).grounded[:1]
        entities = [entity for entity in place(first, "") if entity.phrase == first[0].phrase]
        text = ""
        if not one_line(said.answer).startswith("<object>"):
            entities = []
    else:
        utterance = parse(said.answer)
        text = clean(utterance.text) or ""
        entities = place(utterance.grounded, text)
    return {
        **question.to_json(),
        "prompt": prompt,
        "raw": said.raw,
        "answer": text,
        "entities": [entity.to_json() for entity in entities],
    }
