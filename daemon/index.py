"""What is known of each file: the facts that were settled and handed on. Plain data in SQLite, no policy.

The database is only a cache: delete it between two runs and everything is found, settled and handed on again. It lies
on a local disk, never in the tree. It is asked one folder at a time, so that 50,000 facts never lie in memory.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_VERSION = 1
_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS fact (
    folder BLOB NOT NULL, name BLOB NOT NULL, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, inode INTEGER NOT NULL,
    PRIMARY KEY (folder, name)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS root (only INTEGER PRIMARY KEY CHECK (only = 1), device TEXT NOT NULL, inode TEXT NOT NULL);
PRAGMA user_version = {_VERSION};
"""
_INTEGER = (1 << 63) - 1
INODE_MASK = _INTEGER
"""What SQLite's integers hold of an inode."""

Row = tuple[int, int, int]
"""Size, mtime_ns and inode of a known file."""


@dataclass(frozen=True, slots=True)
class Fact:
    """What one look at a path showed.

    Attributes:
        path: relative to the root, separated by ``/``, surrogate-escaped.
        size: bytes; -1 when nothing was there (see ``absent``).
        mtime_ns: modification time in nanoseconds.
        inode: the inode's lower 63 bits; 0 on file systems where it means nothing from one mount to the next.
    """

    path: str
    size: int
    mtime_ns: int
    inode: int

    @property
    def exists(self) -> bool:
        """Whether a file was there."""
        return self.size >= 0


def absent(path: str) -> Fact:
    """The fact that nothing is at a path."""
    return Fact(path, -1, 0, 0)


def fact_of(path: str, status: os.stat_result, *, inode_mask: int = INODE_MASK) -> Fact:
    """The fact that a stat of a regular file shows, within the integers that SQLite holds.

    Args:
        path: as in ``Fact``.
        status: of the file.
        inode_mask: 0 where inodes mean nothing.
    """
    mtime_ns = min(max(status.st_mtime_ns, -_INTEGER), _INTEGER)
    return Fact(path, min(status.st_size, _INTEGER), mtime_ns, status.st_ino & inode_mask)


@dataclass(frozen=True, slots=True)
class RootIdentity:
    """Which folder a root is: when it changes, another file system lies there, or another folder."""

    device: int
    inode: int


