"""The text of a small YAML file as plain strings, with the line of every key.

Scalars are not resolved: YAML 1.1 reads ``1e-6`` as a string, ``on`` as true and ``007`` as seven; which of these is
meant depends on the key, and only the type of the key knows. ``null``, ``~`` and nothing are the key's default.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import yaml

from sessions.documents import is_too_deep
from sessions.refusal import Refusal

_LONGEST = 64 * 1024
_DEEPEST = 3
_NULL = "tag:yaml.org,2002:null"
_HINT = "Write one 'key: value' on each line, as in train.example.yaml."
_QUOTES = str.maketrans({"“": '"', "”": '"', "„": '"', "‘": "'", "’": "'", "\u00a0": " "})


@dataclass
class Lines:
    """Where each key stands and what was written there.

    Attributes:
        numbers: path of keys → line, counted from 1.
        texts: path of keys → the value as it stands in the file.
    """

    numbers: dict[tuple[str, ...], int] = field(default_factory=dict)
    texts: dict[tuple[str, ...], str] = field(default_factory=dict)

    def of(self, *key: str) -> int | None:
        """The line of a key, or of the section around it; None when neither stands in the file."""
        while key:
            if key in self.numbers:
                return self.numbers[key]
            key = key[:-1]
        return None

    def text(self, *key: str) -> str:
        """What was written as the value of a key."""
        return self.texts.get(key, "")


class _Loader(yaml.SafeLoader):
    """SafeLoader without anchors: a few bytes of them can stand for gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            events: Any = self  # the parser's methods have no types
            mark = events.peek_event().start_mark
            raise Refusal(
                "spec", "Anchors and aliases (& and *) have no use here.", "Put the text in quotes.", mark.line + 1
            )
        return super().compose_node(parent, index)


def read_mapping(text: str) -> tuple[dict[str, Any], Lines]:
    """Read the keys and values of a YAML file whose top level is a mapping.

    Returns:
        The values (strings, lists and mappings of them; null values left out) and where they stand.

    Raises:
        Refusal: code ``spec``: it is no YAML, no mapping, too long, or a key stands there twice.
    """
    text = text.removeprefix("\ufeff")
    if len(text) > _LONGEST:
        raise Refusal("spec", "The file is far too long for settings.", _HINT)
    if is_too_deep(text):
        raise Refusal("spec", "Its brackets are nested far too deep.", _HINT)
    if text.lstrip().startswith("{\\rtf"):
        raise Refusal("spec", "This is a rich text document.", "Save it as plain text (UTF-8).", 1)
    node = _compose(text)
    lines = Lines()
    if node is None or node.tag == _NULL:
        return {}, lines
    if not isinstance(node, yaml.MappingNode):
        raise Refusal("spec", _what_is(node), _HINT, node.start_mark.line + 1)
    return _mapping(node, (), lines, text), lines


def _compose(text: str) -> yaml.Node | None:
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise Refusal(
            "spec", "The file is no text: it holds control characters.", "Save it as plain text (UTF-8).", line
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise _yaml_refusal(error, text, mark.line + 1 if mark else None) from None
    except (RecursionError, ValueError):
        raise Refusal("spec", "The file is no train.yaml.", _HINT) from None


def _yaml_refusal(error: yaml.MarkedYAMLError, text: str, line: int | None) -> Refusal:
    problem = error.problem or "it cannot be read"
    rows = text.splitlines()
    row = rows[line - 1] if line is not None and 0 < line <= len(rows) else ""
    if "\\t" in problem or row.lstrip(" ").startswith("\t"):
        return Refusal("spec", "There is a tab at the start of the line.", "Use spaces: YAML knows no tabs.", line)
    if "mapping values are not allowed" in problem:
        return Refusal(
            "spec", "There is a second colon in the line.", "One key a line; put text with a colon in quotes.", line
        )
    if "expected a single document" in problem or "expected a single document" in (error.context or ""):
        return Refusal("spec", "There is more than one document (---) in the file.", "Keep one.", line)
    if "could not find expected ':'" in problem:
        return Refusal("spec", "A line has no 'key: value'.", _HINT, max((line or 2) - 1, 1))
    return Refusal("spec", f"This is no valid YAML: {problem}.", "Look for a missing quote, bracket or space.", line)


def _what_is(node: yaml.Node) -> str:
    if isinstance(node, yaml.SequenceNode):
        return "The file is a list."
    first = (
        str(node.value).strip().splitlines()[0][:60]
        if isinstance(node, yaml.ScalarNode) and str(node.value).strip()
        else ""
    )
    if ":" in first:
        return f"'{first}' needs a space after the colon."
    return f"'{first}' is no 'key: value'."


def _mapping(node: yaml.MappingNode, path: tuple[str, ...], lines: Lines, text: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise Refusal("spec", "A key is a word, not a list or a mapping.", _HINT, line)
        key = (*path, str(key_node.value))
        if key in lines.numbers:
            raise Refusal(
                "spec", f"'{'.'.join(key)}' stands there twice (first in line {lines.numbers[key]}).", "Keep one.", line
            )
        lines.numbers[key] = line
        lines.texts[key] = text[value_node.start_mark.index : value_node.end_mark.index].strip()
        value = _value(value_node, key, lines, text)
        if value is not None:
            values[key[-1]] = value
    return values


def _value(node: yaml.Node, path: tuple[str, ...], lines: Lines, text: str) -> Any:
    if len(path) > _DEEPEST:
        raise Refusal("spec", f"'{path[0]}' is nested too deeply.", _HINT, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, path, lines, text)
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, (*path, str(index)), lines, text) for index, item in enumerate(node.value)]
    if node.tag == _NULL:
        return None
    # A phone's keyboard writes curly quotes; YAML takes them for letters.
    written = str(node.value)
    straight = written.translate(_QUOTES).strip()
    plain = isinstance(node, yaml.ScalarNode) and node.style is None
    if plain and straight != written and len(straight) > 1 and straight[0] == straight[-1] and straight[0] in "\"'":
        return straight[1:-1]
    return written
