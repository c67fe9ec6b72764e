"""From tensors in one layout to the list of tensors in the other, in the order in which they are copied.

Every tensor of an output is a row of pieces of the input: most are one piece, OpenCLIP's and Flux's fused ones several.
So both directions, and the check of what was written, speak of the same thing: which bytes make this tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from handlers.convert.header import TensorEntry, bytes_of
from handlers.convert.keymap import Component, Match, Rule
from sessions.refusal import Refusal

if TYPE_CHECKING:
    from handlers.convert.pieces import Sources

FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Located:
    """A tensor and the file that it lies in."""

    file: Path
    tensor: TensorEntry


@dataclass(frozen=True)
class Piece:
    """Bytes of a source tensor.

    Attributes:
        file: where they lie.
        dtype: their type.
        begin, length: the range in the file.
        turned: the (rows, columns) of the source where the output has them transposed.
    """

    file: Path
    dtype: str
    begin: int
    length: int
    turned: tuple[int, int] | None = None


@dataclass(frozen=True)
class Entry:
    """One tensor of an output: its key, type and shape there, and the pieces that it is made of, in order.

    ``made``, where it is given, makes the bytes: of the pieces and more (a merged LoRA), or of no file at all.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    made: Callable[[Sources, Entry], bytes] | None = None

    @property
    def length(self) -> int:
        """Bytes in the output."""
        return bytes_of(self.dtype, self.shape)


Tensors = Mapping[str, Located]


def canonical(component: Component, tensors: Tensors) -> dict[str, Located]:
    """The tensors of a Diffusers component under their canonical names, without buffers, in the order of their bytes.

    Raises:
        Refusal: code ``source``: two names mean the same tensor.
    """
    found: dict[str, Located] = {}
    origin: dict[str, str] = {}
    tied = {other for other, _ in component.tied}
    for key, located in sorted(tensors.items(), key=lambda item: (str(item[1].file), item[1].tensor.begin)):
        name = component.current(key)
        if component.is_ignored(key) or (name in found and key in tied):
            continue
        if name in found and origin[name] not in tied:
            raise Refusal(
                "source",
                f"The tensor {component.name}/{name} stands there twice, as {origin[name]} and as {key}.",
                "Save the folder again with one library.",
            )
        found[name], origin[name] = located, key
    return found


def to_single(components: Sequence[Component], found: Mapping[str, Tensors], family: str) -> list[Entry]:
    """Every tensor of the single file, in its source's types, ordered so that each source file is read once.

    Args:
        components: the family's table.
        found: component → its tensors by canonical name; components that are left out are not in it.
        family: as it is named to people.

    Raises:
        Refusal: code ``source``: a key that the table does not know, or parts that do not fit together.
    """
    plan: dict[str, Entry] = {}
    for component in components:
        tensors = found.get(component.name, {})
        for key in tensors:
            match = component.match_diffusers(key)
            if match is None:
                raise Refusal(
                    "source",
                    f"The tensor {component.name}/{key} is not known in a model of the family {family}.",
                    "Is it a model of another family?",
                )
            if match.single not in plan:
                plan[match.single] = _joined(component, match, tensors)
    return list(plan.values())


def with_ties(components: Sequence[Component], plan: Sequence[Entry]) -> list[Entry]:
    """The plan with tied tensors under both their names: readers of single files do not tie."""
    more = {part.prefix + name: part.prefix + other for part in components for other, name in part.tied}
    have = {entry.name for entry in plan}
    return [
        *plan,
        *(
            replace(entry, name=more[entry.name])
            for entry in plan
            if entry.name in more and more[entry.name] not in have
        ),
    ]


def _joined(component: Component, match: Match, tensors: Tensors) -> Entry:
    parts = [tensors.get(part) for part in match.parts]
    label = f"{component.name}/{match.parts[0]}"
    whole = [part for part in parts if part is not None]
    if len(whole) != len(parts):
        missing = match.parts[parts.index(None)]
        raise Refusal("source", f"The tensor {component.name}/{missing} is missing.", "Copy the whole folder again.")
    first = whole[0].tensor
    if len(whole) == 1:
        return _reshaped(match.single, whole[0], match.rule, label)
    rows = sum(part.tensor.shape[0] if part.tensor.shape else 0 for part in whole)
    unit = rows // sum(match.rule.weights)
    for part, share in zip(whole, match.rule.weights, strict=True):
        fits = part.tensor.shape[:1] == (unit * share,) and part.tensor.shape[1:] == first.shape[1:]
        if not fits or part.tensor.dtype != first.dtype:
            raise Refusal("source", f"The parts of {match.single} do not fit together.", "Save the folder again.")
    return Entry(match.single, first.dtype, (rows, *first.shape[1:]), tuple(_piece(part) for part in whole))


