"""YAML that a person wrote, read into a pydantic model; what is wrong is told with line, reason and fix."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from sessions.refusal import Refusal

_DEEPEST = 100
ModelType = TypeVar("ModelType", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but numbers as people write them: ``1e-6`` is a number here, and it is a string to plain YAML 1.1."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def read_document(text: str, model: type[ModelType], code: str) -> ModelType:
    """Read YAML into a model. An empty document is a document without keys.

    Args:
        text: the document.
        model: the model; unknown keys must be forbidden in it for them to be refused.
        code: the refusal's code.

    Raises:
        Refusal: the text is no YAML mapping, or a key or a value is wrong; with line, reason and fix.
    """
    if is_too_deep(text):
        raise Refusal(code, "Its brackets are nested far too deep.", "Write one `key: value` a line.")
    try:
        node = yaml.compose(text, Loader=_Loader)
        value = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        raise _syntax_refusal(error, text, code) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = f"It cannot be read as YAML: {str(error).splitlines()[0]}."
        raise Refusal(code, reason, "Save it as plain UTF-8 text with lines like `key: value`.") from None
    if value is None:
        value = {}
    if not isinstance(value, dict):
        found = "a list" if isinstance(value, list) else "one value"
        raise Refusal(code, f"It holds {found} where `key: value` lines belong.", "Write one `key: value` a line.", 1)
    _refuse_doubles(node, code)
    try:
        return model.model_validate(_without_nulls(value))
    except ValidationError as error:
        raise _value_refusal(error, node, model, code) from None


def is_too_deep(text: str) -> bool:
    """Whether brackets are nested deeper than anybody writes; reading so many costs the square of their number."""
    depth = 0
    for character in text:
        if character in "[{":
            depth += 1
            if depth > _DEEPEST:
                return True
        elif character in "]}":
            depth -= 1
    return False


def _without_nulls(value: Any) -> Any:
    """A key without a value is a key that says nothing: ``watch:`` with only comments below it."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return value


def _refuse_doubles(node: Any, code: str) -> None:
    """YAML lets the last of two equal keys win, silently."""
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key, inner in node.value:
        line = key.start_mark.line + 1
        name = str(key.value)
        if name in seen:
            raise Refusal(code, f"`{name}` stands there twice (first in line {seen[name]}).", "Keep one.", line)
        seen[name] = line
        _refuse_doubles(inner, code)


def _syntax_refusal(error: yaml.MarkedYAMLError, text: str, code: str) -> Refusal:
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else None
    written = text.splitlines()[line - 1] if line and line <= len(text.splitlines()) else ""
    if "\t" in written:
        return Refusal(code, "It is indented with a tab.", "YAML wants spaces: replace the tab by two spaces.", line)
    reason = (error.problem or "it is no YAML").strip()
    return Refusal(
        code, f"It cannot be read as YAML: {reason}.", "Write `key: value`, with a space behind the colon.", line
    )


def _value_refusal(error: ValidationError, node: Any, model: type[BaseModel], code: str) -> Refusal:
    first = error.errors(include_url=False)[0]
    keys = [part for part in first["loc"] if isinstance(part, str)]
    path = _known_path(keys, node)
    line = _line_of(path, node)
    name = ".".join(path) or "the file"
    if first["type"] == "extra_forbidden" and path:
        known = sorted(_fields_at(model, path[:-1]))
        close = difflib.get_close_matches(path[-1], known, n=1)
        advice = f"Did you mean `{close[0]}`?" if close else f"Known here: {', '.join(known)}."
        return Refusal(code, f"The key `{name}` is unknown.", advice, line)
    reason = first["msg"].removeprefix("Value error, ").replace("Input should", "It should").rstrip(".")
    fix = ""
    if ". " in reason:
        reason, fix = reason.split(". ", 1)
    written = first.get("input")
    if path and not isinstance(written, Mapping | list) and first["type"] != "value_error":
        reason = f"{reason[:1].lower()}{reason[1:]}, and it says {written!r}"
    what = f"`{name}`: {reason}." if path else f"{reason}."
    advice = f"{fix.rstrip('.')}." if fix else f"Correct `{name}`, or take the line out to have the default."
    return Refusal(code, what, advice, line)


def _known_path(keys: list[str], node: Any) -> list[str]:
    """The part of pydantic's location that is written in the document; the rest names branches of a union."""
    path: list[str] = []
    for key in keys:
        child = _child(node, key)
        if child is None:
            break
        path.append(key)
        node = child[1]
    return path


def _child(node: Any, key: str) -> tuple[Any, Any] | None:
    if not isinstance(node, yaml.MappingNode):
        return None
    for key_node, value_node in node.value:
        if getattr(key_node, "value", None) == key:
            return key_node, value_node
    return None


def _line_of(path: list[str], node: Any) -> int | None:
    line = None
    for key in path:
        child = _child(node, key)
        if child is None:
            break
        line = child[0].start_mark.line + 1
        node = child[1]
    return line


def _fields_at(model: type[BaseModel], path: list[str]) -> list[str]:
    fields = model.model_fields
    for key in path:
        field = fields.get(key)
        inner = next((kind for kind in _models_in(field.annotation if field else None)), None)
        if inner is None:
            return []
        fields = inner.model_fields
    return [field.alias or name for name, field in fields.items()]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]
