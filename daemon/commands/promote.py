"""``fastsd models promote``: one of a session's models becomes the one that is published."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from daemon.cli import DONE, FAILED, USAGE
from daemon.client import NoDaemon, ask
from daemon.commands.roots import complain, print_json, watched_by
from daemon.promotion import Candidate, candidates, choose
from daemon.promotion import promote as write_promotion
from daemon.state import State, TreeIsHeld, nobody_watching
from sessions.layout import read_session_id
from sessions.manifest import Manifest
from sessions.refusal import Refusal


def promote(arguments: argparse.Namespace) -> int:
    """Promote a model; a running daemon does it and publishes it, else the next one publishes it."""
    target: Path = arguments.target.absolute()
    step: int | None = arguments.step
    if not os.path.lexists(target):
        return complain(f"{arguments.target} does not exist", USAGE)
    if target.is_file() and step is not None:
        return complain("a file is one model: leave --step out, or name the session's folder", USAGE)
    session = _session_of(target)
    if session is None:
        return complain(f"{arguments.target} lies in no session that fastsd knows", USAGE)
    try:
        manifest = Manifest.load(session)
        if target.is_dir() and (step is None or target.resolve() != session):
            known = ", ".join(each.told() for each in candidates(manifest)) or "none yet"
            return complain(f"say which model of {session.name}: name its file, or --step N. There are: {known}", USAGE)
        file = None if target.is_dir() else (target.parent.resolve() / target.name).relative_to(session).as_posix()
        chosen = choose(manifest, file, step)
        watcher = watched_by(session)
        if watcher is None:
            with nobody_watching(session):
                chosen = write_promotion(Manifest.load(session), chosen.name)
            return _tell(arguments, session, chosen, None)
        answer = ask(watcher.socket, "promote", timeout=60.0, folder=os.fspath(session), name=chosen.name)
        if not answer.get("ok"):
            return complain(str(answer.get("error")), FAILED)
        moved = Candidate(chosen.name, chosen.run, chosen.step, str(answer["file"]))
        return _tell(arguments, session, moved, watcher)
    except Refusal as refusal:
        return complain(str(refusal), FAILED)
    except TreeIsHeld as held:
        return complain(str(held), FAILED)
    except NoDaemon:
        return complain("the daemon ended while it was asked. Try again", FAILED)
    except OSError as error:
        return complain(f"{session} cannot be used: {error.strerror or error}", FAILED)


def _session_of(target: Path) -> Path | None:
    """The nearest folder, at or above a path, that is a session; links are followed as the daemon's root is."""
    start = target.resolve() if target.is_dir() else target.parent.resolve()
    return next((folder for folder in (start, *start.parents) if read_session_id(folder) is not None), None)


def _tell(arguments: argparse.Namespace, session: Path, chosen: Candidate, watcher: State | None) -> int:
    model = session / chosen.file
    if arguments.json:
        told = {"session": session.name, "folder": os.fspath(session), "model": os.fspath(model)}
        print_json({**told, "name": chosen.name, "run": chosen.run, "step": chosen.step, "daemon": watcher is not None})
        return DONE
    root = watcher.root if watcher else None
    who = f"The daemon of {root} publishes it." if root else "The next `fastsd up` publishes it."
    print(f"{model} is the model of {session.name} now. {who}")
    return DONE
