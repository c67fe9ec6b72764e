"""When to start a crashing program again, and when to leave it alone. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class CrashLoop:
    """Exponential back-off with a circuit breaker.

    Attributes:
        limit: so many crashes in a row end it.
        first: seconds to wait after the first crash; doubled after each.
        longest: never wait longer than this.
        stable: a run that lived this long, in seconds, counts as healthy: its crash is a first one again.
        crashes: in a row, so far.
    """

    limit: int = 5
    first: float = 2.0
    longest: float = 300.0
    stable: float = 600.0
    crashes: int = 0

    def after(self, lived: float) -> float | None:
        """Count a crash of a run that lived so many seconds. Returns the seconds to wait, or None to give up."""
        if lived >= self.stable:
            self.crashes = 0
        self.crashes += 1
        if self.crashes >= self.limit:
            return None
        # The exponent is bounded: a float overflows long before a patient limit does.
        return min(self.longest, self.first * 2.0 ** min(self.crashes - 1, 60))
