"""``fastsd attention IMAGE --out PNG``: where the captioner looked while it said each word."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from typing import Any

from daemon.cli import FAILED
from daemon.commands.oneoffs import Row, missing_captioner, run_one_off
from daemon.commands.roots import complain


def attention(arguments: argparse.Namespace) -> int:
    """Draw a heat map for each word beside its box; the raw arrays with ``--npz``."""
    missing = missing_captioner(arguments.captioner)
    if missing:
        return complain(missing, FAILED)
    out = arguments.out.absolute()
    payload = {
        "source": os.fspath(arguments.image.resolve()),
        "output": os.fspath(out),
        "npz": os.fspath(arguments.npz.absolute()) if arguments.npz else None,
        "captioner": arguments.captioner,
        "mode": "brief",
        "prompt": arguments.prompt,
        "precision": "auto",
    }

    def row(asked: Mapping[str, Any], facts: Mapping[str, Any]) -> Row:
        told = {key: facts.get(key) for key in ("words", "phrases")}
        return {"source": asked["source"], "output": asked["output"], "npz": asked["npz"], **told}

    def line(found: Row) -> str:
        masses = (
            f"{phrase['phrase']}: {phrase['mass']:.0%} of its attention in its box" for phrase in found["phrases"]
        )
        return "\n  ".join((f"{found['output']}  ({len(found['words'])} words)", *masses))

    return run_one_off("attention", [payload], out.parent, arguments, row=row, line=line)
