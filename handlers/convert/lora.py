"""A LoRA as pairs of tensors with their strength, read from any of the three layouts and written in two.

A pair (down: rank × in, up: out × rank) adds ``alpha / rank · up @ down`` to the weight of its module. kohya keeps
alpha in a tensor beside the pair; diffusers in its header (``lora_adapter_metadata``), peft in ``adapter_config.json``;
where nothing says, it is the rank. A DoRA (Liu et al. 2024) has a third tensor: the length that each row of the changed
weight gets, one number a row (peft's shapes) or one a row of the weight's own dimensions (kohya's).
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from handlers.convert.header import read_header
from handlers.convert.lora_names import (
    DOTTED,
    LORA_FAMILIES,
    Module,
    from_diffusers,
    from_kohya,
    to_diffusers,
    to_kohya,
)
from handlers.convert.pieces import exactly
from handlers.convert.plan import Entry, Located, whole
from handlers.models.probe import Probe, probe
from sessions.refusal import Refusal

Layout = Literal["kohya", "diffusers"]
LAYOUTS: tuple[Layout, ...] = ("kohya", "diffusers")
_METADATA = "lora_adapter_metadata"
_ENDINGS = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".alpha": "alpha",
    ".dora_scale": "scale",
    ".lora_magnitude_vector.weight": "scale",
    ".lora_magnitude_vector": "scale",
}
# Before peft, diffusers put a LoRA into the attention's processor.
_PROCESSOR = re.compile(r"^(.+?)(?:\.processor)?\.to_(q|k|v|out)_lora\.(down|up)\.weight$")


@dataclass(frozen=True)
class Pair:
    """What a LoRA adds to one module.

    Attributes:
        module: to which.
        down: rank × in (and × the kernel, for a convolution).
        up: out × rank (× 1 × 1).
        alpha: its strength is ``alpha / rank``.
        scale: of a DoRA: the length of each of the out rows.
    """

    module: Module
    down: Located
    up: Located
    alpha: float
    scale: Located | None = None

    @property
    def rank(self) -> int:
        """The rank."""
        return self.down.tensor.shape[0]


@dataclass(frozen=True)
class Lora:
    """A LoRA.

    Attributes:
        path: where it lies.
        family: sd1, sd2, sdxl or flux; None where neither names nor shapes tell.
        pairs: in the order of the file.
        metadata: of its header, less what speaks of its layout.
    """

    path: Path
    family: str | None
    pairs: Sequence[Pair]
    metadata: Mapping[str, str]


def read_lora(path: Path, variants: Collection[str] = ()) -> Lora:
    """Read a LoRA: a ``.safetensors`` file, or a peft folder.

    Args:
        path: the file or folder.
        variants: which are read besides plain ones: ``dora``.

    Raises:
        Refusal: it is damaged, no LoRA, of a kind or family that is not converted, or a tensor has no counterpart.
        OSError: it cannot be read.
    """
    file = path / "adapter_model.safetensors" if path.is_dir() else path
    if not file.is_file() or file.suffix != ".safetensors":
        raise Refusal("source", f"{path.name} is no .safetensors file and no peft folder.", "Name one.")
    header = read_header(file)
    found = probe({name: entry.shape for name, entry in header.tensors.items()})
    _require_lora(path, found, variants)
    halves: dict[Module, dict[str, Located]] = {}
    for key, entry in header.tensors.items():
        module, half = _parse(key)
        if module is None:
            raise Refusal("source", f"{path.name} has {key}, which belongs to no module that is known.", _FAMILIES)
        if half in halves.setdefault(module, {}):
            raise Refusal("source", f"{path.name} has {key} twice, under two names.", "Save it with one program.")
        halves[module][half] = Located(file, entry)
    alphas = _alphas(path, header.metadata)
    pairs = [_pair(path, module, parts, alphas) for module, parts in halves.items()]
    metadata = {key: value for key, value in header.metadata.items() if key != _METADATA}
    return Lora(path, found.family, pairs, metadata)


_FAMILIES = "LoRAs of SD 1, SD 2 and SDXL are converted, and those of Flux in diffusers' or peft's names."


def _require_lora(path: Path, found: Probe, variants: Collection[str]) -> None:
    if found.kind != "lora":
        raise Refusal("source", f"{path.name} is {f'a {found.kind}' if found.kind else 'no LoRA'}.", "Name a LoRA.")
    if found.variant and found.variant not in variants:
        raise Refusal("source", f"{path.name} is a {found.variant}, no plain LoRA.", "Use a plain LoRA or LoCon.")
    if found.family not in (None, *LORA_FAMILIES):
        raise Refusal("source", f"{path.name} is a LoRA of {found.family}.", _FAMILIES)
    if found.family == DOTTED and found.layout == "kohya":
        what = f"{path.name} is a LoRA of flux in kohya's names, where one pair speaks of several layers."
        raise Refusal("source", what, _FAMILIES)


def _parse(key: str) -> tuple[Module | None, str]:
    """The module of a tensor, and which half of the pair it is."""
    for ending, half in _ENDINGS.items():
        if key.endswith(ending):
            name = key.removesuffix(ending)
            return (from_kohya(name) if name.startswith("lora_") else from_diffusers(name)), half
    old = _PROCESSOR.match(key)
    if old is None:
        return None, ""
    attention, letter, half = old.groups()
    if attention.startswith("text_encoder"):
        return from_diffusers(f"{attention}.{letter}_proj"), half
    return from_diffusers(f"{attention}.to_{'out.0' if letter == 'out' else letter}"), half


def _pair(path: Path, module: Module, parts: Mapping[str, Located], alphas: _Alphas) -> Pair:
    try:
        down, up = parts["down"], parts["up"]
    except KeyError as error:
        label = f"{module.part}.{module.path}"
        raise Refusal("source", f"{path.name}: {label} has no {error.args[0]} part.", "Copy the file again.") from None
    small, large = down.tensor.shape, up.tensor.shape
    if len(small) < 2 or len(large) < 2 or large[1] != small[0] or math.prod(large[2:]) != 1:
        what = f"{path.name}: the parts of {module.part}.{module.path} do not fit together."
        raise Refusal("source", what, _FAMILIES)
    given = parts.get("alpha")
    alpha = alphas.of(module, small[0]) if given is None else _number(given)
    scale = parts.get("scale")
    if scale is not None and math.prod(scale.tensor.shape) != large[0]:
        what = f"{path.name}: {module.part}.{module.path} is scaled along another side than its rows."
        raise Refusal("source", what, "Use a DoRA that scales outputs, as peft's do.")
    return Pair(module, down, up, alpha, scale)


def _number(located: Located) -> float:
    """The one value of a tensor."""
    tensor = located.tensor
    with located.file.open("rb") as file:
        raw = exactly(file.fileno(), tensor.begin, tensor.length)
    if tensor.dtype not in _LETTERS or math.prod(tensor.shape) != 1:
        raise Refusal("source", f"{located.file.name} has an alpha that is no number.", "Save it again.")
    return _value(raw, tensor.dtype)


_LETTERS = {"F16": "<e", "BF16": "<f", "F32": "<f", "F64": "<d", "I64": "<q", "I32": "<i"}


def _value(raw: bytes, dtype: str) -> float:
    return float(struct.unpack(_LETTERS[dtype], b"\0\0" + raw if dtype == "BF16" else raw)[0])


@dataclass(frozen=True)
class _Alphas:
    """What the header, or peft's configuration, says of alphas: (component or "" for any) → configuration."""

    tables: Mapping[str, Mapping[str, Any]]

    def of(self, module: Module, rank: int) -> float:
        table = self.tables.get(module.part) or self.tables.get("") or {}
        found = next(
            (value for name, value in (table.get("alpha_pattern") or {}).items() if _speaks_of(name, module.path)),
            table.get("lora_alpha", rank),
        )
        alpha = float(found)
        return alpha * math.sqrt(rank) if table.get("use_rslora") else alpha


