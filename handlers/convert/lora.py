"""A LoRA as pairs of tensors with their strength, read from any of the three layouts and written in two.

A pair (down: rank × in, up: out × rank) adds ``alpha / rank · up @ down`` to the weight of its module. kohya keeps
alpha in a tensor beside the pair; diffusers in its header (``lora_adapter_metadata``), peft in ``adapter_config.json``;
where nothing says, it is the rank. A DoRA (Liu et al. 2024) has a third tensor: the length that each row of the changed
weight gets, one number a row (peft's shapes) or one a row of the weight's own dimensions (kohya's).
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from handlers.convert.header import TensorEntry, read_header
from handlers.convert.lora_alpha import ADAPTER_METADATA, Alphas, number_in, read_alphas
from handlers.convert.lora_names import LORA_FAMILIES, Module, Share, from_diffusers, from_kohya
from handlers.convert.plan import Located
from handlers.models.probe import Probe, probe
from sessions.refusal import Refusal

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
_OF_ROWS = ("up", "scale")  # one row for each of the module's
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
        shares, half = _parse(key)
        if not shares:
            raise Refusal("source", f"{path.name} has {key}, which belongs to no module that is known.", _FAMILIES)
        for share in shares:
            parts = halves.setdefault(share.module, {})
            if half in parts:
                raise Refusal("source", f"{path.name} has {key} twice, under two names.", "Save it with one program.")
            if half in _OF_ROWS and entry.shape and entry.shape[0] % share.of:
                raise Refusal("source", f"{path.name} has {key}, whose rows are no {share.of} equal shares.", _FAMILIES)
            parts[half] = Located(file, _rows_of(share, entry) if half in _OF_ROWS else entry)
    alphas = read_alphas(path, header.metadata)
    pairs = [_pair(path, module, parts, alphas) for module, parts in halves.items()]
    metadata = {key: value for key, value in header.metadata.items() if key != ADAPTER_METADATA}
    return Lora(path, found.family, pairs, metadata)


_FAMILIES = "LoRAs of SD 1, SD 2, SDXL and Flux are converted."


def _require_lora(path: Path, found: Probe, variants: Collection[str]) -> None:
    if found.kind != "lora":
        raise Refusal("source", f"{path.name} is {f'a {found.kind}' if found.kind else 'no LoRA'}.", "Name a LoRA.")
    if found.variant and found.variant not in variants:
        raise Refusal("source", f"{path.name} is a {found.variant}, no plain LoRA.", "Use a plain LoRA or LoCon.")
    if found.family not in (None, *LORA_FAMILIES):
        raise Refusal("source", f"{path.name} is a LoRA of {found.family}.", _FAMILIES)


def _rows_of(share: Share, tensor: TensorEntry) -> TensorEntry:
    """What a module has of a tensor that has one row for each of the layer's."""
    if share.of == 1 or not tensor.length:
        return tensor
    each, row = tensor.shape[0] // share.of, tensor.length // tensor.shape[0]
    first, last = share.begin * each, share.end * each
    shape = (last - first, *tensor.shape[1:])
    return replace(tensor, shape=shape, begin=tensor.begin + first * row, end=tensor.begin + last * row)


def _parse(key: str) -> tuple[tuple[Share, ...], str]:
    """Which modules a tensor speaks of, and which half of their pairs it is."""
    for ending, half in _ENDINGS.items():
        if key.endswith(ending):
            name = key.removesuffix(ending)
            return (from_kohya(name) if name.startswith("lora_") else from_diffusers(name)), half
    old = _PROCESSOR.match(key)
    if old is None:
        return (), ""
    attention, letter, half = old.groups()
    if attention.startswith("text_encoder"):
        return from_diffusers(f"{attention}.{letter}_proj"), half
    return from_diffusers(f"{attention}.to_{'out.0' if letter == 'out' else letter}"), half


def _pair(path: Path, module: Module, parts: Mapping[str, Located], alphas: Alphas) -> Pair:
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
    alpha = alphas.of(module, small[0]) if given is None else number_in(given)
    scale = parts.get("scale")
    if scale is not None and math.prod(scale.tensor.shape) != large[0]:
        what = f"{path.name}: {module.part}.{module.path} is scaled along another side than its rows."
        raise Refusal("source", what, "Use a DoRA that scales outputs, as peft's do.")
    return Pair(module, down, up, alpha, scale)
