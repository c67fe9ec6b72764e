"""A worker process as the daemon sees it: start it, hand it jobs, hear how they go, end it and all it started.

Start workers from the main thread only: they ask the kernel to be killed with the *thread* that made them.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from handlers.kinds import Kind
from handlers.outcome import Outcome

# In the environment of every worker and of what it starts; its value names the daemon's state folder.
MARK = "FASTSD_WORKER_OF"
_LOG_BYTES = 2 << 20
_TAIL_BYTES = 4000
# How long a dead worker's pipe may stay open, held by something that it started and that outlived it.
_PIPE_SECONDS = 2.0
_KILL_SECONDS = 10.0
_SIGNALS = {
    signal.SIGKILL: "killed: out of memory?",
    signal.SIGSEGV: "a crash in native code",
    signal.SIGABRT: "a crash in native code",
    signal.SIGBUS: "a crash in native code; is the disk full?",
    signal.SIGILL: "this processor lacks an instruction that a package needs",
}
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """How a worker is started.

    Attributes:
        kind: what it does.
        device: a torch device string.
        cache: a folder on a local disk for downloads and scratch files.
        log: its stderr is appended here.
        environment: its whole environment.
    """

    kind: Kind
    device: str
    cache: Path
    log: Path
    environment: Mapping[str, str]

    @property
    def command(self) -> list[str]:
        """The command line; ``-P`` keeps files of the current folder from being imported."""
        return [
            *(sys.executable, "-P", "-m", "handlers.worker", "--kind", self.kind.name, "--handler", self.kind.handler),
            *("--device", self.device, "--cache", os.fspath(self.cache), "--parent", str(os.getpid())),
        ]


@dataclass(frozen=True)
class Progress:
    """How far a job is: ``done``, ``total``, ``note``, ``facts``."""

    job: int
    report: Mapping[str, Any]


@dataclass(frozen=True)
class Ended:
    """A job's outcome; ``died``: it is our verdict, for the worker ended without one."""

    job: int
    outcome: Outcome
    died: bool = False


class _Pipe(asyncio.SubprocessProtocol):
    """Puts the worker's messages in a queue, and None after the last."""

    def __init__(self) -> None:
        self.inbox: asyncio.Queue[Mapping[str, Any] | None] = asyncio.Queue()
        self.ended = asyncio.Event()
        self.resident = 0
        self._rest = b""
        self._transport: asyncio.SubprocessTransport | None = None
        self._exited = self._closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.SubprocessTransport", transport)

    def pipe_data_received(self, fd: int, data: bytes) -> None:  # noqa: ARG002 - asyncio's signature
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            try:
                message = json.loads(line)
                kind = message["type"]
            except (ValueError, TypeError, KeyError):
                _logger.warning("A worker wrote a line that is no message: %.200r", line)
                continue
            if kind == "heartbeat":
                self.resident = message.get("rss", 0)
            elif kind != "ready":
                self.inbox.put_nowait(message)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        if fd == 1:
            self._closed = True
            self._finish_when_over()

    def process_exited(self) -> None:
        self._exited = True
        if self._transport is not None:
            kill_group(self._transport.get_pid())
        self._finish_when_over()
        asyncio.get_running_loop().call_later(_PIPE_SECONDS, self._finish)

    def _finish_when_over(self) -> None:
        if self._exited and self._closed:
            self._finish()

    def _finish(self) -> None:
        if not self.ended.is_set():
            self.ended.set()
            self.inbox.put_nowait(None)
            if self._transport is not None:
                self._transport.close()


