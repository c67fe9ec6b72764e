"""The state folder: one a root, on a local disk, never in the tree. The lock in it names who holds the tree."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sessions.layout import PRIVATE

# The longest path that fits a Unix socket's address on Linux, with its closing zero byte (unix(7)).
_SOCKET_PATH_BYTES = 107


def state_home(environment: Mapping[str, str]) -> Path:
    """The folder of all states: ``$FASTSD_STATE``, else ``$XDG_STATE_HOME/fastsd``, else ``~/.local/state/fastsd``."""
    if chosen := environment.get("FASTSD_STATE"):
        return Path(chosen)
    if home := environment.get("XDG_STATE_HOME"):
        return Path(home) / "fastsd"
    return Path(environment.get("HOME") or "~").expanduser() / ".local" / "state" / "fastsd"


def cache_home(environment: Mapping[str, str]) -> Path:
    """The folder of downloads: in a chosen state folder, else ``$XDG_CACHE_HOME/fastsd``, else ``~/.cache/fastsd``."""
    if chosen := environment.get("FASTSD_STATE"):
        return Path(chosen) / "cache"
    if home := environment.get("XDG_CACHE_HOME"):
        return Path(home) / "fastsd"
    return Path(environment.get("HOME") or "~").expanduser() / ".cache" / "fastsd"


@dataclass(frozen=True)
class State:
    """The state of one root.

    Attributes:
        root: the tree, resolved.
        folder: where its databases, logs, lock and socket lie.
    """

    root: Path
    folder: Path

    @classmethod
    def of(cls, root: Path, environment: Mapping[str, str]) -> State:
        """The state of a root; nothing is made on disk."""
        resolved = root.resolve()
        digest = hashlib.sha256(os.fsencode(resolved)).hexdigest()[:8]
        name = re.sub(r"[^A-Za-z0-9._-]+", "_", resolved.name) or "root"
        return cls(resolved, state_home(environment) / f"{name[:40]}-{digest}")

    @classmethod
    def all(cls, environment: Mapping[str, str]) -> list[State]:
        """The states of all roots that a daemon has ever been started for here."""
        found = []
        home = state_home(environment)
        for file in sorted(home.glob("*/root.json")):
            try:
                root = json.loads(file.read_bytes())["root"]
            except (OSError, ValueError, KeyError, TypeError):
                continue
            found.append(cls(Path(root), file.parent))
        return found

    @property
    def index(self) -> Path:
        """The database of settled facts."""
        return self.folder / "index.sqlite"

    @property
    def queue(self) -> Path:
        """The database of jobs."""
        return self.folder / "queue.sqlite"

    @property
    def logs(self) -> Path:
        """The folder of the daemon's and the workers' logs."""
        return self.folder / "logs"

    @property
    def snapshot(self) -> Path:
        """What the daemon last said about itself, for when it does not run."""
        return self.folder / "status.json"

    @property
    def socket(self) -> Path:
        """The control socket; in the temp folder where the state folder's path is too long for a socket."""
        path = self.folder / "control.sock"
        if len(os.fsencode(path)) <= _SOCKET_PATH_BYTES:
            return path
        digest = hashlib.sha256(os.fsencode(self.folder)).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"fastsd-{os.getuid()}-{digest}.sock"

    def prepare(self) -> None:
        """Make the folder, readable by its owner only.

        Raises:
            OSError: it cannot be made.
        """
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.logs.mkdir(exist_ok=True, mode=0o700)
        (self.folder / "root.json").write_text(json.dumps({"root": os.fspath(self.root)}) + "\n", encoding="utf-8")


class TreeIsHeld(Exception):  # noqa: N818 - it says what is the case
    """Another process watches this tree.

    Attributes:
        holder: what the lock says of it: ``pid``, ``host``, ``since``.
    """

    def __init__(self, holder: dict[str, Any], root: Path) -> None:
        self.holder = holder
        where = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}, since {holder.get('since', '?')}"
        super().__init__(f"{root} is already watched by {where}. Stop that one first, or ask it: fastsd status {root}")


class TreeLock:
    """One process a tree. The kernel gives the lock back when its holder dies, however it dies.

    Two files are locked: one in the state folder, and one in the tree itself, so that a second daemon with another
    state folder is found out too. Mounts that know no locks have the first alone.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self._descriptors: list[int] = []

    def __enter__(self) -> Self:
        """Take the lock.

        Raises:
            TreeIsHeld: another process has it.
        """
        try:
            self._take(self._state.folder / "lock")
            with suppress(OSError):
                # An empty root may be a mount point whose mount is missing: nothing may be left in it.
                if any(self._state.root.iterdir()):
                    in_tree = self._state.root / PRIVATE / "lock"
                    in_tree.parent.mkdir(exist_ok=True)
                    self._take(in_tree)
        except TreeIsHeld:
            self._give_back()
            raise
        return self

    def _take(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = read_holder(descriptor)
            os.close(descriptor)
            raise TreeIsHeld(holder, self._state.root) from None
        except OSError:
            os.close(descriptor)
            raise
        self._descriptors.append(descriptor)
        os.ftruncate(descriptor, 0)
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime())
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Give the lock back."""
        self._give_back()

    def _give_back(self) -> None:
        while self._descriptors:
            descriptor = self._descriptors.pop()
            with suppress(OSError):
                os.ftruncate(descriptor, 0)
            os.close(descriptor)


@contextmanager
def nobody_watching(folder: Path) -> Iterator[None]:
    """Keep daemons away from a folder for a moment, of whatever tree around it and with whatever state.

    Raises:
        TreeIsHeld: one watches it.
    """
    descriptors: list[int] = []
    try:
        for above in (folder, *folder.parents):
            with suppress(OSError):  # no daemon was ever there, or it is not ours to look
                descriptors.append(os.open(above / PRIVATE / "lock", os.O_RDWR | os.O_CLOEXEC))
                try:
                    fcntl.flock(descriptors[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise TreeIsHeld(read_holder(descriptors[-1]), above) from None
        yield
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def read_holder(descriptor: int) -> dict[str, Any]:
    """What the holder of a lock wrote into it; empty where nothing can be read."""
    try:
        value = json.loads(os.pread(descriptor, 4096, 0))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
