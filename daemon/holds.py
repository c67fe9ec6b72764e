"""Kinds of jobs that wait as a whole: what one job of a kind lacks, the others mostly lack, too.

Without weights, 20,000 captions would each be handed out to hear the same answer. Three jobs in a row that wait for the
same reason hold their kind; after that, one at a time is tried.
"""

from __future__ import annotations

from dataclasses import dataclass, field

_JOBS_THAT_HOLD = 3


@dataclass
class _Kind:
    reason: str = ""
    jobs: set[int] = field(default_factory=set)
    until: float = 0.0
    retry_after: float = 0.0

    @property
    def held(self) -> bool:
        return len(self.jobs) >= _JOBS_THAT_HOLD


@dataclass(frozen=True)
class Hold:
    """Why a kind is held, and until when (wall-clock seconds)."""

    reason: str
    until: float
    retry_after: float


class Holds:
    """Which kinds are held. Times are handed in."""

    def __init__(self) -> None:
        self._kinds: dict[str, _Kind] = {}

    def waited(self, kind: str, job: int, reason: str, retry_after: float, now: float) -> None:
        """A job ended with "waiting"."""
        found = self._kinds.setdefault(kind, _Kind())
        if found.reason != reason:
            found = self._kinds[kind] = _Kind(reason)
        found.jobs.add(job)
        found.retry_after = max(retry_after, 1.0)
        found.until = now + found.retry_after

    def went(self, kind: str) -> None:
        """A job of the kind got as far as working."""
        self._kinds.pop(kind, None)

    def clear(self) -> None:
        """Someone says that things have changed."""
        self._kinds.clear()

    def held(self, now: float) -> dict[str, Hold]:
        """The kinds that are held now."""
        return {
            name: Hold(kind.reason, kind.until, kind.retry_after)
            for name, kind in self._kinds.items()
            if kind.held and kind.until > now
        }

    def is_probe(self, kind: str) -> bool:
        """True when the next job of the kind is a try: it goes alone."""
        return kind in self._kinds and self._kinds[kind].held
