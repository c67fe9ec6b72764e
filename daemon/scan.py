"""Compare a tree with the index: what appeared, changed, vanished. Events are hints; this is the truth.

Nothing is opened, only listed and stat-ed. A file or folder that vanishes meanwhile is no error. What cannot be read
says nothing about what was deleted, and a tree that cannot be reached says nothing at all.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from daemon.index import INODE_MASK, Fact, Index, RootIdentity, Row, absent, fact_of
from sessions.ignore import IgnoreRules

Scandir = Callable[[bytes], AbstractContextManager[Iterator["os.DirEntry[bytes]"]]]

_LOST = frozenset(
    {errno.ENOTCONN, errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.EHOSTDOWN, errno.ETIMEDOUT},
)
_GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG})
_FORMAT = 0o170000
_KINDS = {
    stat.S_IFLNK: "symbolic link",
    stat.S_IFIFO: "FIFO",
    stat.S_IFSOCK: "socket",
    stat.S_IFBLK: "device",
    stat.S_IFCHR: "device",
}
_LISTED_AT_MOST = 100


class Unreachable(Exception):  # noqa: N818 - the word for it
    """The tree cannot be looked at now: its mount is lost, or its root is not there. Nothing was deleted.

    Attributes:
        reason: one sentence for the person.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Changes:
    """What differs from the index in one folder.

    Attributes:
        folder: relative to the root; "" is the root.
        changed: facts of files that are new or differ.
        vanished: known paths at which no file is any more.
    """

    folder: str
    changed: list[Fact]
    vanished: list[str]


@dataclass(slots=True)
class Report:
    """What a walk saw besides changes; complete when the walk is.

    Attributes:
        folders: folders looked into, the start included.
        files: regular files, ignored ones left out.
        skipped: symbolic links, FIFOs, sockets and devices (the first hundred): path → what it is.
        skipped_count: how many of them there are.
        unreadable: folders that cannot be read: path → the system's words.
    """

    folders: int = 0
    files: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    skipped_count: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)

    def skip(self, path: str, mode: int) -> None:
        """Note something that is neither a file nor a folder; it is never opened."""
        self.skipped_count += 1
        if len(self.skipped) < _LISTED_AT_MOST:
            self.skipped[path] = _KINDS.get(stat.S_IFMT(mode), "special file")

    def blocks(self, folder: str) -> bool:
        """Whether a folder is, or lies in, one that cannot be read."""
        return any(folder == blocked or folder.startswith(f"{blocked}/") for blocked in self.unreadable)


def unreachable_reason(error: OSError, place: str) -> str | None:
    """Why an error means that the file system itself is lost; None when it does not."""
    if error.errno in _LOST:
        return f"{place} cannot be reached: {error.strerror} (errno {error.errno}). Is it still mounted?"
    return None


