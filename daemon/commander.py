"""What the command line can ask a running daemon (``daemon.control``)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daemon.control import Answer, Command
from daemon.jobs import STATES, JobState
from daemon.outcomes import revive_run, subject_file
from daemon.promotion import promote
from sessions.refusal import Refusal

if TYPE_CHECKING:
    from daemon.app import Daemon


_RETRIED: tuple[JobState, ...] = ("failed", "refused", "waiting")


class Commander:
    """Answers requests."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    def commands(self) -> dict[str, Command]:
        """Every request by its name."""
        return {
            "status": self.status,
            "jobs": self.jobs,
            "retry": self.retry,
            "cancel": self.cancel,
            "pause": self.pause,
            "resume": self.resume,
            "scan": self.scan,
            "promote": self.promote,
        }

    async def status(self, _: Mapping[str, Any]) -> Answer:
        """What is going on."""
        return self._daemon.reporter.snapshot()

    async def jobs(self, request: Mapping[str, Any]) -> Answer:
        """The jobs; the done ones too where ``all`` says so."""
        states = [state for state in STATES if request.get("all") or state != "done"]
        live = {entry.job.id: entry.progress for entry in self._daemon.dispatcher.running}
        rows = [job.to_json() for job in self._daemon.queue.jobs(states=states)]
        gates = self._daemon.gates.closed()
        for row in rows:
            if row["state"] == "ready" and row["kind"] in gates:
                row["problem"] = {"reason": gates[row["kind"]]}
        return {"jobs": [{**row, "progress": live.get(row["id"]) or row["progress"]} for row in rows]}

    async def retry(self, request: Mapping[str, Any]) -> Answer:
        """Try again what failed or was refused: the named jobs, or all."""
        daemon = self._daemon
        numbers = {int(number) for number in request.get("jobs") or ()}
        # What somebody cancelled starts again only when it is named.
        states = (*_RETRIED, "cancelled") if numbers else _RETRIED
        chosen = [job for job in daemon.queue.jobs(states=states) if not numbers or job.id in numbers]
        if numbers and not chosen:
            raise LookupError(f"No failed, refused or cancelled job has the number {', '.join(map(str, numbers))}.")
        for job in chosen:
            with suppress(LookupError):
                session = daemon.sessions.by_id(job.session)
                subject = subject_file(session, job.kind, job.payload)
                if job.kind == "train":
                    revive_run(session, str(job.payload["run"]))
                daemon.router.retry_refused(session, [subject])
        if not numbers:
            for path in list(daemon.sessions):
                with suppress(OSError):
                    session = daemon.sessions.at(path)
                    refused = [str(record["source"]) for record in session.manifest.of_kind("refused")]
                    daemon.router.retry_refused(session, refused)
        found = daemon.dispatcher.retry([job.id for job in chosen]) if chosen else []
        daemon.dispatcher.wake()
        return {"count": len(set(found) | {job.id for job in chosen}), "jobs": sorted(found)}

    async def cancel(self, request: Mapping[str, Any]) -> Answer:
        """Cancel jobs; a run that is cancelled is over."""
        cancelled = [number for number in map(int, request.get("jobs") or ()) if self._daemon.cancel(number)]
        if not cancelled:
            raise LookupError("None of these jobs can be cancelled: they have ended, or there are no such numbers.")
        return {"count": len(cancelled), "jobs": cancelled}

    async def pause(self, _: Mapping[str, Any]) -> Answer:
        """Start nothing new; what runs on the GPU saves and goes back to the queue."""
        self._daemon.dispatcher.pause()
        self._daemon.dispatcher.take_back("gpu")
        self._daemon.reporter.news.set()
        return {}

    async def resume(self, _: Mapping[str, Any]) -> Answer:
        """Go on."""
        self._daemon.dispatcher.resume()
        self._daemon.reporter.news.set()
        return {}

    async def scan(self, _: Mapping[str, Any]) -> Answer:
        """Look at the whole tree now."""
        self._daemon.tree.request_scan()
        return {}

    async def promote(self, request: Mapping[str, Any]) -> Answer:
        """Make a model the one of its session: ``folder``, and the model's ``name``."""
        daemon = self._daemon
        folder = Path(str(request["folder"]))
        path = "" if folder == daemon.root else folder.relative_to(daemon.root).as_posix()
        if path not in daemon.sessions:
            raise LookupError(f"{folder} is no session of {daemon.root}.")
        session = daemon.sessions.at(path)
        try:
            chosen = promote(session.manifest, str(request["name"]))
        except Refusal as refusal:
            raise LookupError(str(refusal)) from None
        daemon.reporter.changed(path)
        daemon.mark_dirty(path)
        return {"file": chosen.file}
