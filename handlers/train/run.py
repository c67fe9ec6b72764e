"""What a run leaves to read: ``runs/<id>/`` with ``run.json``, ``log.txt`` and ``metrics.jsonl``."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from handlers.train.place import Place, folder_in
from sessions import __version__, files
from sessions.layout import RUNS

_LOGGED_STEP = re.compile(r"^\S+ step (\d+)/")
_LIBRARIES = ("torch", "diffusers", "transformers", "safetensors", "accelerate", "numpy", "Pillow")


class RunFolder:
    """The folder of one run. Metrics are kept in memory until ``flush``; every write finds the session anew."""

    def __init__(self, place: Place, run: str) -> None:
        self.run = run
        self._place = place
        self._rows: list[dict[str, Any]] = []
        self._lines: list[str] = []

    def _write(self, name: str, lines: list[str]) -> None:
        self._place.write(lambda session: files.append_lines(folder_in(session, RUNS, self.run) / name, lines))

    def read_record(self) -> dict[str, Any] | None:
        """``run.json``, or None before it was written."""
        try:
            value = json.loads((self._place.now() / RUNS / self.run / "run.json").read_bytes())
        except (OSError, ValueError):
            return None
        return value if isinstance(value, dict) else None

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Write ``run.json`` whole."""
        value = {"run": self.run, **record, "version": __version__, "libraries": library_versions()}
        self._place.write(lambda session: files.write_json(folder_in(session, RUNS, self.run) / "run.json", value))

    def log(self, text: str) -> None:
        """Add a line to ``log.txt``, at once."""
        self._write("log.txt", [*self._lines, f"{now()} {text}"])
        self._lines.clear()

    def add_step(self, row: Mapping[str, Any], logged: str) -> None:
        """Note a step: a row of ``metrics.jsonl``; a line of ``log.txt`` where ``logged`` is not empty."""
        self._rows.append(dict(row))
        if logged:
            self._lines.append(f"{now()} {logged}")

    def flush(self) -> None:
        """Write what was noted since the last time."""
        if self._rows:
            self._write("metrics.jsonl", [json.dumps(row) for row in self._rows])
            self._rows.clear()
        if self._lines:
            self._write("log.txt", self._lines)
            self._lines.clear()

    def metrics(self) -> list[dict[str, Any]]:
        """All rows, those on the disk and those not yet there."""
        rows = []
        for line in _lines_of(self._place.now() / RUNS / self.run / "metrics.jsonl"):
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
        return rows + self._rows

    def forget_after(self, step: int) -> None:
        """Drop rows and lines of steps after ``step``: they will be done again."""
        folder = self._place.now() / RUNS / self.run
        self._rows.clear()
        self._lines.clear()
        kept = [json.dumps(row) for row in self.metrics() if row.get("step", 0) <= step]
        self._rewrite(folder / "metrics.jsonl", kept)
        lines = [line for line in _lines_of(folder / "log.txt") if _logged_step(line) <= step]
        self._rewrite(folder / "log.txt", lines)

    def _rewrite(self, path: Path, lines: list[str]) -> None:
        if _lines_of(path) != lines:
            files.write_text(path, "".join(f"{line}\n" for line in lines))


def _logged_step(line: str) -> int:
    match = _LOGGED_STEP.match(line)
    return int(match[1]) if match else 0


def _lines_of(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def now() -> str:
    """The time as ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide about numbers."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
