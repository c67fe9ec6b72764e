"""The queue that survives: SQLite, leases with tokens, keys that remove duplicates.

One daemon writes it (it holds the tree's lock); workers never see it. A claim gives a job a lease and a fresh token,
and whoever ends the job must show the token: a lease that was lost changes nothing. Times are wall-clock seconds and
are handed in. A lost or broken file costs nothing but the waiting list: what is wanted follows from the tree.
"""

# ruff: noqa: S608 - statements are put together from constants of this module; every value is bound
from __future__ import annotations

import random
import secrets
import sqlite3
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from daemon.jobs import ENDED, Job, JobRequest, from_row, to_row
from daemon.queue_file import JobReader, open_writer
from handlers.kinds import KINDS, Kind
from sessions.refusal import Refusal

# The daemon that died twenty times over one job is probably killed by it.
INTERRUPTIONS_ALLOWED = 20
# The first condition is the index's own: only what has not ended is looked at, in the order of the hand-out.
_DUE = """ended IS NULL AND lane=:lane AND kind IN (SELECT value FROM json_each(:kinds))
    AND (state IN ('ready','waiting') AND run_at<=:now OR state='running' AND lease_until<=:now)"""
_ORDER = "priority, run_at, id"
_AGAIN = """
UPDATE SET state='ready', kind=excluded.kind, lane=excluded.lane, session=excluded.session, subject=excluded.subject,
    payload=excluded.payload, priority=excluded.priority, max_attempts=excluded.max_attempts, run_at=excluded.run_at,
    attempts=0, interruptions=0, progress='{}', problem='{}', ended=NULL
WHERE state IN ('done','failed','refused','cancelled')"""
_FRESH = (
    "state='ready', attempts=0, interruptions=0, progress='{}', problem='{}', ended=NULL, "
    "lease_token=NULL, lease_until=NULL"
)


class LeaseLost(Exception):  # noqa: N818 - the field's name for it
    """The job is no longer ours to end: its lease ran out, or it was cancelled or forgotten."""


def backoff(attempts: int, jitter: float = 1.0) -> float:
    """Seconds until a job that failed ``attempts`` times is started again: 2, 8, 32 … at most 600, times ``jitter``."""
    return min(600.0, 2.0 * 4.0 ** min(attempts - 1, 10)) * jitter


