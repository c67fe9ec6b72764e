"""A daemon as its users run it: ``fastsd up`` as a process of its own, on a tree and with an empty state folder."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml

from daemon.client import NoDaemon, ask
from daemon.state import State
from sessions.manifest import Manifest

Found = TypeVar("Found")
STANDIN = Path(__file__).parent / "standins" / "webui.py"


def until(look: Callable[[], Found | None], what: str, seconds: float = 120.0) -> Found:
    """Look until there is something; fails after a deadline."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = look()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds:.0f} s: {what}")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


class DaemonProcess:
    """One tree and the daemon that watches it.

    Args:
        folder: an empty folder: the tree, the state and the WebUI's models come into it.
        cache: where the miniatures are, so that each test need not build them.

    Attributes:
        wrapper: a program and its arguments that each command is run by; empty: none.
    """

    def __init__(self, folder: Path, cache: Path) -> None:
        self.root = folder / "tree"
        self.root.mkdir(parents=True)
        self.state_home = folder / "state"
        self.models = folder / "webui-models"
        self.models.mkdir()
        self.drawn = folder / "drawn.jsonl"
        self.log = folder / "daemon.log"
        self.state_home.mkdir()
        (self.state_home / "cache").symlink_to(cache)
        self.environment = {
            **os.environ,
            "FASTSD_STATE": str(self.state_home),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONWARNINGS": "default",
        }
        self.process: subprocess.Popen[bytes] | None = None
        self.wrapper: list[str] = []

    def settings(self, **keys: Any) -> None:
        """Write fastsd.yaml."""
        (self.root / "fastsd.yaml").write_text(yaml.safe_dump(keys))

    def webui_keys(self, *faults: str) -> dict[str, Any]:
        """``webui:`` for a stand-in that the daemon starts."""
        port = free_port()
        return {
            "kind": "a1111",
            "url": f"http://127.0.0.1:{port}",
            "command": [
                sys.executable,
                str(STANDIN),
                *("--port", str(port), "--models", str(self.models), "--drawn", str(self.drawn)),
                *faults,
            ],
            "switch": "always",
        }

    @property
    def state(self) -> State:
        """The tree's state."""
        return State.of(self.root, self.environment)

    def command(self, *arguments: str) -> list[str]:
        """The command line of ``fastsd``."""
        return [*self.wrapper, sys.executable, "-m", "daemon", *arguments]

    def start(self, *arguments: str) -> None:
        """Start ``fastsd up``, in a process group of its own, and wait until it answers."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command("up", str(self.root), *arguments),
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        until(self.answers, f"the daemon answers; its log: {self.log}", 60)

    def answers(self) -> bool:
        """Whether the daemon answers; fails where it has ended."""
        if self.process is not None and self.process.poll() is not None:
            raise AssertionError(f"the daemon ended: {self.log.read_text()[-3000:]}")
        return self.ask("status") is not None

    def ask(self, command: str, **parameters: Any) -> dict[str, Any] | None:
        """Ask over the control socket; None while nobody listens."""
        try:
            return ask(self.state.socket, command, **parameters)
        except NoDaemon:
            return None

    def jobs(self, kind: str, state: str) -> list[dict[str, Any]]:
        """Jobs of a kind in a state."""
        answer = self.ask("jobs", all=True) or {}
        return [job for job in answer.get("jobs", []) if (job["kind"], job["state"]) == (kind, state)]

    def run(self, *arguments: str, seconds: float = 300) -> subprocess.CompletedProcess[str]:
        """Run a command of ``fastsd`` to its end."""
        return subprocess.run(
            self.command(*arguments),
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )

    def kill(self) -> None:
        """kill -9 of the daemon's whole process group."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        until(lambda: not self._workers(), "the workers died with their daemon", 20)

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        if self.process is None or self.process.poll() is not None:
            return -1 if self.process is None else self.process.returncode
        self.process.terminate()
        return self.process.wait(60)

    def _workers(self) -> list[int]:
        mark = f"FASTSD_WORKER_OF={self.state.folder}".encode()
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
            except OSError:
                continue
        return found

    def manifest(self, session: Path) -> Manifest:
        """The manifest of a session as it is on disk."""
        return Manifest.load(session)

    def once(self) -> int:
        """``fastsd up --once``: its exit code. What it wrote is in the log."""
        done = self.run("up", os.fspath(self.root), "--once")
        with self.log.open("a") as log:
            log.write(done.stderr)
        return done.returncode

    def status(self) -> dict[str, Any]:
        """``fastsd status --json``."""
        done = self.run("status", os.fspath(self.root), "--json")
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def drawings(self) -> list[dict[str, Any]]:
        """What the WebUI drew."""
        if not self.drawn.exists():
            return []
        return [json.loads(line) for line in self.drawn.read_text().splitlines()]
