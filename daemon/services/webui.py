"""The WebUI as a child of the daemon: started, watched, stopped for training, brought back, and never left behind.

Nothing here blocks the event loop: questions to the WebUI and looks at other processes run in threads.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from daemon.services import leftovers
from daemon.services.crashes import CrashLoop
from daemon.services.process import GuardedProcess, new_log
from handlers.publish.ask import CREDENTIALS, A1111Client, WebUIError

Phase = Literal["stopped", "starting", "ready", "stopping", "crashed", "blocked", "given-up"]
WhileTraining = Literal["stop", "unload", "keep"]

# The daemon's own affairs with systemd and its secrets are none of the WebUI's.
_PRIVATE = frozenset({"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "CREDENTIALS_DIRECTORY", CREDENTIALS})


@dataclass(frozen=True)
class State:
    """Where the WebUI stands.

    Attributes:
        phase: ``stopped``, ``starting``, ``ready``, ``stopping``, ``crashed`` (it will be started again), ``blocked``
            (another program holds its port) or ``given-up`` (it crashed too often).
        reason: a sentence for people; "" where the phase says all.
        ours: False when it is a WebUI that fastsd did not start and will not stop.
    """

    phase: Phase
    reason: str = ""
    ours: bool = True


@dataclass(frozen=True)
class Limits:
    """How long things may take, in seconds.

    Attributes:
        start: from the start until the API answers.
        poll: between two looks while something is awaited.
        health: between two looks at a WebUI that runs.
        silence: without an answer until it counts as hung.
        idle: how long a stop waits for the picture that is being drawn.
        signal: between SIGINT, SIGTERM and SIGKILL.
        crashes: the policy for crashes, copied for each ``start``.
    """

    start: float = 900.0
    poll: float = 0.25
    health: float = 10.0
    silence: float = 300.0
    idle: float = 60.0
    signal: float = 10.0
    crashes: CrashLoop = field(default_factory=CrashLoop)


class WebUISupervisor:
    """Keeps one WebUI running.

    Args:
        command: the program and its arguments (``python -u launch.py …``, rather than webui.sh, which loops).
        client: asks the WebUI; its address is where the command must make it listen.
        logs: the folder for its logs, one a run.
        mark: unique for this state folder; processes that carry it belong to this supervisor, or to a dead one.
        environment: the daemon's, with what the WebUI should see besides.
        folder: where it runs; None: beside the script that the command names.
        limits: how long things may take.
        on_change: hears every new state.
    """

    def __init__(
        self,
        command: Sequence[str],
        client: A1111Client,
        logs: Path,
        mark: str,
        *,
        environment: Mapping[str, str],
        folder: Path | None = None,
        limits: Limits = Limits(),
        on_change: Callable[[State], None] = lambda _: None,
    ) -> None:
        self._command = list(command)
        self._client = client
        self._logs = logs
        self._mark = mark
        self._environment = child_environment(environment, mark)
        self._folder = folder or working_folder(command)
        self._limits = limits
        self._on_change = on_change
        self._state = State("stopped")
        self._turn = asyncio.Lock()
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._process: GuardedProcess | None = None
        self._yielded: WhileTraining | None = None

    @property
    def state(self) -> State:
        """Where the WebUI stands now."""
        return self._state

    async def start(self) -> None:
        """Have the WebUI running from now on. Returns at once; nothing happens if it is wanted already."""
        async with self._turn:
            self._start()

    async def stop(self) -> None:
        """End the WebUI, after the picture that it draws, and keep it ended."""
        async with self._turn:
            self._yielded = None
            await self._shut_down(self._limits.idle)
            self._set(await self._stopped())

    async def kill(self) -> None:
        """End the WebUI now."""
        async with self._turn:
            self._yielded = None
            await self._cancel()
            await self._end_now()
            self._set(await self._stopped())

    async def yield_gpu(self, way: WhileTraining) -> None:
        """Make room on the GPU for a training.

        Args:
            way: ``stop`` ends the process (what fastsd did not start is unloaded instead); ``unload`` takes the model
                off the GPU; ``keep`` does nothing.
        """
        async with self._turn:
            if way == "keep" or self._task is None or self._task.done():
                return
            if way == "stop" and self._state.ours:
                await self._shut_down(self._limits.idle)
                self._set(State("stopped", "It makes room for a training, and comes back after it."))
                self._yielded = "stop"
            elif self._state.phase == "ready":
                with suppress(WebUIError):
                    await asyncio.to_thread(self._client.unload)
                self._yielded = "unload"

    async def resume(self) -> None:
        """Give the GPU back after ``yield_gpu``."""
        async with self._turn:
            yielded, self._yielded = self._yielded, None
            if yielded == "stop":
                self._start()
            elif yielded == "unload":
                with suppress(WebUIError):
                    await asyncio.to_thread(self._client.reload)

    async def until(self, *phases: Phase) -> State:
        """Wait until the WebUI is in one of some phases."""
        while self._state.phase not in phases:
            self._changed.clear()
            await self._changed.wait()
        return self._state

    def _set(self, state: State) -> None:
        if state != self._state:
            self._state = state
            self._changed.set()
            self._on_change(state)

    def _start(self) -> None:
        if self._task is None or self._task.done():
            self._set(State("starting"))
            self._task = asyncio.get_running_loop().create_task(self._watch(), name="webui")

    async def _watch(self) -> None:
        try:
            await self._supervise()
        except Exception as error:
            # A fault of ours must be seen, and must not take the daemon along.
            await self._end_now()
            self._set(State("given-up", f"fastsd failed to look after the WebUI: {type(error).__name__}: {error}."))

    async def _supervise(self) -> None:
        crashes = CrashLoop(**vars(self._limits.crashes))
        while True:
            await asyncio.to_thread(leftovers.end, self._mark, self._limits.signal)
            if await self._somebody_else():
                continue
            started = time.monotonic()
            reason = await self._run()
            delay = crashes.after(time.monotonic() - started)
            if delay is None:
                self._set(State("given-up", f"{reason} It crashed {crashes.crashes} times in a row: {_ADVICE}"))
                return
            self._set(State("crashed", f"{reason} It is started again in {delay:.0f} s."))
            await asyncio.sleep(delay)

    async def _somebody_else(self) -> bool:
        """Deal with a program at our address that is not ours; True when there was one and it may be gone now."""
        if not await asyncio.to_thread(port_answers, self._client.url):
            return False
        if await asyncio.to_thread(self._client.ready):
            note = f"A WebUI that fastsd did not start answers at {self._client.url}; it is used and left alone."
            self._set(State("ready", note, ours=False))
            await asyncio.sleep(self._limits.health)
        else:
            note = f"Another program holds {self._client.url}: end it, or set webui.url in fastsd.yaml."
            self._set(State("blocked", note, ours=False))
            await asyncio.sleep(max(self._limits.poll, self._limits.health / 5))
        return True

    async def _run(self) -> str:
        """One run, from start to an end that nobody asked for. Returns the sentence that says how it ended."""
        self._set(State("starting"))
        log = new_log(self._logs, "webui", time.localtime())
        try:
            self._process = process = await GuardedProcess.start(
                self._command, log, self._environment, self._folder, self._limits.signal
            )
        except OSError as error:
            return f"The WebUI cannot be started: {error.strerror} ({error.filename})."
        ended = asyncio.create_task(process.wait())
        try:
            if not await self._answers(ended, self._limits.poll, self._limits.start):
                return await self._ended(ended, f"has not answered within {_minutes(self._limits.start)} of its start")
            self._set(State("ready"))
            while await self._answers(ended, self._limits.health, self._limits.silence):
                await asyncio.wait({ended}, timeout=self._limits.health)
            return await self._ended(ended, f"has not answered for {_minutes(self._limits.silence)}")
        finally:
            ended.cancel()

    async def _answers(self, ended: asyncio.Task[int], interval: float, patience: float) -> bool:
        """Whether the API answers before ``patience`` seconds are over and before the process ends."""
        deadline = time.monotonic() + patience
        while not ended.done():
            if await asyncio.to_thread(self._client.ready):
                return True
            if time.monotonic() > deadline:
                return False
            await asyncio.wait({ended}, timeout=interval)
        return False

    async def _ended(self, ended: asyncio.Task[int], otherwise: str) -> str:
        """The sentence for an end; a WebUI that lives but does not answer is ended first."""
        process = self._process
        words = process.last_words() if process else ""
        quoted = f' Its last words: "{words}".' if words else ""
        if ended.done():
            self._process = None
            if ended.result() == _NOT_STARTED:
                advice = "See webui.command in fastsd.yaml."
                return f"The WebUI could not be started: {words or self._command[0]}. {advice}"
            return f"The WebUI ended by itself with {describe_exit(ended.result())}.{quoted}"
        await self._end_now()
        return f"The WebUI {otherwise}.{quoted}"

    async def _cancel(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _shut_down(self, idle_within: float) -> None:
        """End it in good order: wait for its picture, interrupt, SIGINT, SIGTERM, SIGKILL."""
        was_ready = self._state.phase == "ready"
        await self._cancel()
        process = self._process
        if process is None:
            return
        self._set(State("stopping"))
        if was_ready:
            await self._until_idle(idle_within)
            with suppress(WebUIError):
                await asyncio.to_thread(self._client.interrupt)
        for number in (signal.SIGINT, signal.SIGTERM):
            process.signal(number)
            if await process.wait_within(self._limits.signal):
                break
        await self._end_now()

    async def _stopped(self) -> State:
        """That it is stopped, and whether the port is free for the next start: all of ours is gone by now."""
        if await asyncio.to_thread(port_answers, self._client.url):
            return State("stopped", f"A program that fastsd did not start still answers at {self._client.url}.")
        return State("stopped")

    async def _until_idle(self, within: float) -> None:
        deadline = time.monotonic() + within
        with suppress(WebUIError):
            # Another process sets no event of ours: it is looked at.
            while not await asyncio.to_thread(self._client.idle) and time.monotonic() < deadline:  # noqa: ASYNC110
                await asyncio.sleep(self._limits.poll)

    async def _end_now(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.end()
            await process.wait()
            await asyncio.to_thread(leftovers.end, self._mark, 0.0)


# The guardian's exit code for a program that cannot be started; a shell's, too.
_NOT_STARTED = 127
_ADVICE = "fastsd leaves it alone. Its log says more; mend it, then start fastsd again."


def child_environment(environment: Mapping[str, str], mark: str) -> dict[str, str]:
    """What the WebUI sees: the daemon's environment without its private parts, and with the mark."""
    visible = {name: value for name, value in environment.items() if name not in _PRIVATE}
    return {**visible, "PYTHONUNBUFFERED": "1", leftovers.MARK: mark}


def working_folder(command: Sequence[str]) -> Path | None:
    """The folder of the script that a command names by an absolute path; None when it names none."""
    for argument in command:
        path = Path(argument)
        if path.suffix in (".py", ".sh") and path.is_absolute() and path.is_file():
            return path.parent
    return None


def port_answers(url: str) -> bool:
    """Whether anything accepts connections at an address. Blocks for at most two seconds."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        with socket.create_connection((parts.hostname or "127.0.0.1", port), timeout=2.0):
            return True
    except OSError:
        return False


def describe_exit(code: int) -> str:
    """An exit code in words: ``exit code 1``, ``signal SIGSEGV``."""
    with suppress(ValueError):
        if code > 128:
            return f"signal {signal.Signals(code - 128).name}"
    return f"exit code {code}"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:g} seconds"
