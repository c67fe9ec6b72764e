"""What the dispatcher asks of the tree and tells it: payloads, gates, outcomes."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

from daemon import outcomes
from daemon.gates import Gates
from daemon.jobs import Job
from daemon.ledger import Hooks
from daemon.prepare import Gone, Preparer
from daemon.searching import KIND as EMBED
from daemon.session import Sessions
from daemon.status import local_now
from daemon.terminal import ProgressDisplay
from handlers.outcome import Outcome

log = logging.getLogger(__name__)


class TreeHooks(Hooks):
    """The dispatcher's hooks for a tree.

    Args:
        preparer: makes payloads.
        sessions: the tree's sessions.
        gates: what cannot start now.
        make_room: called before a run starts: the WebUI gives way.
        ended: called with (job, session folder) after an outcome was recorded; None for the folder when it is gone.
        display: shows progress on a terminal.
        kept: called with the session's folder when a run has kept an intermediate model.
    """

    def __init__(
        self,
        *,
        preparer: Preparer,
        sessions: Sessions,
        gates: Gates,
        make_room: Callable[[], Awaitable[None]],
        ended: Callable[[Job, str | None], None],
        display: ProgressDisplay,
        kept: Callable[[str], None] = lambda _session: None,
    ) -> None:
        self._preparer = preparer
        self._sessions = sessions
        self._gates = gates
        self._make_room = make_room
        self._ended = ended
        self._display = display
        self._told_decided: set[int] = set()
        self._on_kept = kept
        self._kept: dict[int, int] = {}

    async def prepare(self, job: Job) -> Mapping[str, Any] | None:
        """The payload in absolute paths; None when the job has nothing to do any more."""
        try:
            return self._preparer.payload(job.kind, job.session, job.payload)
        except Gone as gone:
            log.info("%s of %s is not wanted any more: %s", job.kind, job.subject, gone)
            self._finish_tidying(job)
            return None

    def _finish_tidying(self, job: Job) -> None:
        """A conversion that was on record, and cut short before its leftovers were gone."""
        with suppress(LookupError, OSError):
            if job.kind == "convert":
                session = self._sessions.by_id(job.session)
                kind = outcomes.record_kind(job.kind, job.payload)
                if session.manifest.get(kind, str(job.payload["run"])) is not None:
                    outcomes.tidy_after_convert(session, job.payload)

    def may_start(self, kind: str) -> bool:
        """Whether the kind's gate is open."""
        return self._gates.reason(kind) is None

    async def before_start(self, kind: str) -> None:
        """Have the WebUI give way to training."""
        if kind == "train":
            await self._make_room()

    def on_progress(self, job: Job, progress: Mapping[str, Any]) -> None:
        """Show how far a job is; of a training first what was decided for it."""
        decided = (progress.get("facts") or {}).get("decided")
        if decided and job.id not in self._told_decided:
            self._told_decided.add(job.id)
            for line in decided:
                log.info("%s, decided: %s", job.subject, line)
        self._display.show(job.id, job.kind, job.subject, progress)
        count = int((progress.get("facts") or {}).get("kept") or 0)
        if count > self._kept.get(job.id, 0):
            self._kept[job.id] = count
            with suppress(LookupError, OSError):
                self._on_kept(self._sessions.by_id(job.session).path)

    async def on_outcome(self, job: Job, outcome: Outcome) -> None:
        """Write into the session what became of a job."""
        self._display.end(job.id)
        self._told_decided.discard(job.id)
        self._kept.pop(job.id, None)
        log.log(
            logging.WARNING if outcome.state in ("failed", "refused") else logging.INFO,
            "%s of %s: %s%s",
            job.kind,
            job.subject,
            outcome.state,
            f" ({_why(outcome)})" if _why(outcome) else "",
        )
        try:
            session = self._sessions.by_id(job.session)
        except LookupError:
            if unreachable := self._gates.everything():
                # Not gone, only out of reach: the job waits and runs again.
                raise OSError(unreachable) from None
            self._ended(job, None)
            return
        final = outcome.state == "failed" and job.last_attempt
        match outcome.state:
            case "done" if job.kind == EMBED:
                pass  # what it made lies in the index, which is this machine's and no part of the tree
            case "done":
                paths = [str(path) for path in outcome.outputs]
                outcomes.record_done(session, job.kind, job.payload, outcome.facts, paths)
                if prompt := outcome.facts.get("prompt"):
                    note = outcome.facts.get("note")
                    log.info("%s: write into the prompt: %s%s", job.subject, prompt, f" ({note})" if note else "")
                if job.kind == "convert":
                    outcomes.tidy_after_convert(session, job.payload)
                source = str(job.payload.get("source", ""))
                if source and not outcomes.is_there(session.folder / source):
                    # It went while it was worked on.
                    outcomes.forget_picture(session, source, local_now().date())
            case "refused" if outcome.refusal is not None:
                outcomes.record_refused(session, job.kind, job.payload, outcome.refusal)
                if job.kind == "train":
                    outcomes.record_ended_run(session, job.payload, "refused", outcome.refusal.what)
            case "failed" if final:
                message = str(outcome.error.get("message", "it failed"))
                outcomes.record_failed(session, job.kind, job.payload, message)
                if job.kind == "train":
                    outcomes.record_ended_run(session, job.payload, "failed", message)
            case "cancelled" if job.kind == "train":
                outcomes.record_ended_run(session, job.payload, "cancelled", "cancelled")
            case _:
                pass
        self._ended(job, session.path)


def _why(outcome: Outcome) -> str:
    if outcome.refusal is not None:
        return str(outcome.refusal)
    return outcome.reason or str(outcome.error.get("message", ""))
