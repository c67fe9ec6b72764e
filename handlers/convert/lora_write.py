"""A LoRA converted to another layout, and a LoRA merged into a model; each proven before it has its name."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from handlers.convert.ask import Progress, check_room, counted, dtype_of, silent
from handlers.convert.checkpoint import write_checkpoint
from handlers.convert.families import FAMILIES, Family
from handlers.convert.header import read_header
from handlers.convert.keymap import Match
from handlers.convert.lora import Lora, Pair, read_lora
from handlers.convert.lora_layout import Layout, adapter_metadata, plan_lora
from handlers.convert.pieces import Sources, exactly
from handlers.convert.plan import Entry, Located, as_type, to_single, whole, with_ties
from handlers.convert.recognise import read_single
from handlers.convert.single import modelspec, read_folder
from handlers.convert.source import read_pipeline, tensors_of
from handlers.convert.verify import Unproven
from handlers.convert.write import write_safetensors
from sessions import files
from sessions.refusal import Refusal

if TYPE_CHECKING:
    from numpy import float32
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Written:
    """What was made of LoRAs.

    Attributes:
        output: the file.
        family: of the model.
        modules: how many modules they change.
        bytes: of the file.
        seconds: how long it took.
    """

    output: Path
    family: str | None
    modules: int
    bytes: int
    seconds: float


def convert_lora(source: Path, output: Path, layout: Layout, family: str | None = None) -> Written:
    """Convert a LoRA to another layout. The values are copied; only names, and where alpha stands, change.

    Args:
        source: a ``.safetensors`` file or a peft folder.
        output: the ``.safetensors`` file to make.
        layout: ``kohya`` or ``diffusers``.
        family: sd1, sd2 or sdxl, where the file does not tell.

    Raises:
        Refusal: the source cannot be converted.
        Unproven: what was written is not the source; it was removed.
        OSError: reading or writing failed.
    """
    began = time.monotonic()
    if output.suffix != ".safetensors":
        raise Refusal("output", f"{output.name} is no .safetensors file.", "Give the output the ending .safetensors.")
    lora = read_lora(source)
    plan = plan_lora(lora, layout, family)
    check_room(output.parent, sum(entry.length for entry in plan))
    metadata = {"format": "pt", **lora.metadata}
    if layout == "diffusers":
        metadata["lora_adapter_metadata"] = adapter_metadata(lora.pairs)
    with files.atomic_path(output) as temporary:
        write_safetensors(temporary, plan, metadata, lambda _count: None)
        _prove_same(lora, read_lora(temporary))
        size = temporary.stat().st_size
    return Written(output, family or lora.family, len(lora.pairs), size, time.monotonic() - began)


def _prove_same(wanted: Lora, made: Lora) -> None:
    """Every pair is there, with its alpha and all its bytes."""
    have = {pair.module: pair for pair in made.pairs}
    if have.keys() != {pair.module for pair in wanted.pairs}:
        raise Unproven("the written LoRA has other modules than its source")
    with Sources() as sources:
        for pair in wanted.pairs:
            other = have[pair.module]
            if pair.alpha != other.alpha:
                raise Unproven(f"the alpha of {pair.module.path} is {other.alpha}, not {pair.alpha}")
            for left, right in ((pair.down, other.down), (pair.up, other.up)):
                a, b = left.tensor, right.tensor
                one = exactly(sources.descriptor(left.file), a.begin, a.length)
                two = exactly(sources.descriptor(right.file), b.begin, b.length)
                if (a.dtype, a.shape, one) != (b.dtype, b.shape, two):
                    raise Unproven(f"{pair.module.path} does not hold the values of its source")


def merge_loras(
    base: Path,
    loras: Sequence[tuple[Path, float]],
    output: Path,
    *,
    dtype: str | None = None,
    progress: Progress = silent,
) -> Written:
    """Write a model with LoRAs merged into it: ``W + weight · alpha / rank · up @ down``, added up in float32.

    Args:
        base: a Diffusers folder, or one file.
        loras: (LoRA, weight) in order.
        output: the file to make, ``.safetensors`` or ``.ckpt``.
        dtype: fp32, fp16 or bf16; None keeps each tensor's type.
        progress: called with (bytes done, bytes in all, what is done); may raise to stop.

    Raises:
        Refusal: something cannot be read, or a LoRA does not fit the base.
        Waiting: there is too little room on the disk.
        Unproven: what was written is not that; it was removed.
        OSError: reading or writing failed.
        ValueError: a value does not fit into the type asked for.
    """
    began = time.monotonic()
    wanted = dtype_of(dtype)
    if output.suffix not in (".safetensors", ".ckpt"):
        raise Refusal("output", f"{output.name} is no .safetensors or .ckpt file.", "Give it the ending .safetensors.")
    family, plan, metadata = _plan_base(base)
    added: dict[str, list[_Addition]] = {}
    for path, weight in loras:
        lora = read_lora(path)
        for pair in lora.pairs:
            name, addition = _place(lora, pair, weight, family, plan)
            added.setdefault(name, []).append(addition)
    entries = [
        replace(entry, made=partial(_sum, replace(entry), added[name])) if name in added else entry
        for name, entry in plan.items()
    ]
    entries = as_type(with_ties(family.components, entries), wanted)
    total = sum(entry.length for entry in entries)
    check_room(output.parent, total)
    wrote = counted(progress, total)
    metadata["modelspec.merged_from"] = ", ".join([base.name, *(f"{path.name} x {weight:g}" for path, weight in loras)])
    with files.atomic_path(output) as temporary:
        if output.suffix == ".ckpt":
            write_checkpoint(temporary, entries, wrote)
        else:
            write_safetensors(temporary, entries, metadata, wrote)
        progress(total, total, "checking")
        _prove_merged(temporary, entries)
        size = temporary.stat().st_size
    return Written(output, family.name, sum(map(len, added.values())), size, time.monotonic() - began)


def _plan_base(base: Path) -> tuple[Family, dict[str, Entry], dict[str, str]]:
    """The family, the tensors of the single file by the table's names, and the metadata of a base."""
    if base.is_dir():
        pipeline = read_pipeline(base)
        family = FAMILIES[pipeline.family]
        entries = to_single(family.components, read_folder(base, family), family.name)
        return family, {entry.name: entry for entry in entries}, modelspec(pipeline, {"title": base.name})
    family = FAMILIES[read_single(base, "trained").family]
    plan: dict[str, Entry] = {}
    for key, located in tensors_of(base).items():
        matches = (part.match_single(key) for part in family.components)
        match = next((match for match in matches if match is not None), None)
        # Under the table's name, so that a module finds it, whatever the file calls it.
        plan[match.single if match else key] = whole(key, located)
    metadata = dict(read_header(base).metadata) if base.suffix == ".safetensors" else {}
    return family, plan, {"format": "pt", **{key: value for key, value in metadata.items() if "hash" not in key}}


