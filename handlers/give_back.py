"""Giving memory back to the system: a daemon when a busy time is over, a worker before a picture that needs much."""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress


def give_memory_back() -> None:
    """Collect garbage, and have glibc return its free pages (malloc_trim(3)); elsewhere only the former."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
