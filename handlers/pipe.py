"""A worker's ends of the pipe: messages out, messages in, and the end of the process when the daemon is gone."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from handlers.outcome import Outcome

HEARTBEAT_SECONDS = 5.0
PROGRESS_SECONDS = 0.2
_PR_SET_PDEATHSIG = 1
_READ_BYTES = 1 << 16
_PAGE = os.sysconf("SC_PAGE_SIZE")


class ProgressThrottle:
    """Lets one progress message a job through each interval, and keeps the last of those it holds back.

    Args:
        interval: seconds between two messages of a job.
    """

    def __init__(self, interval: float = PROGRESS_SECONDS) -> None:
        self._interval = interval
        self._sent: dict[int, float] = {}
        self._held: dict[int, dict[str, Any]] = {}

    def offer(self, job: int, message: dict[str, Any], now: float) -> dict[str, Any] | None:
        """The message to send now, or None when it is held back."""
        if now - self._sent.get(job, float("-inf")) >= self._interval:
            self._held.pop(job, None)
            self._sent[job] = now
            return message
        self._held[job] = message
        return None

    def due(self, now: float) -> list[dict[str, Any]]:
        """The held messages whose time has come."""
        ready = [job for job in self._held if now - self._sent[job] >= self._interval]
        self._sent.update(dict.fromkeys(ready, now))
        return [self._held.pop(job) for job in ready]

    def finish(self, job: int) -> dict[str, Any] | None:
        """The last message of a job that ends, if it was held back."""
        self._sent.pop(job, None)
        return self._held.pop(job, None)

    def next_due(self) -> float | None:
        """When ``due`` will have something, or None."""
        return min((self._sent[job] + self._interval for job in self._held), default=None)


class Reporter:
    """The worker's voice: one JSON object a line on a descriptor of its own.

    Args:
        descriptor: where to write.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._changed = threading.Condition()
        self._throttle = ProgressThrottle()

    def send(self, message: Mapping[str, Any]) -> None:
        """Write one message. A daemon that is gone ends the worker."""
        data = json.dumps(message, default=_json_default).encode("ascii") + b"\n"
        with self._changed:
            self._write(data)

    def _write(self, data: bytes) -> None:
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError:
            end_process_group()

    def progress(self, job: int, done: float, total: float, note: str, facts: Mapping[str, Any]) -> None:
        """Tell how far a job is; at most every ``PROGRESS_SECONDS``, and always the last."""
        message = {"type": "progress", "job": job, "done": done, "total": total, "note": note, "facts": dict(facts)}
        with self._changed:
            if self._throttle.offer(job, message, time.monotonic()):
                self.send(message)
            else:
                self._changed.notify()

    def outcome(self, job: int, outcome: Outcome) -> None:
        """Tell how a job ended."""
        with self._changed:
            if last := self._throttle.finish(job):
                self.send(last)
            try:
                self.send({"type": "outcome", "job": job, **outcome.to_json()})
            except (TypeError, ValueError) as error:
                text = f"The handler's result cannot be written as JSON: {error}"
                self.send({"type": "outcome", "job": job, **Outcome.failure("TypeError", text).to_json()})

    def beat_forever(self) -> None:
        """Send heartbeats, and progress that was held back once it may go. Never returns."""
        next_beat = time.monotonic()
        with self._changed:
            while True:
                now = time.monotonic()
                for message in self._throttle.due(now):
                    self.send(message)
                if now >= next_beat:
                    self.send({"type": "heartbeat", "rss": resident_bytes()})
                    next_beat = now + HEARTBEAT_SECONDS
                held = self._throttle.next_due()
                until = next_beat if held is None else min(next_beat, held)
                self._changed.wait(max(until - time.monotonic(), 0.001))


def _json_default(value: Any) -> Any:
    """Paths, and the numbers of numpy and torch, as JSON values."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if callable(item := getattr(value, "item", None)):
        return item()
    message = f"{type(value).__name__} is no JSON value"
    raise TypeError(message)


def resident_bytes() -> int:
    """Memory that this process holds, in bytes; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * _PAGE
    except (OSError, ValueError, IndexError):
        return 0


def end_process_group() -> None:
    """End this process and those it started, at once."""
    with suppress(OSError):
        if os.getpgrp() == os.getpid():
            os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


def die_with(parent: int) -> None:
    """Ask the kernel to end this process when its parent ends, and end at once if that has happened.

    Linux only; elsewhere the end of stdin does it.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        end_process_group()


def read_messages(descriptor: int, receive: Callable[[Mapping[str, Any]], None]) -> None:
    """Hand on the daemon's messages; at end of file (the daemon is gone) end the process."""
    rest = b""
    while data := _read(descriptor):
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if line.strip():
                receive(json.loads(line))
    end_process_group()


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, _READ_BYTES)
    except OSError:
        return b""


def take_pipes() -> tuple[int, int]:
    """Keep stdin and stdout to ourselves: what libraries and children print goes to the log, and they read nothing."""
    commands, answers = os.dup(0), os.dup(1)
    with open(os.devnull, "rb") as nothing:  # noqa: PTH123 - a descriptor is wanted
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    return commands, answers


def prefer_as_victim() -> None:
    """When memory runs out, the kernel should end the worker, not the daemon."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500", encoding="ascii")
