"""``fastsd service install | uninstall``: fastsd under systemd, for this user or for the machine."""

from __future__ import annotations

import argparse
import os
import pwd
import sys
from collections.abc import Mapping
from pathlib import Path

from daemon.cli import CONFIGURATION, DONE, FAILED
from daemon.commands.roots import complain
from daemon.config import BadSettings, Settings, load_settings
from daemon.install import (
    SYSTEM_SECRETS,
    SYSTEM_STATE,
    Scope,
    Unit,
    install_unit,
    render_unit,
    run_command,
    systemd_runs,
    uninstall_unit,
    unit_folder,
)
from daemon.services.webui import working_folder
from handlers.publish.folders import beside
from sessions.refusal import Refusal


def install(arguments: argparse.Namespace) -> int:
    """``fastsd service install ROOT [--system] [--print]``."""
    root: Path = arguments.root.expanduser().resolve()
    scope = _scope(arguments)
    try:
        python = Path(sys.executable)
        unit = unit_for(root, scope, load_settings(root), environment=os.environ, home=Path.home(), python=python)
        text = render_unit(unit)
        if arguments.show:
            print(text, end="")
            return DONE
        outcome = install_unit(unit, unit_folder(scope, Path.home()), run_command, has_systemd=systemd_runs())
    except BadSettings as error:
        return complain(str(error), CONFIGURATION)
    except (Refusal, ValueError) as error:
        return complain(str(error), FAILED)
    print("\n".join(outcome.said))
    return DONE if outcome.done else FAILED


def uninstall(arguments: argparse.Namespace) -> int:
    """``fastsd service uninstall ROOT [--system]``."""
    scope = _scope(arguments)
    try:
        outcome = uninstall_unit(scope, unit_folder(scope, Path.home()), run_command, has_systemd=systemd_runs())
    except Refusal as error:
        return complain(str(error), FAILED)
    print("\n".join(outcome.said))
    return DONE if outcome.done else FAILED


def unit_for(
    root: Path,
    scope: Scope,
    settings: Settings,
    *,
    environment: Mapping[str, str],
    home: Path,
    python: Path,
) -> Unit:
    """The unit for a tree on this machine.

    Args:
        root: the tree, resolved. A system service runs as its owner.
        scope: for the user or for the machine.
        settings: of the tree: they say where the WebUI writes.
        environment: ``FASTSD_STATE`` is taken over.
        home: the user's home folder.
        python: the interpreter; ``fastsd`` lies beside it.

    Raises:
        Refusal: the tree or the command is not there.
    """
    command = python.with_name("fastsd")
    if not command.is_file():
        raise Refusal("no-command", f"There is no {command}.", "Install fastsd into an environment of its own first.")
    if not root.is_dir():
        raise Refusal("no-tree", f"There is no folder {root}.", f"Make it first: fastsd init {root}")
    webui = settings.webui
    runs_in = working_folder(webui.command) if webui.command else None
    state = Path(environment["FASTSD_STATE"]).resolve() if environment.get("FASTSD_STATE") else None
    system = scope == "system"
    loras = webui.loras or (beside(webui.models) if webui.models else None)
    return Unit(
        scope,
        command,
        root,
        state or (SYSTEM_STATE if system else None),
        SYSTEM_SECRETS if system else home / ".config/fastsd/environment",
        pwd.getpwuid(root.stat().st_uid).pw_name if system else None,
        tuple(folder.expanduser().resolve() for folder in (webui.models, loras, runs_in) if folder is not None),
        (python.resolve(),),
    )


def _scope(arguments: argparse.Namespace) -> Scope:
    return "system" if arguments.system else "user"
