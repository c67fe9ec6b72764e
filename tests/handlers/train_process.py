"""Trainings in processes of their own, which can be killed at any step."""

from __future__ import annotations

import os
import signal
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from handlers.context import JobContext
from handlers.train.job import TrainHandler
from sessions import files


def train_in_child(payload: dict[str, Any], cache: str, pause_after: int, pipe: Any) -> None:
    """Train, and tell of each step; wait for the parent (who kills) after step ``pause_after``."""
    seen = []

    def report(done: float, total: float, note: str, facts: Any) -> None:
        if "loss" in facts:
            seen.append(int(done))
            if done == pause_after:
                pipe.send(seen)
                pipe.recv()

    context = JobContext(1, "train", payload, "cpu", Path(cache), report, lambda: False, lambda: False)
    TrainHandler().run(context)
    pipe.send(seen)


def run_child(server: ForkServerContext, payload: dict[str, Any], cache: Path, kill_after: int | None) -> list[int]:
    """Train in a process of its own, killed with SIGKILL once ``kill_after`` steps are done. Returns its steps."""
    ours, theirs = server.Pipe()
    process = server.Process(target=train_in_child, args=(payload, str(cache), kill_after or -1, theirs))
    process.start()
    theirs.close()
    assert ours.poll(120), "the child gave no sign"
    seen: list[int] = ours.recv()
    if kill_after is not None:
        assert process.pid
        os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert process.exitcode == (-signal.SIGKILL if kill_after is not None else 0)
    process.close()
    ours.close()
    return seen


def weights_of(folder: Path) -> dict[str, str]:
    """Relative path → SHA-256 of every file of a finished folder."""
    return {
        path.relative_to(folder).as_posix(): files.sha256_of(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def finished(session: Path) -> dict[str, str]:
    return weights_of(session / ".fastsd" / "finished" / "r1")


def tear(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
