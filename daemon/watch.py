"""Hints that something happened below a root: paths to look at soon, no more. watchdog, filtered, over inotify.

Events lie (a folder that was moved out keeps reporting under its old path), get lost (a queue that overflows, a limit
of watches) and come too early (a file is created before it is written). So nothing is done here but remember paths.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import re
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from watchdog.events import (
    DirCreatedEvent,
    DirDeletedEvent,
    DirMovedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)

_EVENTS: list[type[FileSystemEvent]] = [
    FileCreatedEvent,
    FileClosedEvent,
    FileMovedEvent,
    FileDeletedEvent,
    DirCreatedEvent,
    DirMovedEvent,
    DirDeletedEvent,
]
# File systems whose other writers cause no event here. fuseblk (NTFS on a local disk) is not among them.
_SILENT_TYPES = frozenset(
    {"fuse", "9p", "drvfs", "cifs", "smb3", "smbfs", "nfs", "nfs4", "afs", "ceph", "lustre", "beegfs", "gpfs"}
    | {"glusterfs", "vboxsf", "prl_fs", "virtiofs", "davfs"},
)
_LIMIT_FILE = Path("/proc/sys/fs/inotify/max_user_watches")


@dataclass(slots=True)
class Hints:
    """Paths to look at, relative to the root.

    Attributes:
        files: files that may have appeared, changed or gone.
        folders: folders that may have come or gone, with all below them.
        overflow: events were lost: everything must be looked at.
    """

    files: set[str] = field(default_factory=set)
    folders: set[str] = field(default_factory=set)
    overflow: bool = False

    def __bool__(self) -> bool:
        return bool(self.files or self.folders or self.overflow)

    def outermost_folders(self) -> list[str]:
        """The hinted folders, without those that lie in another one."""
        outermost: list[str] = []
        # A folder sorts right before what lies in it once "/" sorts before all else.
        for folder in sorted(self.folders, key=lambda path: path.split("/")):
            if not outermost or not (outermost[-1] == "" or folder.startswith(outermost[-1] + "/")):
                outermost.append(folder)
        return outermost

    def crowded(self, most: int) -> tuple[list[str], list[str]]:
        """The hinted files, and instead of more than ``most`` in one folder, that folder.

        Returns:
            Files to look at one by one, and folders to look into (not below them).
        """
        by_folder: dict[str, list[str]] = {}
        for path in self.files:
            by_folder.setdefault(path.rpartition("/")[0], []).append(path)
        files = [path for paths in by_folder.values() if len(paths) <= most for path in paths]
        return files, [folder for folder, paths in by_folder.items() if len(paths) > most]


class HintBox:
    """Where event threads leave hints, and the loop takes them. Thread-safe.

    Args:
        wake: called, from any thread, when the box was empty and is no longer.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._lock = threading.Lock()
        self._hints = Hints()

    def add(self, path: str, *, is_folder: bool) -> None:
        """Leave a path."""
        with self._lock:
            was_empty = not self._hints
            (self._hints.folders if is_folder else self._hints.files).add(path)
        if was_empty:
            self._wake()

    def overflow(self) -> None:
        """Say that events were lost."""
        with self._lock:
            was_empty = not self._hints
            self._hints.overflow = True
        if was_empty:
            self._wake()

    def take(self) -> Hints:
        """Everything that was left since last time."""
        with self._lock:
            hints, self._hints = self._hints, Hints()
        return hints


class _Handler(FileSystemEventHandler):
    """Turns events into hints; does nothing else, because slow handlers lose events."""

    def __init__(self, root: str, box: HintBox) -> None:
        self._prefix = root.rstrip("/") + "/"
        self._root = root
        self._box = box

    def dispatch(self, event: FileSystemEvent) -> None:
        # Both names of a move: the old one has vanished, the new one appeared.
        for path in (event.src_path, event.dest_path):
            name = os.fsdecode(path) if path else ""
            if name.startswith(self._prefix):
                self._box.add(name[len(self._prefix) :], is_folder=event.is_directory)
            elif name == self._root:
                self._box.add("", is_folder=True)


