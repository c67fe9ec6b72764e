"""The guardian: runs one long-lived program for the daemon, and lets nothing of it outlive the daemon.

Started by path with the standard library alone (``python -I -S child.py GRACE -- COMMAND…``), between the daemon and
the program. It is the reaper of all that the program starts, even of what leaves its process group. It ends all of it

- when its standard input ends, which happens however the daemon dies (kill -9 included): SIGTERM, and SIGKILL after
  GRACE seconds;
- when the program itself ends: what it left behind would hold its port and its GPU memory;
- when the daemon writes ``end``: at once, with SIGKILL.

``signal N`` on standard input sends signal N to the program's process group. The exit code is the program's, 128 + N
when signal N ended it, 127 when it could not be started. If the guardian is killed, the kernel kills the program.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def main(arguments: list[str]) -> int:
    """Run ``arguments[2:]`` until it, or the daemon, ends. Returns the exit code."""
    grace, command = float(arguments[0]), arguments[2:]
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    wake, wake_writer = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(wake_writer, False)
    signal.set_wakeup_fd(wake_writer, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    program = _spawn(command)
    code = _watch(program, wake)
    if code is None:
        code = _end(program, grace)
    _end_all()
    return code


def _spawn(command: list[str]) -> int:
    """Start the program in a session of its own. Returns its process id."""
    guardian = os.getpid()
    program = os.fork()
    if program:
        return program
    try:
        os.setsid()
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != guardian:
            os._exit(127)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.execvp(command[0], command)  # noqa: S606 - the command is the setting's own list, no shell wanted
    except OSError as error:
        print(f"{command[0]} cannot be started: {error.strerror}", file=sys.stderr, flush=True)
    finally:
        os._exit(127)


def _watch(program: int, wake: int) -> int | None:
    """Pass signals on until the program ends (its exit code) or the daemon goes away (None)."""
    commands = b""
    while True:
        readable, _, _ = select.select([0, wake], [], [])
        if wake in readable:
            numbers = os.read(wake, 4096)
            code = _reap(program)
            if code is not None:
                return code
            if signal.SIGTERM in numbers:
                return None
        if 0 in readable:
            read = os.read(0, 4096)
            if not read:
                return None
            *lines, commands = (commands + read).split(b"\n")
            for line in lines:
                if line == b"end":
                    with suppress(ProcessLookupError):
                        os.kill(program, signal.SIGKILL)
                elif line.startswith(b"signal "):
                    with suppress(ProcessLookupError):
                        os.killpg(program, int(line[7:]))


def _end(program: int, grace: float) -> int:
    """SIGTERM to everything, and after ``grace`` seconds SIGKILL to the program. Returns its exit code."""
    for process in _descendants():
        _send(process, signal.SIGTERM)
    deadline = time.monotonic() + grace
    while True:
        code = _reap(program)
        if code is not None:
            return code
        if time.monotonic() > deadline:
            _send(program, signal.SIGKILL)
        time.sleep(0.02)


def _end_all() -> None:
    """SIGKILL to all that is left, until nothing is, not even a process that nobody has collected."""
    while True:
        for process in _descendants():
            _send(process, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        except ChildProcessError:
            return
        time.sleep(0.01)


def _reap(program: int) -> int | None:
    """Collect what has ended. Returns the program's exit code if it is among it."""
    found = None
    while True:
        try:
            process, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if process == 0:
            return found
        if process == program:
            code = os.waitstatus_to_exitcode(status)
            found = code if code >= 0 else 128 - code


def _descendants() -> list[int]:
    """All living processes below this one."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                # "pid (name) state parent …"; the name may hold anything.
                state, parent = (folder / "stat").read_bytes().rsplit(b")", 1)[1].split()[:2]
                if state not in (b"Z", b"X"):
                    parents[int(folder.name)] = int(parent)
    found, ring = [], [os.getpid()]
    while ring:
        ring = [process for process, parent in parents.items() if parent in ring]
        found += ring
    return found


def _send(process: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, number)


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
