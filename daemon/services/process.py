"""One run of a long-lived program under its guardian, for asyncio, with a log file of its own."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

_GUARDIAN = Path(__file__).with_name("child.py")
KEPT_LOGS = 5


class GuardedProcess:
    """A program that runs under a guardian (``daemon.services.child``) and cannot outlive this process.

    Made by ``start``. Attributes:
        log: the file with all that it printed.
    """

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self.log = log
        self._process = process

    @classmethod
    async def start(
        cls,
        command: Sequence[str],
        log: Path,
        environment: Mapping[str, str],
        folder: Path | None,
        grace: float,
    ) -> GuardedProcess:
        """Start a program.

        Args:
            command: the program and its arguments.
            log: a new file for what it prints.
            environment: its whole environment.
            folder: where it runs; None for this process's folder.
            grace: seconds between SIGTERM and SIGKILL when this process dies.

        Raises:
            OSError: the log cannot be written, or the folder is not there.
        """
        with log.open("xb") as output:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", str(_GUARDIAN), str(grace), "--", *command),
                stdin=asyncio.subprocess.PIPE,
                stdout=output,
                stderr=asyncio.subprocess.STDOUT,
                env=dict(environment),
                cwd=folder,
                start_new_session=True,
            )
        return cls(process, log)

    async def wait(self) -> int:
        """Until it and all that it started have ended. Returns its exit code (128 + N after signal N)."""
        return await self._process.wait()

    async def wait_within(self, seconds: float) -> bool:
        """Whether it ends within so many seconds."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), seconds)
        return self._process.returncode is not None

    def signal(self, number: int) -> None:
        """Send a signal to its process group."""
        self._tell(f"signal {number:d}\n")

    def end(self) -> None:
        """Kill it and everything that it started."""
        self._tell("end\n")

    def last_words(self) -> str:
        """The last line of its log, cut to 200 characters; "" without any."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, file.seek(0, 2) - 4096))
                lines = file.read().decode("utf-8", errors="replace").split("\n")
        except OSError:
            return ""
        return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "")

    def _tell(self, line: str) -> None:
        if self._process.stdin is not None and self._process.returncode is None:
            with suppress(OSError):
                self._process.stdin.write(line.encode())


def new_log(folder: Path, name: str, now: time.struct_time) -> Path:
    """A fresh log file's path, ``<name>-<date>-<time>-<n>.log``; of the older ones the last four are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    older = sorted(folder.glob(f"{name}-*.log"))
    for path in older[: max(0, len(older) - (KEPT_LOGS - 1))]:
        with suppress(OSError):
            path.unlink()
    stamp = time.strftime("%Y%m%d-%H%M%S", now)
    count = 1
    while (path := folder / f"{name}-{stamp}-{count:04d}.log").exists():
        count += 1
    return path
