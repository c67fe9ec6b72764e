"""What a dead daemon left running: found by a mark in its environment, which every process below it inherits.

A process id in a file may belong to somebody else by now, and names only one process; the mark names them all.
"""

from __future__ import annotations

import os
import select
import signal
import time
from contextlib import suppress
from pathlib import Path

MARK = "FASTSD_SERVICE"
_PROC = Path("/proc")


def marked(mark: str) -> list[int]:
    """Process ids of the living processes that carry a mark, without this one. Linux only; elsewhere none."""
    entry = os.fsencode(f"{MARK}={mark}")
    if not _PROC.is_dir():
        return []
    processes = (int(folder.name) for folder in _PROC.iterdir() if folder.name.isdigit())
    return [process for process in processes if process != os.getpid() and _carries(process, entry)]


def end(mark: str, grace: float = 5.0) -> int:
    """End all processes that carry a mark: SIGTERM, then SIGKILL after ``grace`` seconds. Blocks until they are gone.

    Returns:
        How many there were.
    """
    entry = os.fsencode(f"{MARK}={mark}")
    handles = {}
    for process in marked(mark):
        with suppress(OSError):
            handle = os.pidfd_open(process)
            handles[handle] = process
    # Looked at again now that a handle holds it: the id may have changed hands since the listing.
    for handle, process in list(handles.items()):
        if not _carries(process, entry):
            os.close(handle)
            del handles[handle]
    count = len(handles)
    try:
        for number, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, 10.0)):
            for handle in handles:
                with suppress(ProcessLookupError, PermissionError):
                    signal.pidfd_send_signal(handle, number)
            deadline = time.monotonic() + seconds
            while handles and time.monotonic() < deadline:
                for handle in select.select(list(handles), [], [], max(0.0, deadline - time.monotonic()))[0]:
                    os.close(handle)
                    del handles[handle]
            if not handles:
                break
    finally:
        for handle in handles:
            os.close(handle)
    return count


def _carries(process: int, entry: bytes) -> bool:
    try:
        content = (_PROC / str(process) / "environ").read_bytes()
    except OSError:
        return False
    return entry in content.split(b"\0")