def whole(name: str, located: Located) -> Entry:
    """A tensor as it is, under a name."""
    return Entry(name, located.tensor.dtype, located.tensor.shape, (_piece(located),))


def _piece(located: Located) -> Piece:
    tensor = located.tensor
    return Piece(located.file, tensor.dtype, tensor.begin, tensor.length)


def _reshaped(name: str, located: Located, rule: Rule, label: str) -> Entry:
    """A tensor that has one counterpart, as it is written into the single file."""
    shape = located.tensor.shape
    if rule.form == "ones" and len(shape) == 2:
        return Entry(name, located.tensor.dtype, (*shape, 1, 1), (_piece(located),))
    return _moved(name, located, rule, label)


def _moved(name: str, located: Located, rule: Rule, label: str) -> Entry:
    """The forms that are their own inverse."""
    tensor, piece = located.tensor, _piece(located)
    if rule.form == "transposed" and len(tensor.shape) == 2:
        rows, columns = tensor.shape
        return Entry(name, tensor.dtype, (columns, rows), (replace(piece, turned=(rows, columns)),))
    if rule.form == "halves":
        if not tensor.shape or tensor.shape[0] % 2:
            raise Refusal("source", f"{label} cannot be halved.", "Save the model again.")
        half = piece.length // 2
        front = replace(piece, length=half)
        return Entry(name, tensor.dtype, tensor.shape, (replace(front, begin=piece.begin + half), front))
    return Entry(name, tensor.dtype, tensor.shape, (piece,))


def to_components(components: Sequence[Component], tensors: Tensors) -> tuple[dict[str, list[Entry]], list[str]]:
    """Every tensor of the Diffusers components, by canonical name, in its source's type.

    Args:
        components: the family's table.
        tensors: those of the single file.

    Returns:
        Component → its tensors (only components of which there are any), and the keys that belong to none.

    Raises:
        Refusal: code ``source``: a tensor cannot be divided into its parts.
    """
    found: dict[str, dict[str, Entry]] = {}
    unknown = []
    for key, located in sorted(tensors.items(), key=lambda item: item[1].tensor.begin):
        if any(component.is_dropped(key) for component in components):
            continue
        component, match = _owner(components, key)
        if component is None or match is None:
            unknown.append(key)
            continue
        if component.is_ignored(key):
            continue
        entries = found.setdefault(component.name, {})
        for entry in _divided(component, match, located):
            name = component.current(entry.name)
            if name not in entries or entry.name == name:
                entries[name] = replace(entry, name=name)
    return {name: list(entries.values()) for name, entries in found.items()}, unknown


def _owner(components: Sequence[Component], key: str) -> tuple[Component, Match] | tuple[None, None]:
    for component in components:
        match = component.match_single(key)
        if match:
            return component, match
    return None, None


def _divided(component: Component, match: Match, located: Located) -> list[Entry]:
    tensor, rule = located.tensor, match.rule
    label = match.single
    if len(match.parts) == 1:
        shape = tensor.shape
        if rule.form == "ones" and len(shape) == 4 and shape[2:] == (1, 1):
            return [Entry(match.parts[0], tensor.dtype, shape[:2], (_piece(located),))]
        return [_moved(match.parts[0], located, rule, label)]
    total = sum(rule.weights)
    if not tensor.shape or tensor.shape[0] % total:
        raise Refusal(
            "source",
            f"{label} does not divide into the {len(match.parts)} parts of {component.name}.",
            "Is it a model of another family?",
        )
    unit, begin, entries = tensor.shape[0] // total, tensor.begin, []
    for part, share in zip(match.parts, rule.weights, strict=True):
        shape = (unit * share, *tensor.shape[1:])
        length = bytes_of(tensor.dtype, shape)
        entries.append(Entry(part, tensor.dtype, shape, (Piece(located.file, tensor.dtype, begin, length),)))
        begin += length
    return entries


def as_type(plan: Sequence[Entry], dtype: str | None) -> list[Entry]:
    """The plan with all floating tensors in one type; None keeps each. Types below 16 bits stay."""
    return [replace(entry, dtype=dtype) if dtype and entry.dtype in FLOATS else entry for entry in plan]
