"""``fastsd train FOLDER``: one session from pictures to a proven file, without a daemon and without publishing."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from daemon.cli import CONFIGURATION, DONE, FAILED, USAGE
from daemon.commands.roots import complain, print_json, watched_by
from daemon.commands.up import run_tree
from daemon.config import BadSettings, load_settings
from daemon.state import State
from sessions import layout
from sessions.files import write_text
from sessions.manifest import Manifest, Record

_SPEC = "# Written by `fastsd train`: an empty train.yaml trains with the defaults. See train.example.yaml.\n"


def train(arguments: argparse.Namespace) -> int:
    """Crop, caption, train and convert a folder; the daemon's own rooms, on this folder alone."""
    folder: Path = arguments.folder.resolve()
    if not folder.is_dir():
        return complain(f"{arguments.folder} is no folder", USAGE)
    watcher = watched_by(folder)
    if watcher is not None:
        advice = f"Put a train.yaml into {folder} instead, or stop that daemon first."
        return complain(f"a daemon watches {watcher.root}, and this folder with it. {advice}", FAILED)
    try:
        settings = load_settings(folder)
    except BadSettings as error:
        return complain(f"the settings cannot be used. {error}", CONFIGURATION)
    webui = settings.webui.model_copy(update={"kind": "none"})
    settings = settings.model_copy(
        update={
            "webui": webui,
            "base": arguments.base or settings.base,
            "captioner": arguments.captioner or settings.captioner,
        },
    )
    before = _models(folder)
    if not any((folder / name).exists() for name in layout.SPEC_NAMES):
        write_text(folder / layout.SPEC_NAMES[0], _SPEC)
    code = run_tree(State.of(folder, os.environ), settings, once=True)
    new = [record for record in _models(folder) if record not in before]
    for record in new:
        model = folder / record["outputs"][0]
        prompt = _prompt(model, record)
        if arguments.json:
            print_json({"folder": os.fspath(folder), "run": record["run"], "model": os.fspath(model), "prompt": prompt})
        else:
            print(f"{model}  ({record['bytes']:,} bytes, verified: {record['verified']})")
            if prompt:
                print(f"Put it beside your WebUI's LoRAs, and write into the prompt: {prompt}")
    if new:
        return code
    status = folder / layout.STATUS
    if before and code == DONE:
        print(f"{folder} has its model already. Save train.yaml again to train anew.")
        return DONE
    return complain(f"no model was made; {status} says why", FAILED)


def _prompt(model: Path, record: Record) -> str | None:
    """What draws with a LoRA; None for a model that is chosen."""
    if record.get("model_kind") != "lora":
        return None
    return layout.lora_prompt(model.stem, str(record.get("trigger") or ""))


def _models(folder: Path) -> list[Record]:
    return [dict(record) for record in Manifest.load(folder).of_kind("convert")]