class _OverflowListener(logging.Handler):
    """watchdog's only sign of lost events is a line in its log."""

    def __init__(self, box: HintBox) -> None:
        super().__init__(logging.WARNING)
        self._box = box

    def emit(self, record: logging.LogRecord) -> None:
        if "overflow" in record.getMessage().lower():
            self._box.overflow()


class TreeEvents:
    """The events of one tree, as hints.

    Args:
        root: absolute path, with no symbolic link in it.
        box: where hints are left.
    """

    def __init__(self, root: str, box: HintBox) -> None:
        from watchdog.observers.inotify import InotifyObserver

        self._silence()
        self._root = root
        self._observer = InotifyObserver()
        self._observer.schedule(_Handler(root, box), root, recursive=True, event_filter=_EVENTS)
        self._listener = _OverflowListener(box)
        self._logger = logging.getLogger("watchdog.observers")

    @staticmethod
    def _silence() -> None:
        # They print the whole table of watches: hundreds of kilobytes.
        warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"watchdog\.observers\..*")

    def start(self) -> None:
        """Watch every folder that is there now, and those that come later.

        Raises:
            OSError: the root cannot be watched.
        """
        self._logger.addHandler(self._listener)
        try:
            self._observer.start()
        except BaseException:
            self._logger.removeHandler(self._listener)
            with contextlib.suppress(Exception):
                self._observer.stop()
            raise

    def stop(self) -> None:
        """Watch no longer; returns when the threads have ended."""
        self._logger.removeHandler(self._listener)
        self._observer.stop()
        self._observer.join(timeout=10.0)

    @property
    def is_alive(self) -> bool:
        """Whether events can still come: false once the root itself was deleted."""
        return self._observer.is_alive() and all(emitter.is_alive() for emitter in self._observer.emitters)


def watch_limit() -> int | None:
    """How many folders this user may watch (``fs.inotify.max_user_watches``); None where that cannot be told."""
    try:
        return int(_LIMIT_FILE.read_text())
    except (OSError, ValueError):
        return None


def limit_is_reached(root: str) -> bool:
    """Whether the kernel refuses one more watch: watchdog passes over that in silence. Tries it on the root."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.inotify_init1(os.O_CLOEXEC)
    if descriptor < 0:
        return False
    try:
        # IN_DELETE_SELF: any mask will do.
        return libc.inotify_add_watch(descriptor, os.fsencode(root), 0x400) < 0 and ctypes.get_errno() == errno.ENOSPC
    finally:
        os.close(descriptor)


def file_system_type(path: str, mounts: str) -> str:
    """The type of the file system that a path lies on.

    Args:
        path: absolute, with no symbolic link in it.
        mounts: the text of /proc/self/mounts.

    Returns:
        "" when no line fits.
    """
    best = ""
    found = ""
    for line in mounts.splitlines():
        parts = line.split(" ")
        if len(parts) < 3:
            continue
        place = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), parts[1])
        inside = path == place or path.startswith(place.rstrip("/") + "/")
        # The last of equal ones lies on top.
        if inside and len(place) >= len(best):
            best, found = place, parts[2]
    return found


def sends_events(file_system: str) -> bool:
    """Whether every change on a file system of this type causes an inotify event here."""
    return file_system not in _SILENT_TYPES and not file_system.startswith("fuse.")


def numbers_files_for_good(file_system: str) -> bool:
    """Whether a file keeps its inode from one mount to the next; most FUSE file systems count anew."""
    return file_system != "fuse" and not file_system.startswith("fuse.")


def read_mounts() -> str:
    """The text of /proc/self/mounts; "" where there is none."""
    try:
        return Path("/proc/self/mounts").read_text(errors="surrogateescape")
    except OSError:
        return ""