class WorkerProcess:
    """A running worker. Make it with ``start_worker``.

    Attributes:
        plan: how it was started.
        pid: its process id, and that of its process group.
    """

    def __init__(self, plan: Plan, transport: asyncio.SubprocessTransport, pipe: _Pipe, log_start: int) -> None:
        self.plan = plan
        self.pid = transport.get_pid()
        self._transport = transport
        self._pipe = pipe
        self._log_start = log_start
        self._stopping = False

    @property
    def usable(self) -> bool:
        """True while it takes jobs."""
        return not self._stopping and self._transport.get_returncode() is None and not self._pipe.ended.is_set()

    @property
    def resident_bytes(self) -> int:
        """The memory that it held at its last heartbeat."""
        return self._pipe.resident

    def _send(self, message: Mapping[str, Any]) -> None:
        pipe = cast("asyncio.WriteTransport | None", self._transport.get_pipe_transport(0))
        if pipe is not None and not pipe.is_closing() and self._transport.get_returncode() is None:
            pipe.write(json.dumps(message).encode("ascii") + b"\n")

    def run(self, jobs: Mapping[int, Mapping[str, Any]]) -> AsyncGenerator[Progress | Ended]:
        """Hand over jobs (number → payload). Gives what is heard of them, until each has one ``Ended``.

        A worker that dies fails the jobs that it had begun; those it had not begun come back as ``stopping``. One that
        tells nothing for ``kind.silence`` seconds is killed.
        """
        kind = self.plan.kind.name
        self._send({"type": "run", "jobs": [{"job": job, "kind": kind, "payload": jobs[job]} for job in jobs]})
        return self._events(set(jobs))

    async def _events(self, left: set[int]) -> AsyncGenerator[Progress | Ended]:
        loop, silence = asyncio.get_running_loop(), self.plan.kind.silence
        begun: set[int] = set()
        silent = False
        deadline = loop.time() + silence
        while left:
            try:
                async with asyncio.timeout_at(deadline):
                    message = await self._pipe.inbox.get()
            except TimeoutError:
                if silent:
                    break  # not even SIGKILL ends it: it hangs in the kernel, on a dead mount perhaps
                silent, deadline = True, loop.time() + _KILL_SECONDS
                self.kill()
                continue
            if message is None:
                break
            if not silent:
                deadline = loop.time() + silence
            match message:
                case {"type": "started", "jobs": list(numbers)}:
                    begun.update(numbers)
                case {"type": "progress", "job": job, "done": done, "total": total, "note": note, "facts": facts}:
                    if job in left:
                        yield Progress(job, {"done": done, "total": total, "note": note, "facts": facts})
                case {"type": "outcome", "job": job, "state": _} if job in left:
                    left.remove(job)
                    yield Ended(job, Outcome.from_json(message))
        if left:
            verdict = self._verdict(silent=silent)
            # One that stopped by itself (the system asked it to) blames nobody.
            gone = self._transport.get_returncode() == 0 and not begun
            for job in sorted(left):
                blamed = job in begun or (begun.isdisjoint(left) and not gone)
                yield Ended(job, verdict if blamed else Outcome("stopping"), died=True)

    def _verdict(self, *, silent: bool) -> Outcome:
        if silent:
            sentence = f"The worker was silent for {self.plan.kind.silence:g} s and was ended."
            return Outcome.failure("WorkerSilent", sentence, self.log_tail())
        return Outcome.failure("WorkerDied", describe_exit(self._transport.get_returncode()), self.log_tail())

    def log_tail(self) -> str:
        """The last lines that this worker wrote to its log."""
        with suppress(OSError), self.plan.log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self._log_start, size - _TAIL_BYTES))
            return file.read().decode("utf-8", errors="replace").strip()
        return ""

    def cancel(self, job: int) -> None:
        """Ask for a job to be cancelled; its outcome tells whether it was."""
        self._send({"type": "cancel", "job": job})

    def request_stop(self) -> None:
        """Ask the worker to save what it does, and end."""
        if not self._stopping:
            self._stopping = True
            self._send({"type": "stop"})

    async def stop(self, grace: float) -> None:
        """Ask the worker to end, and kill it after ``grace`` seconds. Returns when it is gone."""
        self.request_stop()
        if not await self._ends_within(grace):
            self.kill()
            if not await self._ends_within(_KILL_SECONDS):
                _logger.warning("Process %d cannot be ended; it hangs in the kernel", self.pid)

    async def _ends_within(self, seconds: float) -> bool:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                return await self._pipe.ended.wait()
        return False

    def kill(self) -> None:
        """End the worker and what it started, now."""
        self._stopping = True
        if self._transport.get_returncode() is None:
            kill_group(self.pid)


async def start_worker(plan: Plan) -> WorkerProcess:
    """Start a worker process. Raises ``OSError`` where that is not possible."""
    plan.log.parent.mkdir(parents=True, exist_ok=True)
    plan.cache.mkdir(parents=True, exist_ok=True)
    with suppress(OSError):
        if plan.log.stat().st_size > _LOG_BYTES:
            plan.log.replace(plan.log.with_name(f"{plan.log.name}.old"))
    with plan.log.open("ab") as log:
        log_start = log.tell()
        transport, pipe = await asyncio.get_running_loop().subprocess_exec(
            _Pipe, *plan.command, stderr=log, env=dict(plan.environment), start_new_session=True
        )
    return WorkerProcess(plan, transport, pipe, log_start)


def describe_exit(code: int | None) -> str:
    """How a worker ended, in a sentence, from its return code (negative: a signal)."""
    if code is None:
        return "The worker closed its pipe and was ended."
    if code >= 0:
        return f"The worker ended with exit code {code} before the job was done."
    try:
        number = signal.Signals(-code)
    except ValueError:
        return f"The worker was ended by signal {-code}."
    return f"The worker was ended by signal {-code} ({_SIGNALS.get(number, number.name)})."


def kill_group(pid: int) -> None:
    """End a process group, as far as it is still there."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def end_orphans(mark: str) -> int:
    """End what the workers of a dead daemon left behind, found by the mark in its environment. Returns how many.

    A worker dies with its daemon, by the kernel's hand; a process that the worker had started does not. Linux only;
    elsewhere nothing is found.
    """
    needle = f"{MARK}={mark}".encode("utf-8", errors="surrogateescape")
    ended = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if int(folder.name) != os.getpid() and needle in (folder / "environ").read_bytes().split(b"\0"):
                os.kill(int(folder.name), signal.SIGKILL)
                ended += 1
    return ended
