"""Miniature models: the real classes at tiny widths, for the demo, the tests and whoever names them.

Light to import: numpy is loaded when shipped weights are unfolded, torch only where a miniature has none.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from sessions import files

VERSION = "5"
WEIGHTS = Path(__file__).parent / "weights"
NAMES = ("miniature", "miniature-sd2", "miniature-sdxl", "miniature-captioner", "miniature-search")
# Whose text weights, tokenizer and VAE a miniature draws with where its own folder has none.
LENDERS = {"miniature-sd2": "miniature", "miniature-sdxl": "miniature"}
# Written last into an unfolded or built folder.
_READY = "READY"
_INDICES = ("model_index.json", "config.json")


def shipped(name: str) -> Path | None:
    """The packaged folder of a trained miniature, or None where it has none yet."""
    folder = WEIGHTS / name
    return folder if any((folder / index).is_file() for index in _INDICES) else None


def folder_of(name: str, cache: Path) -> Path:
    """Where a miniature lies or will lie; nothing is built."""
    kind = "" if is_trained(name) else "-random"
    return cache / "miniature" / f"{name}-{VERSION}{kind}"


def is_trained(name: str) -> bool:
    """Whether the weights were trained; the others are random and draw or say nothing of sense."""
    return shipped(name) is not None


def ensure(name: str, cache: Path) -> Path:
    """The Diffusers (or transformers) folder of a miniature, ready to load.

    Trained weights come with the package and are unfolded to float32 into ``cache`` once. A miniature without them is
    built there with random weights (the same on every machine of one torch version). Two workers may do so at once: the
    first one's stays.

    Args:
        name: one of ``NAMES``.
        cache: a folder on a local disk.

    Raises:
        ValueError: there is no such miniature.
    """
    if name not in NAMES:
        message = f"there is no miniature called {name!r}"
        raise ValueError(message)
    final = folder_of(name, cache)
    if (final / _READY).is_file():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    files.sweep_temporaries(final.parent)
    temporary = files.temporary_name(final)
    try:
        _build(name, temporary)
        (temporary / _READY).write_text(f"{VERSION}\n")
        files.sync_tree(temporary)
        _publish(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def _build(name: str, target: Path) -> None:
    weights = shipped(name)
    if weights is not None:
        from handlers.models.miniature.expand import borrow, expand

        expand(weights, target)
        if name in LENDERS:
            borrow(WEIGHTS / LENDERS[name], target)
    elif name == "miniature-captioner":
        from handlers.models.miniature import captioner

        captioner.build(target)
    elif name == "miniature-search":
        from handlers.models.miniature import searcher

        searcher.build(target)
    else:
        from handlers.models.miniature import drawing

        drawing.build(target)


def _publish(temporary: Path, final: Path) -> None:
    """Rename the finished folder; where another worker was faster, its folder stands."""
    try:
        files.publish(temporary, final)
    except OSError:
        if not (final / _READY).is_file():
            raise