def _speaks_of(pattern: str, path: str) -> bool:
    """Peft's rule: a name, or the end of one, or an expression of it."""
    try:
        return re.match(rf"(.*\.)?({pattern.replace('text_model.', '')})$", path) is not None
    except re.error:
        return False


def _alphas(path: Path, metadata: Mapping[str, str]) -> _Alphas:
    try:
        beside = json.loads((path / "adapter_config.json").read_bytes()) if path.is_dir() else None
        table = beside if beside is not None else json.loads(metadata.get(_METADATA, "{}"))
    except (OSError, ValueError):
        raise Refusal("source", f"What {path.name} says of its alphas cannot be read.", "Copy it again.") from None
    if not isinstance(table, dict):
        return _Alphas({})
    if beside is not None:
        return _Alphas({"": table})
    tables: dict[str, dict[str, Any]] = {}
    for key, value in table.items():
        part, _, name = key.partition(".")
        tables.setdefault(part, {})[name] = value
    return _Alphas(tables)


def plan_lora(lora: Lora, layout: Layout, family: str | None = None) -> list[Entry]:
    """The tensors of a LoRA in a layout, in kohya's with its alphas.

    Args:
        lora: the LoRA.
        layout: ``kohya`` (of Flux: dotted names, with kohya's alphas and lengths) or ``diffusers`` (with peft's names).
        family: where the file does not tell.

    Raises:
        Refusal: code ``source``: the family cannot be told, or has no such module.
    """
    if layout == "diffusers":
        halves = ((to_diffusers(pair.module), pair) for pair in lora.pairs)
        return [
            entry
            for name, pair in halves
            for entry in (*_entries(name, pair, "lora_A", "lora_B"), *_scale(f"{name}.lora_magnitude_vector", pair))
        ]
    known = family or lora.family
    if known is None:
        raise Refusal("source", f"Which family {lora.path.name} is of cannot be told.", "Name it with --family.")
    entries: list[Entry] = []
    for pair in lora.pairs:
        name = to_kohya(pair.module, known)
        if name is None:
            what = f"{lora.path.name} has {pair.module.part}.{pair.module.path}, which {known} has not."
            raise Refusal("source", what, "Is it a LoRA of another family?")
        entries += _entries(name, pair, *halves_of(known))
        entries += _scale(f"{name}.dora_scale", pair)
        entries.append(scalar(f"{name}.alpha", pair.down.tensor.dtype, pair.alpha))
    return entries


