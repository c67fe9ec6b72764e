"""STATUS.txt: what somebody who sees only the folder, on a phone, should know. A pure rendering of facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

_WIDTH = 11
_LISTED = 8


@dataclass(frozen=True)
class SessionStatus:
    """What is to be said of one session.

    Attributes:
        name: the session's name.
        state: one line: what happens now, or what it waits for.
        run: of a training that runs: seconds a step, memory, loss of held-out pictures.
        decided: of a training that runs: what ``auto`` became.
        pictures: pictures there are.
        cropped: of these, how many have their crop.
        captioned: of these, how many have a caption, theirs or ours.
        waits: reasons why something waits, each a sentence with what helps.
        models: a line a finished model.
        trouble: a line a file that was refused or failed.
        hints: what is worth a look, about the set of pictures.
        notes: other things worth a line.
    """

    name: str
    state: str
    pictures: int = 0
    cropped: int = 0
    captioned: int = 0
    waits: Sequence[str] = ()
    models: Sequence[str] = ()
    trouble: Sequence[str] = ()
    hints: Sequence[str] = ()
    notes: Sequence[str] = field(default_factory=tuple)
    run: Sequence[str] = ()
    decided: Sequence[str] = ()


def render(status: SessionStatus, now: datetime, stale_after: timedelta) -> str:
    """The text of STATUS.txt.

    Args:
        status: what to say.
        now: the time, with a zone.
        stale_after: how long the text may be believed while something is going on.
    """
    lines = [f"fastsd · {status.name}", ""]
    lines += _block("State", [status.state])
    lines += _block("Run", status.run)
    lines += _block("Decided", status.decided)
    pictures = f"{status.pictures}: {status.cropped} cropped, {status.captioned} captioned"
    lines += _block("Pictures", [pictures if status.pictures else "none yet: drop some here"])
    lines += _block("Waits for", status.waits)
    lines += _block("Models", status.models)
    lines += _block("Trouble", status.trouble)
    lines += _block("Look at", status.hints)
    lines += _block("Notes", status.notes)
    zone = now.strftime("%Z") or "UTC"
    updated, until = now.strftime("%Y-%m-%d %H:%M:%S"), (now + stale_after).strftime("%H:%M")
    lines += ["", f"Updated {updated} {zone}; stale if older than {until}."]
    return "\n".join(lines) + "\n"


def same_but_time(first: str, second: str) -> bool:
    """Whether two texts say the same, their time aside: then the file need not be written again."""
    return first.rsplit("\n", 2)[0] == second.rsplit("\n", 2)[0]


def _block(label: str, entries: Sequence[str]) -> list[str]:
    shown = [entry.replace("\n", " ") for entry in entries[:_LISTED]]
    if len(entries) > _LISTED:
        shown.append(f"… and {len(entries) - _LISTED} more")
    return [f"{label if number == 0 else '':<{_WIDTH}}{entry}" for number, entry in enumerate(shown)]


def pace(facts: Mapping[str, Any]) -> list[str]:
    """How a training goes, from the facts that it reports: "0.62 s a step", "7.1 GB of GPU memory"."""
    said = []
    if isinstance(seconds := facts.get("seconds_per_step"), int | float):
        said.append(f"{seconds:.3g} s a step" if seconds < 100 else f"{duration(seconds)} a step")
    if facts.get("gpu_memory"):
        said.append(f"{size(facts['gpu_memory'])} of GPU memory")
    elif facts.get("memory"):
        said.append(f"{size(facts['memory'])} of memory")
    return said


def held_out(facts: Mapping[str, Any]) -> str:
    """The loss of the pictures that were held out; empty where none were or none is known yet."""
    loss = facts.get("validation_loss")
    return f"held-out pictures: loss {loss:.4f} at step {facts.get('validation_step', 0):,}" if loss is not None else ""


def duration(seconds: float) -> str:
    """A length of time as people say it: "40 s", "12 min", "3 h 5 min"."""
    whole = max(0, round(seconds))
    if whole < 90:
        return f"{whole} s"
    minutes = round(whole / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest} min" if rest else f"{hours} h"


def size(count: float) -> str:
    """A number of bytes as people say it: "1.2 GB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError
