"""Which pictures are held out to see whether a training only learns its pictures by heart. Pure; no torch.

``validation: auto`` holds out a tenth, at most 8, and only where that is at least 4, so from 40 pictures on: who has 20
has none to spare, and the loss of fewer than 4 says more about these than about the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from sessions.refusal import Refusal

SHARE = 10
LEAST = 4
MOST = 8
_FEWEST_TRAINED = 3


def how_many(written: int | str, pictures: int, instance: str) -> int:
    """How many pictures are held out.

    Args:
        written: ``validation:`` of train.yaml, ``auto`` or a number.
        pictures: how many there are.
        instance: with ``filename`` each picture may be a subject of its own, and ``auto`` holds none out.

    Raises:
        Refusal: code ``spec``: too few would be left.
    """
    if isinstance(written, str):
        tenth = pictures // SHARE
        return 0 if instance == "filename" or tenth < LEAST else min(tenth, MOST)
    if written and pictures - written < _FEWEST_TRAINED:
        raise Refusal(
            "spec",
            f"validation: {written} leaves {max(0, pictures - written)} of {pictures} pictures to train on.",
            f"Leave at least {_FEWEST_TRAINED}, or write validation: 0.",
        )
    return written


def split(
    pictures: Sequence[Mapping[str, Any]], count: int, seed: int
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """The pictures to train on and those that are held out, each in the order given.

    Which these are depends on seed and content alone: more pictures later, or other names, change little.
    """

    def lot(picture: Mapping[str, Any]) -> bytes:
        content = picture.get("sha256") or picture["source"]
        return hashlib.sha256(f"{seed}/held out/{content}".encode(errors="surrogateescape")).digest()

    drawn = sorted(range(len(pictures)), key=lambda index: lot(pictures[index]))
    held = set(drawn[:count])
    trained = [picture for index, picture in enumerate(pictures) if index not in held]
    return trained, [pictures[index] for index in sorted(held)]
