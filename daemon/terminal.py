"""Progress bars for somebody who watches ``fastsd up`` or a one-off command on a terminal."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import Any, Protocol

from sessions.status import duration, pace


class ProgressDisplay(Protocol):
    """Shows how far jobs are."""

    def show(self, job: int, kind: str, subject: str, progress: Mapping[str, Any]) -> None:
        """A job reported ``done``, ``total``, ``note`` and ``facts``."""
        ...

    def end(self, job: int) -> None:
        """A job has ended."""
        ...

    def log_handler(self) -> logging.Handler:
        """Where log lines go, so that they and what is shown do not spoil each other."""
        ...

    def close(self) -> None:
        """Nothing more comes."""
        ...


class NoDisplay:
    """Shows nothing: the output goes to a file or a service's journal."""

    def show(self, job: int, kind: str, subject: str, progress: Mapping[str, Any]) -> None:
        """Nothing."""

    def end(self, job: int) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""

    def log_handler(self) -> logging.Handler:
        """Plain lines on stderr."""
        return logging.StreamHandler(sys.stderr)


class Bars:
    """A bar a running job, with rich, on stderr."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._progress = Progress(
            TextColumn("{task.fields[kind]:<8}"),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=Console(stderr=True),
            transient=True,
        )
        self._tasks: dict[int, Any] = {}
        self._progress.start()

    def show(self, job: int, kind: str, subject: str, progress: Mapping[str, Any]) -> None:
        """Move the bar of a job."""
        total = float(progress.get("total") or 0) or None
        words = bar_words(subject, progress)
        if job not in self._tasks:
            self._tasks[job] = self._progress.add_task(words, total=total, kind=kind)
        done = float(progress.get("done") or 0)
        self._progress.update(self._tasks[job], completed=done, total=total, description=words)

    def end(self, job: int) -> None:
        """Take the bar of a job away."""
        task = self._tasks.pop(job, None)
        if task is not None:
            self._progress.remove_task(task)

    def log_handler(self) -> logging.Handler:
        """Lines above the bars."""
        from rich.logging import RichHandler

        return RichHandler(console=self._progress.console, show_path=False, log_time_format="%H:%M:%S")

    def close(self) -> None:
        """Take all bars away."""
        self._progress.stop()


def bar_words(subject: str, progress: Mapping[str, Any]) -> str:
    """What stands beside a bar."""
    words = (subject, str(progress.get("note") or ""), *_figures(progress))
    return " · ".join(word for word in words if word)


def _figures(progress: Mapping[str, Any]) -> list[str]:
    """How a training goes: steps, loss, time left, seconds a step, memory."""
    facts = progress.get("facts") or {}
    if "loss" not in facts:
        return []
    figures = [f"{progress['done']:,.0f}/{progress['total']:,.0f}", f"loss {facts['loss']:.4f}"]
    figures += [f"{duration(facts['eta'])} left"] if "eta" in facts else []
    return figures + pace(facts)


def display_for_terminal() -> ProgressDisplay:
    """Bars where stderr is a terminal, else nothing."""
    return Bars() if sys.stderr.isatty() else NoDisplay()