class Index:
    """The known facts of one tree.

    May be used from several threads: each call is one statement or one transaction.

    Args:
        path: of the database; made when missing, made anew when it is damaged or of another version.

    Raises:
        OSError, sqlite3.Error: it cannot be opened or made.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        try:
            self._database = self._open()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
                raise
            # It is only a cache: what is lost is settled and handed on again.
            for suffix in ("", "-wal", "-shm"):
                Path(f"{path}{suffix}").unlink(missing_ok=True)
            self._database = self._open()

    def _open(self) -> sqlite3.Connection:
        database = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, timeout=10.0)
        try:
            _check_version(database)
            database.execute("PRAGMA journal_mode = WAL")
            # NORMAL, not FULL: after a power cut the last facts may be missing, and are then only handed on again.
            database.execute("PRAGMA synchronous = NORMAL")
            database.execute("PRAGMA cache_size = -1024")
            database.executescript(_SCHEMA)
            database.execute("SELECT count(*) FROM (SELECT 1 FROM fact LIMIT 1)").fetchone()
        except BaseException:
            database.close()
            raise
        return database

    def close(self) -> None:
        """Close the database; using the index afterwards raises ``sqlite3.ProgrammingError``."""
        with self._lock:
            self._database.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")

    def rows(self, folder: bytes) -> dict[bytes, Row]:
        """The known files directly in a folder: name → (size, mtime_ns, inode); in bytes, as a scan gives them."""
        found = self._database.execute("SELECT name, size, mtime_ns, inode FROM fact WHERE folder = ?", (folder,))
        return {name: (size, mtime_ns, inode) for name, size, mtime_ns, inode in found}

    def known(self, folder: str) -> dict[str, Fact]:
        """The known facts directly in a folder: name → fact."""
        prefix = f"{folder}/" if folder else ""
        return {
            os.fsdecode(name): Fact(prefix + os.fsdecode(name), *row)
            for name, row in self.rows(os.fsencode(folder)).items()
        }

    def lookup(self, path: str) -> Fact | None:
        """The known fact of one path."""
        row = self._database.execute(
            "SELECT size, mtime_ns, inode FROM fact WHERE folder = ? AND name = ?",
            _key(path),
        ).fetchone()
        return None if row is None else Fact(path, *row)

    def folders(self, prefix: str = "") -> Iterator[str]:
        """The folders that hold known files, at and below a folder; the index may change meanwhile."""
        last: bytes | None = None
        encoded = os.fsencode(prefix)
        low, high = (encoded + b"/", encoded + b"0") if encoded else (b"", None)
        if encoded and self._holds(encoded):
            yield prefix
        while True:
            # "0" comes right after "/": everything from "a/" to before "a0" lies below "a". One seek a folder.
            if last is None:
                query, values = "folder >= ?", [low]
            else:
                query, values = "folder > ?", [last]
            if high is not None:
                query, values = query + " AND folder < ?", [*values, high]
            row = self._database.execute(
                f"SELECT folder FROM fact WHERE {query} ORDER BY folder LIMIT 1",  # noqa: S608 - fixed words
                values,
            ).fetchone()
            if row is None:
                return
            last = row[0]
            yield os.fsdecode(row[0])

    def _holds(self, folder: bytes) -> bool:
        return self._database.execute("SELECT 1 FROM fact WHERE folder = ? LIMIT 1", (folder,)).fetchone() is not None

    def under(self, prefix: str = "") -> Iterator[Fact]:
        """Every known fact below a folder, one folder in memory at a time; the index may change meanwhile."""
        for folder in self.folders(prefix):
            yield from self.known(folder).values()

    def count(self, prefix: str = "") -> int:
        """How many files are known at any depth below a folder."""
        encoded = os.fsencode(prefix)
        if not encoded:
            query, values = "SELECT count(*) FROM fact", []
        else:
            query = "SELECT count(*) FROM fact WHERE folder = ? OR (folder >= ? AND folder < ?)"
            values = [encoded, encoded + b"/", encoded + b"0"]
        return int(self._database.execute(query, values).fetchone()[0])

    def record(self, facts: Iterable[Fact]) -> None:
        """Remember facts, all or none."""
        rows = [(*_key(fact.path), fact.size, fact.mtime_ns, fact.inode) for fact in facts]
        if rows:
            with self._transaction() as database:
                database.executemany("INSERT OR REPLACE INTO fact VALUES (?, ?, ?, ?, ?)", rows)

    def forget(self, paths: Iterable[str]) -> None:
        """Forget paths, all or none; unknown ones are passed over."""
        keys = [_key(path) for path in paths]
        if keys:
            with self._transaction() as database:
                database.executemany("DELETE FROM fact WHERE folder = ? AND name = ?", keys)

    def root_identity(self) -> RootIdentity | None:
        """Which folder the root was when it was last believed."""
        row = self._database.execute("SELECT device, inode FROM root").fetchone()
        return None if row is None else RootIdentity(int(row[0]), int(row[1]))

    def record_root(self, identity: RootIdentity) -> None:
        """Remember which folder the root is."""
        # As text: device and inode numbers may be any 64-bit unsigned integers.
        with self._transaction() as database:
            database.execute(
                "INSERT OR REPLACE INTO root VALUES (1, ?, ?)", (str(identity.device), str(identity.inode))
            )


def _check_version(database: sqlite3.Connection) -> None:
    version = database.execute("PRAGMA user_version").fetchone()[0]
    if version not in (0, _VERSION):
        message = f"version {version} of the index is not ours"
        raise sqlite3.DatabaseError(message)


def _key(path: str) -> tuple[bytes, bytes]:
    folder, _, name = os.fsencode(path).rpartition(b"/")
    return folder, name
