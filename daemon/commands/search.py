"""``fastsd search ROOT QUERY``: pictures of a tree by words or by another picture, with or without a daemon."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from daemon.cli import CONFIGURATION, FAILED, USAGE
from daemon.commands.oneoffs import Row, run_one_off
from daemon.commands.roots import complain
from daemon.config import BadSettings, load_settings
from daemon.gates import ModelGate
from daemon.searching import index_folder
from daemon.state import State, cache_home
from sessions.layout import MODELS

_USUAL = "siglip2-base"


def search(arguments: argparse.Namespace) -> int:
    """Bring the index of the tree up to date, then tell the nearest pictures."""
    if bool(arguments.query) == bool(arguments.like):
        return complain("name what to look for: words, or a picture with --like", USAGE)
    if arguments.count < 1:
        return complain(f"--count {arguments.count} is no number of pictures", USAGE)
    if not arguments.root.is_dir():
        return complain(f"{arguments.root}: there is no such folder", USAGE)
    if arguments.like and not arguments.like.is_file():
        return complain(f"{arguments.like}: there is no such picture", FAILED)
    state = State.of(arguments.root, os.environ)
    try:
        settings = load_settings(state.root, None)
    except BadSettings as error:
        return complain(str(error), CONFIGURATION)
    name = arguments.model or settings.search or _USUAL
    models = state.root / MODELS if (state.root / MODELS).is_dir() else None
    missing = ModelGate("search", name, lambda: models, cache_home(os.environ), lambda: 0.0).reason()
    if missing:
        return complain(missing, FAILED)
    try:
        state.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        return complain(f"{state.folder} cannot be made: {error.strerror}", FAILED)
    payload = {
        "source": os.fspath(arguments.like or state.root),
        "root": os.fspath(state.root),
        "index": os.fspath(index_folder(state.folder, name)),
        "search": name,
        "models": os.fspath(models) if models else None,
        "ignore": settings.watch.ignore,
        "pixel_limit": settings.limits.picture_pixels,
        "query": arguments.query,
        "like": os.fspath(arguments.like.resolve()) if arguments.like else None,
        "count": arguments.count,
    }

    def row(asked: Mapping[str, Any], facts: Mapping[str, Any]) -> Row:
        found = [
            {"source": os.fspath(Path(asked["root"], hit["path"])), "score": hit["score"]}
            for hit in facts.get("found", ())
        ]
        asks = {"query": asked["query"]} if asked["query"] else {"like": asked["like"]}
        return {**asks, "model": facts.get("search"), "pictures": facts.get("pictures"), "found": found}

    def line(found: Row) -> str:
        if not found["found"]:
            return "There are no pictures in this tree yet."
        return "\n".join(f"{hit['score']:.3f}  {hit['source']}" for hit in found["found"])

    return run_one_off("search", [payload], state.folder, arguments, row=row, line=line)
