"""Which tree a command means, and how to ask its daemon."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from daemon.client import Answer, NoDaemon, ask
from daemon.state import State


class WrongUse(Exception):  # noqa: N818 - it says what is the case
    """The command was called in a way that has no meaning; its message says what to do."""


def state_for(root: Path | None) -> State:
    """The state of the tree that is meant: the named one, the one the current folder lies in, or the only one.

    Raises:
        WrongUse: it is not clear which one is meant.
    """
    if root is not None:
        return State.of(root, os.environ)
    known = State.all(os.environ)
    here = Path.cwd().resolve()
    around = [state for state in known if here == state.root or state.root in here.parents]
    if len(around) == 1:
        return around[0]
    if len(known) == 1:
        return known[0]
    if not known:
        raise WrongUse("No tree has been watched on this machine yet. Start with: fastsd up ROOT")
    names = "\n  ".join(str(state.root) for state in known)
    raise WrongUse(f"Several trees are known here; say which one:\n  {names}")


def ask_daemon(root: Path | None, command: str, **parameters: Any) -> Answer:
    """Ask the daemon of a tree.

    Raises:
        WrongUse: no daemon runs there, or it is not clear which tree is meant.
    """
    state = state_for(root)
    try:
        return ask(state.socket, command, **parameters)
    except NoDaemon:
        raise WrongUse(f"No daemon watches {state.root}. Start one with: fastsd up {state.root}") from None


def watched_by(folder: Path) -> State | None:
    """The tree of a running daemon of this machine that a folder (all links followed) lies in."""
    for state in State.all(os.environ):
        if state.root == folder or state.root in folder.parents:
            try:
                ask(state.socket, "status", timeout=2.0)
            except NoDaemon:
                continue
            return state
    return None


def complain(message: str, code: int) -> int:
    """Say on stderr what is wrong; returns the exit code."""
    print(f"fastsd: {message}", file=sys.stderr)
    return code


def print_json(value: Any) -> None:
    """One JSON object on one line of stdout, at once."""
    print(json.dumps(value, default=str), flush=True)
