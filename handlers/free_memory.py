"""How much memory is free. Linux's killer of processes raises nothing, so on the CPU it must be known before."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

# Where nothing says how much there is.
UNKNOWN = 2 << 30
_NO_LIMIT = 1 << 60


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may still take: what the system has available, within the limits of its control groups.

    Args:
        root: of the file system in which ``proc`` and ``sys`` lie.
    """
    found = [available_of(text) for text in _texts(root / "proc/meminfo")]
    for folder in _groups(root):
        found += [
            limit - used
            for limit_name, used_name, cache_key in (
                ("memory.max", "memory.current", "inactive_file"),
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
            )
            for limit in map(_number, _texts(folder / limit_name))
            if limit is not None and limit < _NO_LIMIT
            for used in (_used(folder, used_name, cache_key),)
        ]
    return max(0, min(found, default=UNKNOWN))


def available_of(meminfo: str) -> int:
    """The bytes that /proc/meminfo calls available."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo, re.MULTILINE)
    return int(match[1]) * 1024 if match else UNKNOWN


def _groups(root: Path) -> Iterator[Path]:
    """The folders of this process's memory groups and of all above them, versions 1 and 2."""
    for text in _texts(root / "proc/self/cgroup"):
        for line in text.splitlines():
            _, controllers, path = (*line.split(":", 2), "", "")[:3]
            if controllers and "memory" not in controllers.split(","):
                continue
            top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
            here = top / path.strip("/")
            # In a container, the path may be the host's: then only the top is there.
            yield from (folder for folder in (here, *here.parents) if folder == top or top in folder.parents)


def _used(folder: Path, name: str, cache_key: str) -> int:
    """What a group holds, less the cache that is given back before memory runs out."""
    used = next((number for text in _texts(folder / name) if (number := _number(text)) is not None), 0)
    cached = 0
    for text in _texts(folder / "memory.stat"):
        if match := re.search(rf"^{cache_key} (\d+)", text, re.MULTILINE):
            cached = int(match[1])
    return max(0, used - cached)


def _number(text: str) -> int | None:
    """A limit; None for ``max``."""
    return int(text) if text.strip().isdigit() else None


def _texts(path: Path) -> list[str]:
    try:
        return [path.read_text(encoding="ascii", errors="replace")]
    except OSError:
        return []
