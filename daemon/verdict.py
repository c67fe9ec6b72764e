"""How far a scan is believed: deletions look like a lost mount, and a lost mount is never "everything was deleted"."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

_DOUBT_FROM = 20


class Trust(Enum):
    """How far a walk that is complete can be believed."""

    FULL = "full"
    """What it did not see has vanished."""
    FINDS_ONLY = "finds only"
    """What it saw is there; what it did not see is not forgotten."""
    NONE = "none"
    """It is not our tree that lies there."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """How far a walk can be believed, and why not further (a sentence for the person; "" with full trust)."""

    trust: Trust
    reason: str = ""


def judge(*, root: str, known: int, vanished: int, files: int, same_root: bool, has_events: bool) -> Verdict:
    """Whether a walk that misses files saw deletions or a lost mount.

    A root that is the same folder on the same device and sends events is believed. Without events (a mounted Drive
    keeps its numbers when it is empty), an empty root is not our tree, and the loss of more than half of at least 20
    files at once is doubted. Where another folder or device lies at the root, it is our tree if half of the known files
    are there.

    Args:
        root: its name, for the sentence.
        known: files known before the walk.
        vanished: how many of them it missed.
        files: how many files it saw.
        same_root: device and inode of the root are those that were recorded.
        has_events: the file system tells of deletions.
    """
    if not vanished or (same_root and has_events):
        return Verdict(Trust.FULL)
    most = vanished * 2 > known
    missing = f"{vanished} of {known} known files are not there"
    if not same_root and most:
        return Verdict(Trust.NONE, f"Not the folder that lay at {root} before: {missing}. Is it mounted?")
    if files == 0:
        return Verdict(Trust.NONE, f"{root} is suddenly empty: {missing}. Is it still mounted?")
    if most and known >= _DOUBT_FROM:
        return Verdict(
            Trust.FINDS_ONLY,
            f"More than half of {root} is gone at once: {missing}. Nothing is forgotten until they are back.",
        )
    return Verdict(Trust.FULL)
