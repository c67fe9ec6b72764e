"""The trash of a session: what fastsd made and no longer stands for anything. Kept 30 days, then removed."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from contextlib import suppress
from datetime import date, timedelta
from pathlib import Path

from sessions import layout

KEPT_DAYS = 30


def move_to_trash(folder: Path, outputs: Iterable[str], today: date) -> list[str]:
    """Move outputs (paths in the session) to ``.fastsd/trash/<date>/``; what is not there is passed over.

    Returns:
        The paths that were moved.
    """
    moved = []
    for output in outputs:
        source = folder / output
        target = folder / layout.PRIVATE / "trash" / today.isoformat() / output
        target.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            source.replace(target)
            moved.append(output)
    return moved


def empty_trash(folder: Path, today: date) -> int:
    """Remove what has lain in the trash of a session for more than 30 days. Returns how many days' folders went."""
    gone = 0
    trash = folder / layout.PRIVATE / "trash"
    with suppress(FileNotFoundError):
        for day in trash.iterdir():
            try:
                thrown = date.fromisoformat(day.name)
            except ValueError:
                continue
            if today - thrown > timedelta(days=KEPT_DAYS):
                shutil.rmtree(day, ignore_errors=True)
                gone += 1
    return gone