class Queue(JobReader):
    """The queue of one tree.

    Args:
        path: the file, on a local disk; its folder is made. A file that is no queue of this version is set aside.
        kinds: the kinds of jobs, by name.
        jitter: gives the factor by which a back-off is stretched.
    """

    def __init__(
        self,
        path: Path,
        kinds: Mapping[str, Kind] = KINDS,
        jitter: Callable[[], float] = lambda: random.uniform(0.8, 1.2),
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        super().__init__(open_writer(path))
        self._kinds = kinds
        self._jitter = jitter

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def put(self, requests: Iterable[JobRequest], now: float, *, again: bool = False) -> list[str]:
        """Queue work, all in one transaction.

        Args:
            requests: what is wanted.
            now: wall-clock seconds.
            again: also start work anew that has ended, whatever its end was.

        Returns:
            The keys that are now ready and were not before; a key that stands in the queue already is left alone.

        Raises:
            KeyError: a kind is not known.
        """
        conflict = _AGAIN if again else "NOTHING"
        sql = (
            "INSERT INTO job "
            "(key, kind, lane, session, subject, payload, state, priority, max_attempts, run_at, created) "
            f"VALUES (?,?,?,?,?,?,'ready',?,?,?,?) ON CONFLICT (key) DO {conflict}"
        )
        new = []
        with self._transaction() as connection:
            for request in requests:
                kind = self._kinds[request.kind]
                priority = kind.priority if request.priority is None else request.priority
                values = (
                    *(request.key, kind.name, kind.lane, request.session),
                    *(to_row(request.subject), to_row(request.payload)),
                    *(priority, kind.attempts, request.run_at or now, now),
                )
                if connection.execute(sql, values).rowcount:
                    new.append(request.key)
        return new

    def due(self, lane: str, kinds: Collection[str], now: float, limit: int) -> tuple[str, int] | None:
        """The kind whose turn it is in a lane, and how many of its jobs are due (counted up to ``limit``)."""
        values = {"lane": lane, "kinds": to_row(list(kinds)), "now": now, "limit": limit}
        first = self._rows(f"SELECT kind FROM job WHERE {_DUE} ORDER BY {_ORDER} LIMIT 1", values)
        if not first:
            return None
        values["kinds"] = to_row([first[0]["kind"]])
        count = self._rows(f"SELECT count(*) FROM (SELECT 1 FROM job WHERE {_DUE} LIMIT :limit)", values)
        return first[0]["kind"], count[0][0]

    def due_since(self, lane: str, kind: str, now: float) -> tuple[float, float]:
        """When the first and the last of a kind's due jobs became due; ``now`` where there are none."""
        values = {"lane": lane, "kinds": to_row([kind]), "now": now}
        ((first, last),) = self._rows(f"SELECT min(run_at), max(run_at) FROM job WHERE {_DUE}", values)
        return (now, now) if first is None else (first, last)

    def claim(self, lane: str, kinds: Collection[str], limit: int, now: float, lease: float = 60.0) -> list[Job]:
        """Take up to ``limit`` due jobs of one kind, first in (priority, time, number) first.

        Each gets a lease of ``lease`` seconds, a fresh token and one attempt more. A job whose lease ran out is due
        again. A job that failed before is handed out alone, so that it cannot take others down with it.
        """
        with self._transaction() as connection:
            # A job that loses its last lease has used up its attempts like one that fails.
            connection.execute(
                "UPDATE job SET state='failed', problem=?, ended=?, lease_token=NULL, lease_until=NULL "
                "WHERE state='running' AND lease_until<=? AND attempts>=max_attempts",
                (to_row(_sentence("LeaseLost", "The job was started, and nothing was heard of it again.")), now, now),
            )
            values = {"lane": lane, "kinds": to_row(list(kinds)), "now": now, "limit": limit}
            first = connection.execute(
                f"SELECT id, kind, attempts FROM job WHERE {_DUE} ORDER BY {_ORDER} LIMIT 1", values
            ).fetchone()
            if first is None:
                return []
            chosen = [first["id"]]
            if first["attempts"] == 0 and limit > 1:
                values["kinds"] = to_row([first["kind"]])
                rows = connection.execute(
                    f"SELECT id FROM job WHERE {_DUE} AND attempts=0 ORDER BY {_ORDER} LIMIT :limit", values
                )
                chosen = [row["id"] for row in rows]
            return [self._take(connection, identity, now, lease) for identity in chosen]

    @staticmethod
    def _take(connection: sqlite3.Connection, identity: int, now: float, lease: float) -> Job:
        row = connection.execute(
            "UPDATE job SET state='running', attempts=attempts+1, lease_token=?, lease_until=?, started=?, "
            "progress='{}' WHERE id=? RETURNING *",
            (secrets.token_hex(8), now + lease, now, identity),
        ).fetchone()
        return from_row(row)

    def heartbeat(self, jobs: Sequence[Job], now: float, lease: float = 60.0) -> list[Job]:
        """Renew leases, all in one transaction. Returns the jobs whose lease is lost."""
        with self._transaction() as connection:
            return [job for job in jobs if not _owned(connection, job, "lease_until=?", now + lease)]

    def progress(self, reports: Iterable[tuple[Job, Mapping[str, Any]]]) -> None:
        """Note how far jobs are (``done``, ``total``, ``note``, ``facts``), where the lease is still theirs."""
        with self._transaction() as connection:
            for job, report in reports:
                _owned(connection, job, "progress=?", to_row(report))

    def done(self, job: Job, now: float) -> None:
        """The job is done. Raises ``LeaseLost``."""
        self._end(job, "state='done', problem='{}', ended=?", now)

    def refuse(self, job: Job, refusal: Refusal, now: float) -> None:
        """The job's input is at fault; it is not tried again. Raises ``LeaseLost``."""
        self._end(job, "state='refused', problem=?, ended=?", to_row(refusal.to_json()), now)

    def fail(self, job: Job, error: Mapping[str, Any], now: float) -> None:
        """The job failed: it is tried again after a back-off, or has failed if its attempts are used up.

        Raises:
            LeaseLost: the lease is lost.
        """
        if job.last_attempt:
            self._end(job, "state='failed', problem=?, ended=?", to_row(error), now)
        else:
            run_at = now + backoff(job.attempts, self._jitter())
            self._end(job, "state='ready', problem=?, run_at=?", to_row(error), run_at)

    def wait(self, job: Job, reason: str, retry_after: float, now: float) -> None:
        """Something outside is missing; this start is no attempt. Raises ``LeaseLost``."""
        problem = to_row({"reason": reason, "retry_after": retry_after})
        self._end(
            job,
            "state='waiting', attempts=max(attempts-1, 0), problem=?, run_at=?",
            problem,
            now + max(retry_after, 1.0),
        )

    def give_back(self, job: Job) -> None:
        """The daemon took the worker away: ready again, and this start is no attempt. Raises ``LeaseLost``."""
        self._end(job, "state='ready', attempts=max(attempts-1, 0)")

    def end_cancelled(self, job: Job, now: float) -> None:
        """The running job was cancelled and has stopped. Raises ``LeaseLost``."""
        self._end(job, "state='cancelled', ended=?", now)

    def drop(self, job: Job) -> None:
        """The running job is not wanted any more: its row goes, so that its key may come back. Raises ``LeaseLost``."""
        with self._transaction() as connection:
            found = connection.execute("DELETE FROM job WHERE id=? AND lease_token=?", (job.id, job.lease_token))
            if not found.rowcount:
                raise LeaseLost(job.id)

    def _end(self, job: Job, changes: str, *values: Any) -> None:
        with self._transaction() as connection:
            if not _owned(connection, job, f"{changes}, lease_token=NULL, lease_until=NULL", *values):
                raise LeaseLost(job.id)

    def postpone(self, kind: str, reason: str, retry_after: float, now: float) -> int:
        """Let all ready jobs of a kind wait for the reason that others of it wait for. Returns how many did.

        They keep their place in the order; the daemon tries one of them now and then.
        """
        with self._transaction() as connection:
            return connection.execute(
                "UPDATE job SET state='waiting', problem=? WHERE kind=? AND state='ready' AND run_at<=?",
                (to_row({"reason": reason, "retry_after": retry_after}), kind, now),
            ).rowcount

    def cancel(self, identity: int, now: float) -> bool:
        """Cancel a job that does not run. Returns False for one that runs, has ended or is not there."""
        with self._transaction() as connection:
            found = connection.execute(
                "UPDATE job SET state='cancelled', ended=? WHERE id=? AND state IN ('ready','waiting')", (now, identity)
            )
            return found.rowcount > 0

    def retry(self, identities: Collection[int] | None, now: float) -> list[int]:
        """Start jobs anew that failed, were refused or cancelled, or wait.

        Args:
            identities: their numbers; None for all such jobs.
            now: wall-clock seconds.

        Returns:
            The numbers of those that are ready again.
        """
        with self._transaction() as connection:
            rows = connection.execute(
                f"UPDATE job SET {_FRESH}, run_at=:now WHERE state IN ('failed','refused','cancelled','waiting') "
                "AND (:ids IS NULL OR id IN (SELECT value FROM json_each(:ids))) RETURNING id",
                {"now": now, "ids": None if identities is None else to_row(list(identities))},
            )
            return sorted(row["id"] for row in rows.fetchall())

    def release_all(self, now: float) -> int:
        """At the daemon's start: whatever runs was run by a dead daemon. Returns how many jobs are ready again.

        That start is no attempt, unless the job was interrupted ``INTERRUPTIONS_ALLOWED`` times: from then on it is.
        """
        problem = _sentence("Interrupted", f"fastsd ended {INTERRUPTIONS_ALLOWED} times or more while this job ran.")
        with self._transaction() as connection:
            connection.execute("UPDATE job SET interruptions=interruptions+1 WHERE state='running'")
            connection.execute(
                "UPDATE job SET state='failed', problem=?, ended=?, lease_token=NULL, lease_until=NULL "
                "WHERE state='running' AND interruptions>=? AND attempts>=max_attempts",
                (to_row(problem), now, INTERRUPTIONS_ALLOWED),
            )
            return connection.execute(
                "UPDATE job SET state='ready', run_at=min(run_at, ?), lease_token=NULL, lease_until=NULL, "
                "attempts=CASE WHEN interruptions>=? THEN attempts ELSE max(attempts-1, 0) END WHERE state='running'",
                (now, INTERRUPTIONS_ALLOWED),
            ).rowcount

    def forget(self, keys: Iterable[str]) -> int:
        """Remove jobs that do not run, so that their keys may be queued anew. Returns how many went."""
        with self._transaction() as connection:
            sql = "DELETE FROM job WHERE key=? AND state<>'running'"
            return sum(connection.execute(sql, (key,)).rowcount for key in keys)

    def drop_session(self, session: str) -> list[int]:
        """Remove a session's jobs that do not run. Returns the numbers of those that do."""
        with self._transaction() as connection:
            connection.execute("DELETE FROM job WHERE session=? AND state<>'running'", (session,))
            rows = connection.execute("SELECT id FROM job WHERE session=? ORDER BY id", (session,)).fetchall()
            return [row["id"] for row in rows]

    def prune(self, before: float, states: Collection[str] = frozenset({"done"})) -> int:
        """Remove jobs in these (ended) states that ended before a time. Returns how many went."""
        with self._transaction() as connection:
            return connection.execute(
                "DELETE FROM job WHERE state IN (SELECT value FROM json_each(?)) AND ended<?",
                (to_row(sorted(ENDED.intersection(states))), before),
            ).rowcount


def _owned(connection: sqlite3.Connection, job: Job, changes: str, *values: Any) -> bool:
    """Change a job whose lease is ours; False if it is not."""
    sql = f"UPDATE job SET {changes} WHERE id=? AND lease_token=?"
    return connection.execute(sql, (*values, job.id, job.lease_token)).rowcount > 0


def _sentence(kind: str, message: str) -> dict[str, str]:
    return {"type": kind, "message": message, "traceback": ""}
