"""What one picture may cost: memory beyond what the process holds, and seconds."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DECODE_BYTES = 256 << 20
"""Memory that decoding one picture may take beyond what the worker holds."""
DECODE_SECONDS = 60.0
"""How long reading and decoding one picture may take; the largest that are allowed take a tenth of it."""
_KILOBYTE = 1024


@contextmanager
def limited_memory(extra: int = DECODE_BYTES) -> Iterator[None]:
    """Inside, this process gets at most ``extra`` bytes more memory of its own; more is a ``MemoryError``.

    For a process that does nothing else meanwhile. Where the system does not tell what the process holds (it is no
    Linux), there is no limit.
    """
    held = _data_bytes()
    if held is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = held + extra
    limits = [wanted, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _data_bytes() -> int | None:
    """The private writable memory of this process, as RLIMIT_DATA counts it."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmData:"):
                return int(line.split()[1]) * _KILOBYTE
    except (OSError, ValueError, IndexError):
        pass
    return None
