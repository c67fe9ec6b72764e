"""``fastsd up``: the daemon in the foreground."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
from logging.handlers import RotatingFileHandler
from pathlib import Path

from daemon.cli import CONFIGURATION, FAILED
from daemon.commands.roots import complain
from daemon.config import BadSettings, Settings, load_settings
from daemon.state import State, TreeIsHeld, TreeLock
from daemon.terminal import display_for_terminal
from sessions.errors import remove_error, write_error

_LOG_BYTES = 5_000_000


def up(arguments: argparse.Namespace) -> int:
    """Watch a tree until stopped, or (``--once``) until everything that is there is done."""
    root: Path = arguments.root
    if not root.is_dir():
        return complain(f"{root} is no folder. Is it mounted? Make one with: fastsd init {root}", FAILED)
    try:
        settings = load_settings(root, arguments.config)
    except BadSettings as error:
        if error.file.parent == root:
            _tell_beside(error)
        return complain(f"the settings cannot be used. {error}", CONFIGURATION)
    remove_error(root / "fastsd.yaml")
    return run_tree(State.of(root, os.environ), settings, once=arguments.once)


def run_tree(state: State, settings: Settings, *, once: bool) -> int:
    """Run the daemon of a tree in this process, as the only one of that tree. Returns the exit code."""
    try:
        state.prepare()
    except OSError as error:
        advice = "Set FASTSD_STATE to a folder on a local disk that you may write to."
        return complain(f"the state folder {state.folder} cannot be made: {error.strerror}. {advice}", CONFIGURATION)
    try:
        with TreeLock(state):
            return asyncio.run(_serve(state, settings, once=once))
    except TreeIsHeld as error:
        return complain(str(error), FAILED)


async def _serve(state: State, settings: Settings, *, once: bool) -> int:
    from daemon.app import Daemon

    display = display_for_terminal()
    _log_to(state.logs / "daemon.log", display.log_handler())
    try:
        return await Daemon(state, settings, os.environ, once=once, display=display).run()
    finally:
        display.close()


def _tell_beside(error: BadSettings) -> None:
    try:
        write_error(error.file, error.refusal)
    except OSError:
        return


def _log_to(file: Path, on_terminal: logging.Handler) -> None:
    to_file = RotatingFileHandler(file, maxBytes=_LOG_BYTES, backupCount=3, encoding="utf-8", errors="backslashreplace")
    form = logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    to_file.setFormatter(form)
    if type(on_terminal) is logging.StreamHandler:
        on_terminal.setFormatter(form)
    for handler in (to_file, on_terminal):
        logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.INFO)
    logging.getLogger("apscheduler").setLevel(logging.WARNING)