class Scanner:
    """Looks at one tree.

    Args:
        root: absolute path of the root.
        index: what is known.
        rules: what is ignored.
        skip_folder: whether a folder (relative path) is left out with all below it.
        inodes_mean_something: False on file systems (FUSE) that number files anew with every mount.
        scandir: ``os.scandir`` for bytes.
    """

    def __init__(
        self,
        root: str,
        index: Index,
        rules: IgnoreRules,
        skip_folder: Callable[[str], bool],
        *,
        inodes_mean_something: bool = True,
        scandir: Scandir = os.scandir,
    ) -> None:
        self._root = os.fsencode(root)
        self._name = root
        self._index = index
        self._rules = rules
        self._skip_folder = skip_folder
        self._inode_mask = INODE_MASK if inodes_mean_something else 0
        self._scandir = scandir

    def identity(self) -> RootIdentity:
        """Which folder the root is now.

        Raises:
            Unreachable: there is no folder.
        """
        try:
            status = os.stat(self._root)  # noqa: PTH116 - a path in bytes
        except OSError as error:
            raise self._root_lost(error) from error
        if not stat.S_ISDIR(status.st_mode):
            message = f"{self._name} is not a folder."
            raise Unreachable(message)
        return RootIdentity(status.st_dev, status.st_ino)

    def _root_lost(self, error: OSError) -> Unreachable:
        return Unreachable(
            unreachable_reason(error, self._name) or f"{self._name} cannot be read: {error.strerror}. Is it mounted?"
        )

    def is_left_out(self, path: str) -> bool:
        """Whether a folder, or one that it lies in, is ignored or skipped."""
        parts = path.split("/") if path else []
        return any(self._prunes("/".join(parts[:depth])) for depth in range(1, len(parts) + 1))

    def _prunes(self, folder: str) -> bool:
        return self._rules.ignores_folder(folder) or self._skip_folder(folder)

    def takes(self, path: str) -> bool:
        """Whether a file of this path is of interest at all."""
        return not self._rules.ignores_file(path) and not self.is_left_out(path.rpartition("/")[0])

    def look(self, path: str) -> Fact | None:
        """Look at one path.

        Returns:
            The fact of a regular file; ``absent`` when nothing or something else is there; None when nobody can tell.

        Raises:
            Unreachable: the file system is lost.
        """
        try:
            status = os.lstat(self._absolute(os.fsencode(path)))
        except OSError as error:
            if error.errno in _GONE:
                return absent(path)
            reason = unreachable_reason(error, self._name)
            if reason:
                raise Unreachable(reason) from error
            return None
        except ValueError:
            return absent(path)
        return self._fact(path, status) if stat.S_ISREG(status.st_mode) else absent(path)

    def is_folder(self, path: str) -> bool:
        """Whether a real folder is at a path."""
        try:
            return stat.S_ISDIR(os.lstat(self._absolute(os.fsencode(path))).st_mode)
        except OSError:
            return False

    def _fact(self, path: str, status: os.stat_result) -> Fact:
        return fact_of(path, status, inode_mask=self._inode_mask)

    def _absolute(self, folder: bytes) -> bytes:
        return self._root + b"/" + folder if folder else self._root

    def folder(self, folder: str, report: Report) -> Changes:
        """Compare one folder, without what lies in its subfolders.

        Raises:
            Unreachable: the file system, or the root, is lost.
        """
        return self._compare(os.fsencode(folder), report, [])

    def walk(self, start: str, report: Report) -> Iterator[Changes]:
        """Compare a folder and all below it; yields once a folder.

        Args:
            start: where to begin; "" is the root. Where it is gone, all that was known below it has vanished.
            report: filled on the way.

        Raises:
            Unreachable: the file system, or the root, is lost; then nothing that was yielded as vanished counts.
        """
        visited = set()
        pending = [os.fsencode(start)]
        while pending:
            folder = pending.pop()
            visited.add(folder)
            yield self._compare(folder, report, pending)
        # Known folders that nobody lists any more, unless they lie where we cannot or do not look.
        for known in self._index.folders(start):
            if os.fsencode(known) in visited or report.blocks(known) or self.is_left_out(known):
                continue
            yield Changes(known, [], [fact.path for fact in self._index.known(known).values()])

    def _compare(self, folder: bytes, report: Report, pending: list[bytes]) -> Changes:
        known = self._index.rows(folder)
        changed: list[Fact] = []
        prefix = folder + b"/" if folder else b""
        mask = self._inode_mask
        files = 0
        try:
            with self._scandir(self._absolute(folder)) as entries:
                for entry in entries:
                    name = entry.name
                    if entry.is_dir(follow_symlinks=False):
                        if not self._prunes(os.fsdecode(prefix + name)):
                            pending.append(prefix + name)
                        continue
                    try:
                        status = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    # The way of almost every file: three numbers that are equal, and nothing else is done.
                    row = known.get(name)
                    if (
                        row == (status.st_size, status.st_mtime_ns, status.st_ino & mask)
                        and status.st_mode & _FORMAT == stat.S_IFREG
                    ):
                        files += 1
                        del known[name]
                        continue
                    path = os.fsdecode(prefix + name)
                    if status.st_mode & _FORMAT != stat.S_IFREG:
                        if not self._rules.ignores_file(path):
                            report.skip(path, status.st_mode)
                        continue
                    known.pop(name, None)
                    if self._rules.ignores_file(path):
                        continue
                    files += 1
                    fact = self._fact(path, status)
                    if row != (fact.size, fact.mtime_ns, fact.inode):
                        changed.append(fact)
        except OSError as error:
            changed, known = self._cannot_list(folder, error, report)
        report.folders += 1
        report.files += files
        return Changes(os.fsdecode(folder), changed, [os.fsdecode(prefix + name) for name in known])

    def _cannot_list(self, folder: bytes, error: OSError, report: Report) -> tuple[list[Fact], dict[bytes, Row]]:
        name = os.fsdecode(folder)
        if not folder:
            raise self._root_lost(error) from error
        if error.errno in _GONE:
            return [], self._index.rows(folder)
        reason = unreachable_reason(error, f"{self._name}/{name}")
        if reason:
            raise Unreachable(reason) from error
        report.unreadable[name] = error.strerror or str(error)
        return [], {}
