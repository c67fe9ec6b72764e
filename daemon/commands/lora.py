"""``fastsd lora``: LoRAs converted, merged and extracted, without a daemon."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from daemon.cli import FAILED, USAGE
from daemon.commands.oneoffs import run_one_off
from daemon.commands.roots import complain


def convert(arguments: argparse.Namespace) -> int:
    """``fastsd lora convert SRC DST``: another layout."""
    return _run(arguments, "lora-convert", {"to": arguments.to, "family": arguments.family})


def merge(arguments: argparse.Namespace) -> int:
    """``fastsd lora merge BASE LORA… --out FILE``."""
    weights = arguments.weight or [1.0]
    if len(weights) == 1:
        weights = weights * len(arguments.loras)
    if len(weights) != len(arguments.loras):
        return complain("give --weight once, or once for each LoRA", USAGE)
    for lora in arguments.loras:
        if not lora.exists():
            return complain(f"{lora}: there is no such file or folder", FAILED)
    loras = [[os.fspath(lora.absolute()), weight] for lora, weight in zip(arguments.loras, weights, strict=True)]
    return _run(arguments, "lora-merge", {"loras": loras, "dtype": arguments.dtype})


def extract(arguments: argparse.Namespace) -> int:
    """``fastsd lora extract MODEL BASE --out FILE``."""
    if arguments.rank < 1:
        return complain(f"--rank {arguments.rank} is no rank", USAGE)
    if not arguments.base.exists():
        return complain(f"{arguments.base}: there is no such file or folder", FAILED)
    base = os.fspath(arguments.base.absolute())
    return _run(arguments, "lora-extract", {"base": base, "rank": arguments.rank, "dtype": arguments.dtype})


def _run(arguments: argparse.Namespace, kind: str, more: Mapping[str, Any]) -> int:
    source: Path = arguments.source
    if not source.exists():
        return complain(f"{source}: there is no such file or folder", FAILED)
    output: Path = arguments.out.absolute()
    payload = {"source": os.fspath(source.absolute()), "output": os.fspath(output), **more}

    def row(asked: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
        told = {key: facts.get(key) for key in ("family", "modules", "bytes", "seconds")}
        told |= {"kept": facts["kept"]} if "kept" in facts else {}
        return {"source": asked["source"], "output": asked["output"], **told}

    def line(found: dict[str, Any]) -> str:
        kept = f", {found['kept']:.1%} of the difference" if "kept" in found else ""
        return f"{found['output']}  ({found['modules']} modules, {found['bytes']:,} bytes{kept})"

    return run_one_off(kind, [payload], output.parent, arguments, row=row, line=line)
