"""``fastsd init``: an empty tree that explains itself."""

from __future__ import annotations

import argparse
from importlib import resources
from pathlib import Path

from daemon.cli import DONE, FAILED
from daemon.commands.roots import complain
from sessions import layout
from sessions.files import write_text
from sessions.spec_example import EXAMPLE


def init(arguments: argparse.Namespace) -> int:
    """Make the folders, the commented settings and a first session; nothing that is there is touched."""
    root: Path = arguments.root
    first = root / layout.SESSIONS / "my first model"
    try:
        for folder in (root / layout.MODELS, first / layout.INSTANCE_IMAGES):
            folder.mkdir(parents=True, exist_ok=True)
        if not (root / layout.SETTINGS).exists():
            write_text(root / layout.SETTINGS, default_settings())
        if not (first / layout.EXAMPLE).exists():
            write_text(first / layout.EXAMPLE, EXAMPLE)
    except OSError as error:
        return complain(f"{root} cannot be made: {error.strerror}. Choose a folder that you may write to.", FAILED)
    print(f"{root} is ready.")
    print(f"  1. Drop 5 to 30 pictures into   {first / layout.INSTANCE_IMAGES}")
    print(f"  2. Start the daemon:            fastsd up {root}")
    print(f"  3. Start training: rename       {first / layout.EXAMPLE}  to train.yaml")
    return DONE


def default_settings() -> str:
    """The commented default configuration, as it is shipped."""
    return resources.files("daemon").joinpath("fastsd.yaml").read_text(encoding="utf-8")
