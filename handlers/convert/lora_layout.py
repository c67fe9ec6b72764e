"""A LoRA's tensors as a layout names them: kohya's, or diffusers' and peft's."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

from handlers.convert.lora import Lora, Pair
from handlers.convert.lora_alpha import scalar
from handlers.convert.lora_names import DOTTED, to_diffusers, to_kohya
from handlers.convert.plan import Entry, whole
from sessions.refusal import Refusal

Layout = Literal["kohya", "diffusers"]
LAYOUTS: tuple[Layout, ...] = ("kohya", "diffusers")


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
