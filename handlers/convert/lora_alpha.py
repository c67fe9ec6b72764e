"""The strength of a LoRA's pairs: alphas as tensors beside them, in the header, or in peft's configuration."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handlers.convert.lora_names import Module
from handlers.convert.pieces import exactly
from handlers.convert.plan import Entry, Located
from sessions.refusal import Refusal

ADAPTER_METADATA = "lora_adapter_metadata"


def number_in(located: Located) -> float:
    """The one value of a tensor.

    Raises:
        Refusal: code ``source``: it has several, or is of another type.
    """
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
class Alphas:
    """What the header, or peft's configuration, says of alphas: (component or "" for any) → configuration."""

    tables: Mapping[str, Mapping[str, Any]]

    def of(self, module: Module, rank: int) -> float:
        """The alpha of a module's pair of that rank."""
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


def read_alphas(path: Path, metadata: Mapping[str, str]) -> Alphas:
    """What is said beside a LoRA's tensors: in the header of a file, or in a peft folder.

    Raises:
        Refusal: code ``source``: it cannot be read.
    """
    try:
        beside = json.loads((path / "adapter_config.json").read_bytes()) if path.is_dir() else None
        table = beside if beside is not None else json.loads(metadata.get(ADAPTER_METADATA, "{}"))
    except (OSError, ValueError):
        raise Refusal("source", f"What {path.name} says of its alphas cannot be read.", "Copy it again.") from None
    if not isinstance(table, dict):
        return Alphas({})
    if beside is not None:
        return Alphas({"": table})
    tables: dict[str, dict[str, Any]] = {}
    for key, value in table.items():
        part, _, name = key.partition(".")
        tables.setdefault(part, {})[name] = value
    return Alphas(tables)


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
