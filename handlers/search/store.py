"""The index of a tree's embeddings: which picture has which content, and where that content's vector lies.

A folder with a SQLite file and a file of float16 rows. SQLite's own lock is the writers' lock: rows are appended and
synced inside its transaction, so a row is told of only when it is whole, and what a killed writer left behind the last
known row is written over. Vectors belong to contents (SHA-256), not to names: what is moved or copied is not computed
again. Neither numpy nor torch is needed here: the daemon looks into it, too.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_NAME = "search.sqlite"
_BUSY_SECONDS = 120.0
_ITEM_BYTES = 2
_WASTE = 1000
"""Vectors of contents that are nowhere in the tree any more are kept up to so many, or up to as many as are in use:
a picture that was away for a moment need not be looked at again."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS about (
    one INTEGER PRIMARY KEY CHECK (one = 1), model TEXT, width INTEGER, generation INTEGER
);
CREATE TABLE IF NOT EXISTS content (sha256 TEXT PRIMARY KEY, row INTEGER UNIQUE) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS picture (
    path BLOB PRIMARY KEY, scope BLOB NOT NULL, size INTEGER, mtime_ns INTEGER, sha256 TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS picture_by_scope ON picture (scope);
CREATE INDEX IF NOT EXISTS picture_by_content ON picture (sha256);
CREATE TABLE IF NOT EXISTS scope (path BLOB PRIMARY KEY, digest TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS twin (scope BLOB NOT NULL, one BLOB NOT NULL, other BLOB NOT NULL, cosine REAL NOT NULL);
CREATE INDEX IF NOT EXISTS twin_by_scope ON twin (scope);
"""


@dataclass(frozen=True)
class Picture:
    """A picture of the tree as it was looked at.

    Attributes:
        path: in the tree.
        size: bytes.
        mtime_ns: time of change.
        sha256: of its bytes; "" while it is not known.
    """

    path: str
    size: int
    mtime_ns: int
    sha256: str = ""


@dataclass(frozen=True)
class Twins:
    """Two pictures that look the same by their embeddings.

    Attributes:
        one, other: their paths in the tree.
        cosine: how alike they are; 1 is the same.
    """

    one: str
    other: str
    cosine: float


class Store:
    """The index in a folder. One instance a thread; several processes may have one open.

    Args:
        folder: where it lies; made when something is written.
        model: what the vectors were made by; vectors of another are thrown away.
        width: numbers of a vector.
    """

    def __init__(self, folder: Path, model: str, width: int) -> None:
        self.width = width
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._connection = sqlite3.connect(folder / _NAME, timeout=_BUSY_SECONDS, isolation_level=None)
        self._connection.executescript(_SCHEMA)
        with self._writing():
            found = self._connection.execute("SELECT model, width, generation FROM about").fetchone()
            if found is None or found[:2] != (model, width):
                for emptied in ("content", "picture", "scope", "twin", "about"):
                    self._connection.execute(f"DELETE FROM {emptied}")  # noqa: S608 - a name of ours
                generation = 1 if found is None else found[2] + 1
                self._connection.execute("INSERT INTO about VALUES (1, ?, ?, ?)", (model, width, generation))
            if not self._vectors.is_file():  # it was deleted, and the database was not
                self._connection.execute("DELETE FROM content")
                self._connection.execute("DELETE FROM scope")
                self._vectors.touch()
        self._sweep()

    def close(self) -> None:
        """Close the database."""
        self._connection.close()

    def known(self) -> dict[str, Picture]:
        """Every picture: path → what was seen of it."""
        rows = self._connection.execute("SELECT path, size, mtime_ns, sha256 FROM picture")
        return {os.fsdecode(row[0]): Picture(os.fsdecode(row[0]), *row[1:]) for row in rows}

    def missing(self, contents: Iterable[str]) -> list[str]:
        """Those contents that were never looked at, each once, in order."""
        have = {row[0] for row in self._connection.execute("SELECT sha256 FROM content")}
        return [sha256 for sha256 in dict.fromkeys(contents) if sha256 not in have]

    def add(self, vectors: Mapping[str, bytes | None]) -> None:
        """Keep vectors: content → float16 bytes, None for a content that is no picture.

        Raises:
            OSError: the disk is full or failed; then nothing was kept.
            ValueError: a vector has another width.
        """
        with self._writing():
            have = {row[0] for row in self._connection.execute("SELECT sha256 FROM content")}
            new = {sha256: vector for sha256, vector in vectors.items() if sha256 not in have}
            whole = [(sha256, vector) for sha256, vector in new.items() if vector is not None]
            if any(len(vector) != self.width * _ITEM_BYTES for _sha256, vector in whole):
                message = f"a vector has {self.width} numbers of {_ITEM_BYTES} bytes"
                raise ValueError(message)
            first = self._rows()
            self._append(first, b"".join(vector for _sha256, vector in whole))
            rows = [(sha256, first + number) for number, (sha256, _vector) in enumerate(whole)]
            rows += [(sha256, None) for sha256, vector in new.items() if vector is None]  # type: ignore[misc]
            self._connection.executemany("INSERT INTO content VALUES (?, ?)", rows)

    def _rows(self) -> int:
        return int(self._connection.execute("SELECT coalesce(max(row) + 1, 0) FROM content").fetchone()[0])

    def _append(self, first: int, content: bytes) -> None:
        """Write rows behind the last known one, and sync them."""
        if not content:
            return
        with self._vectors.open("r+b") as file:
            file.seek(first * self.width * _ITEM_BYTES)
            file.write(content)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())

    def replace_scope(
        self, scope: str, pictures: Collection[Picture], digest: str, twins: Iterable[Twins] = ()
    ) -> None:
        """Say which pictures a part of the tree holds now; what it held besides is forgotten.

        Args:
            scope: the name of the part: a session's folder.
            pictures: all of them, with their contents.
            digest: what the caller knows this state by; see ``digests``.
            twins: the near ones among them.
        """
        key = os.fsencode(scope)
        with self._writing():
            self._connection.execute("DELETE FROM picture WHERE scope=?", (key,))
            self._put(pictures, key)
            self._connection.execute("INSERT OR REPLACE INTO scope VALUES (?, ?)", (key, digest))
            self._connection.execute("DELETE FROM twin WHERE scope=?", (key,))
            rows = [(key, os.fsencode(pair.one), os.fsencode(pair.other), pair.cosine) for pair in twins]
            self._connection.executemany("INSERT INTO twin VALUES (?, ?, ?, ?)", rows)
        self._compact()

    def replace_all(self, pictures: Collection[Picture]) -> None:
        """Say which pictures the whole tree holds now. Parts of it that change by this have no digest any more."""
        known = self.known()
        now = {picture.path: picture for picture in pictures}
        gone = known.keys() - now.keys()
        changed = {path for path, picture in now.items() if known.get(path) != picture}
        with self._writing():
            scopes = {
                row[1]: None
                for row in self._connection.execute("SELECT path, scope FROM picture")
                if os.fsdecode(row[0]) in gone or os.fsdecode(row[0]) in changed
            }
            of = dict(self._connection.execute("SELECT path, scope FROM picture").fetchall())
            self._connection.executemany("DELETE FROM picture WHERE path=?", [(os.fsencode(path),) for path in gone])
            for path in changed:
                self._put([now[path]], of.get(os.fsencode(path), b"\0"))
            self._connection.executemany("DELETE FROM scope WHERE path=?", [(scope,) for scope in scopes])
        self._compact()

    def _put(self, pictures: Iterable[Picture], scope: bytes) -> None:
        self._connection.executemany(
            "INSERT OR REPLACE INTO picture VALUES (?, ?, ?, ?, ?)",
            ((os.fsencode(found.path), scope, found.size, found.mtime_ns, found.sha256) for found in pictures),
        )

    def rows(self) -> tuple[Path, list[tuple[str, int]]]:
        """The file of vectors, and (path, row) of every picture that has one.

        The file stays what it is as long as it is open, whatever is written meanwhile.
        """
        sql = "SELECT path, row FROM picture JOIN content USING (sha256) WHERE row IS NOT NULL ORDER BY path"
        with self._reading():
            return self._vectors, [(os.fsdecode(path), row) for path, row in self._connection.execute(sql)]

    def rows_of(self, contents: Collection[str]) -> tuple[Path, dict[str, int]]:
        """The file of vectors, and content → row of those contents that have one."""
        wanted = set(contents)
        with self._reading():
            found = self._connection.execute("SELECT sha256, row FROM content WHERE row IS NOT NULL").fetchall()
            return self._vectors, {sha256: row for sha256, row in found if sha256 in wanted}

    @property
    def _vectors(self) -> Path:
        generation = self._connection.execute("SELECT generation FROM about").fetchone()[0]
        return self._folder / f"vectors-{generation}.f16"

    def _compact(self) -> None:
        """Throw vectors away that nobody needs, once they are many: the rest moves into a new file."""
        with self._writing():
            total, kept = self._connection.execute(
                "SELECT count(*), coalesce(sum(sha256 IN (SELECT sha256 FROM picture)), 0) FROM content"
            ).fetchone()
            if total - kept <= max(_WASTE, kept):
                return
            before = self._vectors
            self._connection.execute("DELETE FROM content WHERE sha256 NOT IN (SELECT sha256 FROM picture)")
            rows = self._connection.execute(
                "SELECT sha256, row FROM content WHERE row IS NOT NULL ORDER BY row"
            ).fetchall()
            self._connection.execute("UPDATE about SET generation = generation + 1")
            size = self.width * _ITEM_BYTES
            with before.open("rb") as source, self._vectors.open("wb") as target:
                for _sha256, row in rows:
                    source.seek(row * size)
                    target.write(source.read(size))
                target.flush()
                os.fsync(target.fileno())
            # In the order of their rows: no two contents ever have the same one.
            self._connection.executemany(
                "UPDATE content SET row=? WHERE sha256=?", [(number, sha256) for number, (sha256, _) in enumerate(rows)]
            )
        self._sweep()

    def _sweep(self) -> None:
        """Remove files of vectors that a compaction left, or did not come to use."""
        with self._writing():
            current = self._vectors
            for file in self._folder.glob("vectors-*.f16"):
                if file != current:
                    file.unlink(missing_ok=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        with self._ending():
            yield

    @contextmanager
    def _reading(self) -> Iterator[None]:
        self._connection.execute("BEGIN")
        with self._ending():
            yield

    @contextmanager
    def _ending(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")


def digests(folder: Path) -> dict[str, str]:
    """Which state of each part of the tree an index holds: scope → digest. Empty where there is no index."""
    return {os.fsdecode(row[0]): row[1] for row in _peek(folder, "SELECT path, digest FROM scope")}


def digest_of(folder: Path, scope: str) -> str | None:
    """Which state of one part of the tree an index holds, None where it holds none."""
    rows = _peek(folder, "SELECT digest FROM scope WHERE path=?", os.fsencode(scope))
    return rows[0][0] if rows else None


def twins_of(folder: Path, scope: str) -> list[Twins]:
    """The near pictures that an index knows of in a part of the tree."""
    rows = _peek(folder, "SELECT one, other, cosine FROM twin WHERE scope=?", os.fsencode(scope))
    return [Twins(os.fsdecode(one), os.fsdecode(other), cosine) for one, other, cosine in rows]


def _peek(folder: Path, sql: str, *values: bytes) -> list[tuple[Any, ...]]:
    """Rows of an index, read without changing anything; none where it is not there or cannot be read."""
    file = folder / _NAME
    if not file.is_file():
        return []
    try:
        with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True, timeout=1.0)) as connection:
            return connection.execute(sql, values).fetchall()
    except sqlite3.Error:
        return []
