"""``fastsd models``: what there is, and getting what is missing."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from daemon.cli import DONE, FAILED
from daemon.commands.roots import WrongUse, complain, print_json, state_for
from daemon.state import cache_home
from handlers.models import registry
from sessions.layout import MODELS
from sessions.status import size


def listing(arguments: argparse.Namespace) -> int:
    """``fastsd models list``: every model known by name, and those under the tree's Models/."""
    folder = _models_folder(arguments.root)
    for model in registry.list_models(folder, cache_home(os.environ)):
        if arguments.json:
            print_json(model.to_json())
            continue
        where = model.origin if model.present else f"not here: fastsd models get {model.name}"
        print(f"{model.name:<24} {model.family:<8} {model.kind:<11} {size(model.bytes):>9}  {where}")
    return DONE


def get(arguments: argparse.Namespace) -> int:
    """``fastsd models get NAME``: resumed and checked."""
    from daemon.terminal import display_for_terminal
    from handlers.context import Waiting
    from handlers.fetch import get as fetch
    from sessions.refusal import Refusal

    name: str = arguments.name
    display = display_for_terminal()
    target = _models_folder(arguments.root) if "://" in name else None
    try:
        path = fetch(
            name,
            cache_home(os.environ),
            lambda done, total: display.show(0, "fetch", name, {"done": done, "total": total}),
            target,
        )
    except (Refusal, Waiting, OSError) as error:
        return complain(str(error), FAILED)
    finally:
        display.close()
    if arguments.json:
        print_json({"name": name, "path": os.fspath(path)})
    else:
        print(f"{name} is in {path}")
    return DONE


def export(arguments: argparse.Namespace) -> int:
    """``fastsd models export NAME --out DIR``: a captioner as ONNX, and how far it agrees with torch."""
    from daemon.commands.oneoffs import missing_captioner, pictures_in, run_one_off

    missing = missing_captioner(arguments.name)
    if missing:
        return complain(missing, FAILED)
    out = arguments.out.absolute()
    payload = {
        "source": os.fspath(out),
        "output": os.fspath(out),
        "captioner": arguments.name,
        "int8": bool(arguments.int8),
        "pictures": [os.fspath(picture.resolve()) for picture in pictures_in(arguments.compare)],
    }

    def row(asked: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
        return {"name": asked["captioner"], "path": asked["output"], "agreement": facts.get("agreement")}

    def line(found: dict[str, Any]) -> str:
        report = found["agreement"] or {}
        compared = (
            f"  ({report['same']} of {report['pictures']} captions as in torch)" if report.get("pictures") else ""
        )
        return f"{found['name']} is in {found['path']}{compared}"

    return run_one_off("export", [payload], out.parent, arguments, row=row, line=line)


def _models_folder(root: Path | None) -> Path | None:
    try:
        folder = state_for(root).root / MODELS
    except WrongUse:
        return None
    return folder if folder.is_dir() or root is not None else None
