"""Telling systemd how the daemon is: its notification protocol, in as many lines as it needs.

Without ``NOTIFY_SOCKET`` (a terminal, a notebook, a container) every call does nothing. See sd_notify(3).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import suppress


class Notifier:
    """Speaks to the service manager that started this process, if one did.

    Args:
        environment: ``NOTIFY_SOCKET``: a path, or ``@name`` in the abstract namespace; ``WATCHDOG_USEC`` and
            ``WATCHDOG_PID``: how long the manager waits for a sign of life, and whose.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._address = environment.get("NOTIFY_SOCKET")
        interval = environment.get("WATCHDOG_USEC", "")
        meant = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self._watchdog_seconds = int(interval) / 1e6 if meant and interval.isdigit() else 0.0
        self._status = ""

    @property
    def ping_every(self) -> float | None:
        """Seconds between two calls of ``alive``: half of what the manager waits; None when it does not ask."""
        return self._watchdog_seconds / 2 if self._watchdog_seconds and self._address else None

    def ready(self, status: str = "") -> None:
        """The daemon has started: it watches and works."""
        self._send("READY=1", *self._news(status))

    def status(self, status: str) -> None:
        """One line for ``systemctl status``; the same line again is not sent."""
        news = self._news(status)
        if news:
            self._send(*news)

    def alive(self) -> None:
        """A sign of life. Only from the loop that does the work, and only while its parts are well."""
        self._send("WATCHDOG=1")

    def stopping(self, seconds: float, status: str = "") -> None:
        """The daemon saves and stops, which takes at most so many seconds from now."""
        self._send("STOPPING=1", _extension(seconds), *self._news(status))

    def extend(self, seconds: float) -> None:
        """Starting or stopping goes on for at most so many seconds from now: do not kill before."""
        self._send(_extension(seconds))

    def _news(self, status: str) -> list[str]:
        line = " ".join(status.split())
        if not line or line == self._status:
            return []
        self._status = line
        return [f"STATUS={line}"]

    def _send(self, *lines: str) -> None:
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        # A manager that is gone or busy must not stop the work.
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.setblocking(False)
            channel.sendto("\n".join(lines).encode("utf-8", errors="replace"), address)


def _extension(seconds: float) -> str:
    return f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}"
