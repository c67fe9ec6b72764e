"""``fastsd demo``: the whole chain on the built-in miniature models, from five pictures to a drawn one."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from daemon.cli import DONE, FAILED
from daemon.commands.roots import complain
from daemon.commands.up import run_tree
from daemon.config import load_settings
from daemon.devices import worker_environment
from daemon.state import State, cache_home
from handlers.models import miniature
from sessions import layout
from sessions.files import write_text
from sessions.manifest import Manifest
from sessions.status import duration

_SETTINGS = """\
# The demo's settings: the built-in miniature models, and no WebUI.
captioner: miniature
base: miniature
webui: {kind: none}
watch: {settle: 1s}
"""
_SPEC = """\
# The demo's training: the word zwx is taught a shape that the miniature has never seen.
base: miniature
instance: zwx
class: star
prior: {images: 60}    # pictures of what the miniature draws already, so that it does not forget
start: now
"""
_MARKER = ".fastsd-demo"


def demo(arguments: argparse.Namespace) -> int:
    """Make a tree with five pictures, run the daemon over it once, and draw with what came out."""
    folder: Path = arguments.folder.resolve()
    if folder.exists() and any(folder.iterdir()):
        if not (folder / _MARKER).exists():
            return complain(f"{folder} is not empty and no earlier demo. Name another folder: fastsd demo DIR", FAILED)
        shutil.rmtree(folder)
    session = folder / layout.SESSIONS / "star"
    began = time.monotonic()
    print(f"A tree in {folder}: five pictures of a star, a shape that the miniature models have never seen.")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / _MARKER, "made by `fastsd demo`, which may remove this folder\n")
    write_text(folder / layout.SETTINGS, _SETTINGS)
    if _helper("pictures", str(session / layout.INSTANCE_IMAGES)) is None:
        return FAILED
    write_text(session / layout.SPEC_NAMES[0], _SPEC)
    untrained = [name for name in miniature.NAMES if not miniature.is_trained(name)]
    if untrained:
        print(f"Note: the weights of {' and '.join(untrained)} are random in this version: the chain is real, and what")
        print("they draw or say makes no sense.")
    print("The daemon, once: crop, caption, train (two stages), convert and prove.", flush=True)
    code = run_tree(State.of(folder, os.environ), load_settings(folder), once=True)
    models = Manifest.load(session).of_kind("convert")
    if code != DONE or not models:
        return complain(f"the demo came to no model; {session / layout.STATUS} says why", FAILED)
    model = session / str(models[0]["outputs"][0])
    print("Drawing with the finished file, before and after the training.", flush=True)
    picture = folder / "demo.png"
    told = _helper("draw", str(model), str(cache_home(os.environ)), str(picture))
    if told is None:
        return FAILED
    print()
    print(f"The model:      {model}  (verified: {models[0]['verified']})")
    print(f"The status:     {session / layout.STATUS}")
    print(f"The picture:    {told['picture']}")
    print(f"New shape:      {_marks(told, 'star')} show a star where a zwx star was asked for")
    print(f"Old shapes:     {_marks(told, 'known')} show the shape that was asked for")
    print(f"Time:           {duration(time.monotonic() - began)}")
    return DONE


def _marks(told: dict[str, Any], what: str) -> str:
    count = told["pictures"]
    before, after = (round(told[when][what] * count) for when in ("before", "after"))
    return f"before {before}, after {after} of {count} pictures"


def _helper(*arguments: str) -> dict[str, Any] | None:
    done = subprocess.run(
        [sys.executable, "-m", "handlers.models.miniature.demo", *arguments],
        env=worker_environment(os.environ),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        complain(f"the demo's helper failed:\n{done.stderr[-2000:]}", FAILED)
        return None
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
