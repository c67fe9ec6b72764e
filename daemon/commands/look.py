"""Commands that look at a daemon or tell it something: status, jobs, retry, cancel, pause, resume, logs."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from daemon.cli import DONE, FAILED, USAGE
from daemon.client import NoDaemon, ask
from daemon.commands.roots import WrongUse, ask_daemon, complain, print_json, state_for
from daemon.state import State

_LOG_POLL_SECONDS = 0.5


def status(arguments: argparse.Namespace) -> int:
    """``fastsd status``: of one tree, or of all that were watched here. Exit code 0 with or without a daemon."""
    states = [State.of(arguments.root, os.environ)] if arguments.root else State.all(os.environ)
    if not states:
        if not arguments.json:
            print("No tree has been watched on this machine yet. Start with: fastsd up ROOT")
        return DONE
    for state in states:
        value = _status_of(state)
        if arguments.json:
            print_json(value)
        else:
            _show_status(value)
    return DONE


def _status_of(state: State) -> dict[str, Any]:
    nothing = {"root": os.fspath(state.root), "sessions": []}
    try:
        answer = ask(state.socket, "status")
        return {**nothing, "running": True, **{key: value for key, value in answer.items() if key != "ok"}}
    except NoDaemon:
        try:
            value = json.loads(state.snapshot.read_bytes())
        except (OSError, ValueError):
            value = None
        return {**nothing, **(value if isinstance(value, dict) else {}), "running": False}


def _show_status(value: Mapping[str, Any]) -> None:
    if value["running"]:
        tree = value.get("tree", {})
        who = f"process {value.get('pid')}, since {value.get('since')}"
        print(f"{value['root']}: {value.get('state', 'running')} ({who})")
        if value.get("error"):
            print(f"  it cannot tell more: {value['error']}")
        events = "events and scans" if tree.get("events") else "scans"
        print(f"  watching {tree.get('files', 0):,} files in {tree.get('folders', 0):,} folders by {events}")
        if tree.get("unsettled"):
            print(f"  {tree['unsettled']:,} files are settling")
        for line in (tree.get("reason"), *value.get("gates", {}).values()):
            if line:
                print(f"  {line}")
        if value.get("webui"):
            print(f"  WebUI: {value['webui']}")
    else:
        seen = f", last seen {value['at']}" if value.get("at") else ""
        print(f"{value['root']}: no daemon runs{seen}. Start it with: fastsd up {value['root']}")
    for line in value.get("blocked", []):
        print(f"  {line}")
    for session in value.get("sessions", []):
        counts = f"{session['cropped']} of {session['pictures']} cropped, {session['captioned']} captioned"
        print(f"\n  {session['name']}: {session['state']}\n    {counts}")
        for label in ("waits", "models", "trouble", "hints", "notes"):
            for line in session.get(label, [])[:8]:
                print(f"    {label}: {line}")


def jobs(arguments: argparse.Namespace) -> int:
    """``fastsd jobs``: with a daemon from it, without one from the file it left."""
    try:
        state = state_for(arguments.root)
    except WrongUse as error:
        return complain(str(error), USAGE)
    try:
        rows = ask(state.socket, "jobs", all=arguments.all).get("jobs", [])
    except NoDaemon:
        rows = _jobs_in_file(state, everything=arguments.all)
    if arguments.json:
        for row in rows:
            print_json(row)
        return DONE
    if not rows:
        print("No jobs." if arguments.all else "No jobs are waiting, running or failed (--all shows the done ones).")
    for row in rows:
        progress = row["progress"]
        far = f"{100 * progress['done'] / progress['total']:3.0f} %" if progress.get("total") else "     "
        problem = row["problem"].get("message") or row["problem"].get("reason") or row["problem"].get("what") or ""
        head = f"{row['id']:>6}  {row['state']:<9} {row['kind']:<8} {far}"
        print(f"{head}  {_printable(row['subject'])}  {problem}".rstrip())
    return DONE


def _jobs_in_file(state: State, *, everything: bool) -> list[dict[str, Any]]:
    from daemon.jobs import STATES
    from daemon.queue_file import open_reader

    reader = open_reader(state.queue)
    if reader is None:
        return []
    with reader:
        return [job.to_json() for job in reader.jobs(states=[name for name in STATES if everything or name != "done"])]


def _printable(name: str) -> str:
    return name.encode("utf-8", errors="replace").decode().replace("\n", "?")


def _tell(arguments: argparse.Namespace, command: str, said: str, **parameters: Any) -> int:
    try:
        answer = ask_daemon(arguments.root, command, **parameters)
    except WrongUse as error:
        return complain(str(error), FAILED)
    if not answer.get("ok"):
        return complain(str(answer.get("error")), FAILED)
    if arguments.json:
        print_json(answer)
    else:
        print(said.format(**answer))
    return DONE


def retry(arguments: argparse.Namespace) -> int:
    """``fastsd retry [N …]``."""
    return _tell(arguments, "retry", "{count} to be tried again.", jobs=arguments.jobs)


def cancel(arguments: argparse.Namespace) -> int:
    """``fastsd cancel N …``."""
    return _tell(arguments, "cancel", "{count} cancelled.", jobs=arguments.jobs)


def pause(arguments: argparse.Namespace) -> int:
    """``fastsd pause``."""
    return _tell(arguments, "pause", "Paused: nothing new is started. Go on with: fastsd resume")


def resume(arguments: argparse.Namespace) -> int:
    """``fastsd resume``."""
    return _tell(arguments, "resume", "Going on.")


def logs(arguments: argparse.Namespace) -> int:
    """``fastsd logs [-f]``."""
    try:
        file = state_for(arguments.root).logs / "daemon.log"
    except WrongUse as error:
        return complain(str(error), USAGE)
    if not file.exists():
        return complain(f"There is no log yet: {file}", FAILED)
    with file.open(encoding="utf-8", errors="replace") as reader:
        sys.stdout.writelines(deque(reader, max(arguments.lines, 0)))
        if arguments.follow:
            _follow(reader, file)
    return DONE


def _follow(reader: TextIO, file: Path) -> None:
    while file.parent.exists():
        line = reader.readline()
        if line:
            sys.stdout.write(line)
            sys.stdout.flush()
        elif _was_replaced(reader, file):
            with file.open(encoding="utf-8", errors="replace") as newer:
                _follow(newer, file)
            return
        else:
            time.sleep(_LOG_POLL_SECONDS)


def _was_replaced(reader: TextIO, file: Path) -> bool:
    """Whether the log was full and another one begun."""
    try:
        return not os.path.samestat(os.fstat(reader.fileno()), file.stat())
    except FileNotFoundError:
        return False
