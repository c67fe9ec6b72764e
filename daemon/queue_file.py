"""The queue's file: its tables, opening it to write or only to look, and looking."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Self

from daemon.jobs import STATES, Job, JobState, from_row, to_row

SCHEMA_VERSION = 1
_BUSY_MILLISECONDS = 10_000
_SCHEMA = """
CREATE TABLE job (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    key TEXT NOT NULL UNIQUE,
    kind TEXT NOT NULL,
    lane TEXT NOT NULL,
    session TEXT NOT NULL,
    subject TEXT NOT NULL,
    payload TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('ready','running','waiting','done','failed','refused','cancelled')),
    priority INTEGER NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    max_attempts INTEGER NOT NULL,
    interruptions INTEGER NOT NULL DEFAULT 0,
    run_at REAL NOT NULL,
    lease_until REAL,
    lease_token TEXT,
    progress TEXT NOT NULL DEFAULT '{}',
    problem TEXT NOT NULL DEFAULT '{}',
    created REAL NOT NULL,
    started REAL,
    ended REAL
) STRICT;
CREATE INDEX job_open ON job (lane, priority, run_at, id) WHERE ended IS NULL;
CREATE INDEX job_state ON job (state, kind, run_at);
CREATE INDEX job_session ON job (session, state);
"""


class JobReader:
    """Looks at the queue and changes nothing. Safe to use from several threads.

    Args:
        connection: an open connection; the reader closes it.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        connection.row_factory = sqlite3.Row
        self._connection = connection
        self._lock = threading.RLock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()

    def _rows(self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> list[sqlite3.Row]:
        with self._lock:
            return self._connection.execute(sql, parameters).fetchall()

    def job(self, identity: int) -> Job | None:
        """The job with this number."""
        return next((from_row(row) for row in self._rows("SELECT * FROM job WHERE id=?", (identity,))), None)

    def by_key(self, key: str) -> Job | None:
        """The job with this key."""
        return next((from_row(row) for row in self._rows("SELECT * FROM job WHERE key=?", (key,))), None)

    def jobs(
        self, states: Collection[JobState] = STATES, session: str | None = None, limit: int | None = None
    ) -> list[Job]:
        """Jobs in these states, newest number first; of one session, if given."""
        rows = self._rows(
            "SELECT * FROM job WHERE state IN (SELECT value FROM json_each(?)) AND (? IS NULL OR session=?) "
            "ORDER BY id DESC LIMIT ?",
            (to_row(list(states)), session, session, -1 if limit is None else limit),
        )
        return [from_row(row) for row in rows]

    def counts(self, session: str | None = None) -> dict[str, dict[JobState, int]]:
        """How many jobs there are, kind → state → number; of one session, if given."""
        found: dict[str, dict[JobState, int]] = {}
        for kind, state, number in self._rows(
            "SELECT kind, state, count(*) FROM job WHERE ? IS NULL OR session=? GROUP BY kind, state",
            (session, session),
        ):
            found.setdefault(kind, {})[state] = number
        return found

    def counts_by_session(self) -> dict[str, dict[JobState, int]]:
        """How many jobs there are, session → state → number."""
        found: dict[str, dict[JobState, int]] = {}
        for session, state, number in self._rows("SELECT session, state, count(*) FROM job GROUP BY session, state"):
            found.setdefault(session, {})[state] = number
        return found

    def unfinished(self, before: float) -> int:
        """How many jobs run, or are ready to start before a time; those that wait do not count."""
        sql = "SELECT count(*) FROM job WHERE state='running' OR state='ready' AND run_at<=?"
        return int(self._rows(sql, (before,))[0][0])

    def next_run_at(self, kinds: Collection[str] | None = None, after: float = 0.0) -> float | None:
        """When the next job that is ready or waits may start; None when there is none.

        Args:
            kinds: only these kinds.
            after: only times later than this.
        """
        rows = self._rows(
            "SELECT min(run_at) FROM job WHERE state IN ('ready','waiting') AND run_at>:after "
            "AND (:kinds IS NULL OR kind IN (SELECT value FROM json_each(:kinds)))",
            {"after": after, "kinds": None if kinds is None else to_row(list(kinds))},
        )
        return None if rows[0][0] is None else float(rows[0][0])


def open_reader(path: Path) -> JobReader | None:
    """Open a queue to look at it while no daemon runs, or beside one; also after a kill -9 left its log behind.

    Returns:
        None where there is no queue yet, or none that this version can read.
    """
    if not path.exists():
        return None
    address = path.absolute().as_uri()
    # A folder that one may only read has no place for SQLite's shared memory: then the file alone has to do.
    for options in ("mode=ro", "mode=ro&immutable=1"):
        try:
            connection = sqlite3.connect(
                f"{address}?{options}", uri=True, isolation_level=None, check_same_thread=False
            )
        except sqlite3.OperationalError:
            continue
        try:
            connection.execute(f"PRAGMA busy_timeout={_BUSY_MILLISECONDS}")
            with closing(connection.execute("SELECT lease_token, interruptions FROM job LIMIT 1")) as rows:
                rows.fetchone()
        except sqlite3.Error:
            connection.close()
            continue
        return JobReader(connection)
    return None


def connect(path: Path) -> sqlite3.Connection:
    """Open a queue to write: every commit is on the disk before it returns."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        for setting in (f"busy_timeout={_BUSY_MILLISECONDS}", "journal_mode=WAL", "synchronous=FULL"):
            connection.execute(f"PRAGMA {setting}").fetchall()
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def open_writer(path: Path) -> sqlite3.Connection:
    """Open the file, with its tables; what is no queue of this version is set aside, and a new one begun."""
    try:
        return _with_schema(connect(path))
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError):
            raise  # locked, full, no permission: the file itself is not to blame
    _set_aside(path)
    return _with_schema(connect(path))


def _with_schema(connection: sqlite3.Connection) -> sqlite3.Connection:
    try:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            connection.executescript(f"BEGIN IMMEDIATE;{_SCHEMA}PRAGMA user_version={SCHEMA_VERSION};COMMIT;")
        elif version != SCHEMA_VERSION:
            message = f"the queue is of version {version}, this is version {SCHEMA_VERSION}"
            raise sqlite3.DatabaseError(message)  # noqa: TRY301 - one way out for all that is no queue of ours
        connection.execute("SELECT count(*) FROM job").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection


def _set_aside(path: Path) -> None:
    path.replace(path.with_name(f"{path.name}.broken"))
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
