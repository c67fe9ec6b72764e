"""Kinds of jobs that cannot start now, and why: looked at here, once, instead of in a worker a job."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from handlers.context import Waiting
from handlers.models import registry
from sessions.refusal import Refusal

_CHECK_SECONDS = 15.0


@dataclass
class ModelGate:
    """Whether a model that the settings name is on this machine.

    Attributes:
        setting: the key of fastsd.yaml that names it, which is the model's kind, too: ``captioner``, ``search``.
        name: what stands there.
        models: () → the tree's Models folder, None where there is none.
        cache: the folder of downloads.
        now: monotonic seconds.
    """

    setting: str
    name: str
    models: Callable[[], Path | None]
    cache: Path
    now: Callable[[], float]
    _looked: float = float("-inf")
    _reason: str | None = None

    def reason(self) -> str | None:
        """Why it cannot be used now, with what helps; None when it can. Looks again every 15 seconds."""
        if self.now() - self._looked >= _CHECK_SECONDS:
            self._looked = self.now()
            self._reason = self._look()
        return self._reason

    def _look(self) -> str | None:
        try:
            registry.check(self.name, self.setting, self.models(), self.cache)
        except Waiting as missing:
            return missing.reason
        except Refusal as refusal:
            return f"{self.setting}: {refusal} (fastsd.yaml)"
        return None


@dataclass
class Gates:
    """All gates together.

    Attributes:
        looks: kind → () → why it cannot start, or None.
        everything: () → why nothing can start (the tree is unreachable), or None.
    """

    looks: Mapping[str, Callable[[], str | None]] = field(default_factory=dict)
    everything: Callable[[], str | None] = lambda: None

    def reason(self, kind: str) -> str | None:
        """Why jobs of a kind cannot start now, or None."""
        return self.everything() or (self.looks[kind]() if kind in self.looks else None)

    def closed(self) -> dict[str, str]:
        """Every closed gate: kind → why."""
        reasons = {kind: self.reason(kind) for kind in self.looks}
        return {kind: reason for kind, reason in reasons.items() if reason}
