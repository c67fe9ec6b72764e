"""Random weights that are the same every time, without touching the caller's random state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator within, and give the caller's state back after."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
