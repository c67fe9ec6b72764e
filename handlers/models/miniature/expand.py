"""Shipped weights, float16, as the float32 folder that is loaded. Numbers only: no torch, the same bytes every time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from handlers.models import headers

LENT = ("vae", "tokenizer", "text_encoder")


def expand(source: Path, target: Path) -> None:
    """Copy a folder; its ``.safetensors`` come out as float32. Every float16 has an exact float32.

    Libraries give a part the type that its file has, and a pipeline of two types cannot draw; so all get one.
    """
    target.mkdir(parents=True)
    for path in sorted(source.rglob("*")):
        copy = target / path.relative_to(source)
        if path.is_dir():
            copy.mkdir()
        else:
            _unfold(path, copy)


def borrow(lender: Path, target: Path) -> None:
    """Fill an expanded folder up with what another miniature has of ``LENT``; what is there already stays."""
    for part in LENT:
        for path in sorted((lender / part).iterdir()):
            copy = target / part / path.name
            if not copy.exists():
                copy.parent.mkdir(exist_ok=True)
                _unfold(path, copy)


def _unfold(path: Path, copy: Path) -> None:
    if path.suffix == ".safetensors":
        widen(path, copy)
    else:
        shutil.copyfile(path, copy)


def widen(source: Path, target: Path) -> None:
    """Write a safetensors file of float16 as one of float32, in the same order."""
    header = headers.read_header(source)
    table: dict[str, object] = {"__metadata__": dict(header.metadata)} if header.metadata else {}
    position = 0
    for name, entry in header.tensors.items():
        end = position + 2 * (entry.end - entry.begin)
        table[name] = {"dtype": "F32", "shape": list(entry.shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(table, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    content = np.memmap(source, dtype=np.uint8, mode="r")
    with target.open("xb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for entry in header.tensors.values():
            file.write(content[entry.begin : entry.end].view(np.float16).astype(np.float32).tobytes())