def halves_of(family: str) -> tuple[str, str]:
    """What the two factors are called in the file that WebUIs read."""
    return ("lora_A", "lora_B") if family == DOTTED else ("lora_down", "lora_up")


def scalar(name: str, dtype: str, value: float) -> Entry:
    """A tensor of one value; in the type of its pair where that holds it exactly, as kohya has it."""

    def held(wanted: str) -> bytes:
        raw = struct.pack({"F16": "<e"}.get(wanted, "<f"), value)
        return raw[2:] if wanted == "BF16" else raw

    try:
        exact = dtype in ("F16", "BF16") and _value(held(dtype), dtype) == value
    except OverflowError:
        exact = False
    kept = dtype if exact else "F32"
    return Entry(name, kept, (), (), lambda _sources, entry: held(entry.dtype))


def _entries(name: str, pair: Pair, down: str, up: str) -> Iterable[Entry]:
    for half, located in ((down, pair.down), (up, pair.up)):
        yield whole(f"{name}.{half}.weight", located)


def _scale(name: str, pair: Pair) -> Iterable[Entry]:
    """A DoRA's lengths: (rows, 1, …) for kohya's readers; peft has (rows), and (1, rows, 1, 1) of a convolution."""
    if pair.scale is None:
        return
    rest = len(pair.up.tensor.shape) - 1
    rows = pair.up.tensor.shape[0]
    if name.endswith(".dora_scale"):
        shape: tuple[int, ...] = (rows, *[1] * rest)
    else:
        shape = (rows,) if rest == 1 else (1, rows, *[1] * (rest - 1))
    yield replace(whole(name, pair.scale), shape=shape)


def adapter_metadata(pairs: Sequence[Pair]) -> str:
    """What diffusers keeps of ranks and alphas in the header: peft's configuration of each component."""
    table: dict[str, Any] = {}
    for part in dict.fromkeys(pair.module.part for pair in pairs):
        own = [pair for pair in pairs if pair.module.part == part]
        rank = Counter(pair.rank for pair in own).most_common(1)[0][0]
        alpha = Counter(pair.alpha for pair in own).most_common(1)[0][0]
        # A text encoder's path may or may not begin with text_model: ends are compared there, whole paths in a UNet.
        mark = "" if part.startswith("text_encoder") else "^"
        table |= {
            f"{part}.r": rank,
            f"{part}.lora_alpha": alpha,
            f"{part}.rank_pattern": {mark + pair.module.path: pair.rank for pair in own if pair.rank != rank},
            f"{part}.alpha_pattern": {mark + pair.module.path: pair.alpha for pair in own if pair.alpha != alpha},
            f"{part}.target_modules": sorted(pair.module.path for pair in own),
            f"{part}.use_dora": any(pair.scale is not None for pair in own),
        }
    return json.dumps(table, sort_keys=True)
