"""``train.yaml`` read: its text becomes a ``TrainSpec``, or a ``Refusal`` with the line, the reason and the fix.

The keys are in ``spec_model``, what makes no sense together in ``spec_rules``.
"""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import ValidationError

from sessions.layout import SPEC_NAMES
from sessions.refusal import Refusal
from sessions.spec_model import LoraSpec, PriorSpec, Section, TextEncoderSpec, TrainSpec, UNetSpec
from sessions.spec_rules import refuse_combinations
from sessions.spec_text import Lines, read_mapping

__all__ = ["SPEC_NAMES", "TrainSpec", "json_schema", "parse_spec"]


def parse_spec(text: str) -> TrainSpec:
    """Read the text of a ``train.yaml``. An empty file, or one of comments alone, is the defaults.

    Raises:
        Refusal: code ``spec``: with the line, what is wrong there and what to write instead.
    """
    values, lines = read_mapping(text)
    try:
        spec = TrainSpec.model_validate(values)
    except ValidationError as error:
        raise _refusal(error, lines) from None
    refuse_combinations(spec, lines)
    return spec


def json_schema() -> dict[str, Any]:
    """The JSON Schema of ``train.yaml``, for editors."""
    schema = TrainSpec.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "fastsd train.yaml"}


def _refusal(error: ValidationError, lines: Lines) -> Refusal:
    """The first complaint in the order of the file, with a count of the others."""
    places: dict[tuple[str, ...], str] = {}
    for problem in error.errors(include_url=False, include_input=False):
        key, unknown = _key_of(problem["loc"], problem["type"])
        places.setdefault(key, "unknown" if unknown else "value")
    ordered = sorted(places, key=lambda key: lines.of(*key) or 0)
    key = ordered[0]
    what, advice = _unknown(key) if places[key] == "unknown" else _bad_value(key, lines)
    if len(ordered) > 1:
        others = ", ".join(str(lines.of(*other)) for other in ordered[1:6])
        advice += f" (Look at line {others} as well.)"
    return Refusal("spec", what, advice, lines.of(*key))


def _key_of(location: tuple[int | str, ...], kind: str) -> tuple[tuple[str, ...], bool]:
    """The key of the file that an error is about: pydantic's location also names members of unions and list items."""
    first = str(location[0]) if location else ""
    section = _sections().get(first)
    depth = 1
    if section is not None and len(location) > 1 and (location[1] in section.model_fields or kind == "extra_forbidden"):
        depth = 2
    return tuple(str(part) for part in location[:depth]), kind == "extra_forbidden"


def _sections() -> dict[str, type[Section]]:
    return {"text_encoder": TextEncoderSpec, "unet": UNetSpec, "lora": LoraSpec, "prior": PriorSpec}


def _names(model: type[Section]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


# Words that other trainers use, and where the same thing stands here.
_ELSEWHERE = {
    "steps": "unet: {steps: 1500}",
    "max_train_steps": "unet: {steps: 1500}",
    "epochs": 'unet: {steps: "150/image"}',
    "learning_rate": "unet: {learning_rate: 2e-6}",
    "lr": "unet: {learning_rate: 2e-6}",
    "token": "instance",
    "trigger": "instance",
    "instance_prompt": "instance",
    "subject": "class",
    "model": "base",
    "checkpoint": "base",
    "size": "resolution",
    "rank": "lora: {rank: 16}",
    "resume": "continue",
}


def _unknown(key: tuple[str, ...]) -> tuple[str, str]:
    *parents, word = key
    model = _sections()[parents[0]] if parents else TrainSpec
    known = _names(model)
    within = f" in {parents[0]}" if parents else ""
    what = f"There is no key '{word}'{within}."
    close = difflib.get_close_matches(word.casefold().replace("-", "_"), known, n=1, cutoff=0.6)
    if close:
        return what, f"Did you mean '{close[0]}'?"
    if not parents and word.casefold() in _ELSEWHERE:
        return what, f"Write '{_ELSEWHERE[word.casefold()]}' instead."
    return what, f"The keys are: {', '.join(known)}."


def _bad_value(key: tuple[str, ...], lines: Lines) -> tuple[str, str]:
    model: type[Section] = _sections()[key[0]] if len(key) == 2 else TrainSpec
    fields = {field.alias or name: field for name, field in model.model_fields.items()}
    field = fields.get(key[-1])
    written = lines.text(*key)
    shown = written if len(written) <= 60 else written[:57] + "…"
    return f"'{'.'.join(key)}: {shown}' cannot be.", f"Write {field.description if field else 'something else'}."