@dataclass(frozen=True)
class _Addition:
    """What a pair adds to a tensor: ``factor · up @ down``, from a row on, or transposed."""

    pair: Pair
    factor: float
    first_row: int
    is_turned: bool


def _place(lora: Lora, pair: Pair, weight: float, family: Family, plan: Mapping[str, Entry]) -> tuple[str, _Addition]:
    """The tensor that a pair is added to, and where in it."""
    component = next((part for part in family.components if part.name == pair.module.part), None)
    match = component.match_diffusers(f"{pair.module.path}.weight") if component else None
    entry = plan.get(match.single) if match else None
    label = f"{pair.module.part}.{pair.module.path}"
    if match is None or entry is None:
        raise Refusal("source", f"{lora.path.name} has {label}, which the base has not.", _OTHER)
    up, down = pair.up.tensor.shape, pair.down.tensor.shape
    rows, first = _rows(match, pair, entry)
    is_turned = match.rule.form == "transposed"
    shape = (entry.shape[1], entry.shape[0]) if is_turned else (rows, *entry.shape[1:])
    size, inner = prod(shape[1:]), prod(down[1:])
    if up[0] != shape[0] or inner != size:
        what = f"{lora.path.name} changes {label} by {up[0]} x {inner} values; the base has {shape[0]} x {size}."
        raise Refusal("source", what, _OTHER)
    return match.single, _Addition(pair, weight * pair.alpha / pair.rank, first, is_turned)


_OTHER = "Is it a LoRA of another family, or of a base of another size?"


def _rows(match: Match, pair: Pair, entry: Entry) -> tuple[int, int]:
    """How many rows of a tensor a module has, and from which on: several modules may share one tensor."""
    weights = match.rule.weights
    unit = entry.shape[0] // sum(weights) if entry.shape else 0
    index = match.parts.index(f"{pair.module.path}.weight")
    return unit * weights[index], unit * sum(weights[:index])


def _sum(base: Entry, additions: Sequence[_Addition], sources: Sources, entry: Entry) -> bytes:
    """The bytes of a tensor with what is added to it, in the type that is wanted."""
    import numpy as np

    from handlers.convert.cast import cast, decode

    plain = replace(base, dtype=base.pieces[0].dtype)
    values = decode(b"".join(sources.read(plain)), plain.dtype).astype("<f4").reshape(base.shape)
    for addition in additions:
        down, up = (matrix_of(sources, half) for half in (addition.pair.down, addition.pair.up))
        delta = np.float32(addition.factor) * (up @ down)
        if addition.is_turned:
            delta = delta.T
        rows = values[addition.first_row : addition.first_row + delta.shape[0]]
        rows += delta.reshape(rows.shape)
    return cast(values.tobytes(), "F32", entry.dtype)


def matrix_of(sources: Sources, located: Located) -> NDArray[float32]:
    """A half of a pair as float32: rows × the rest."""
    from handlers.convert.cast import decode

    tensor = located.tensor
    raw = exactly(sources.descriptor(located.file), tensor.begin, tensor.length)
    matrix: NDArray[float32] = decode(raw, tensor.dtype).astype("<f4").reshape(tensor.shape[0], -1)
    return matrix


def _prove_merged(file: Path, entries: Sequence[Entry]) -> None:
    """Read a written model again: every tensor is there, and holds what the base and the LoRAs make."""
    have = tensors_of(file)
    if have.keys() != {entry.name for entry in entries}:
        raise Unproven("the written model has other tensors than were planned")
    with Sources() as sources:
        for entry in entries:
            located = have[entry.name]
            tensor = located.tensor
            if (tensor.dtype, tensor.shape) != (entry.dtype, entry.shape):
                raise Unproven(f"{entry.name} is {tensor.dtype} {tensor.shape}")
            position = tensor.begin
            for block in sources.read(entry):
                if exactly(sources.descriptor(located.file), position, len(block)) != block:
                    raise Unproven(f"{entry.name} does not hold the values of its source")
                position += len(block)
