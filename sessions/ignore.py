"""Which names in a tree are nobody's pictures: hidden files, downloads on their way, litter of systems and editors.

Pure functions of names. Paths are relative to the root, separated by ``/``, surrogate-escaped where bytes are no UTF-8.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import translate

# What browsers, FTP and sync programs call a file until it is whole, and editors call a copy of it.
_UNFINISHED = (
    ".part",
    ".partial",
    ".filepart",
    ".crdownload",
    ".download",
    ".opdownload",
    ".aria2",
    ".!ut",
    ".tmp",
    ".temp",
    ".swp",
    "~",
)
# Office's lock files; the hidden ones (.~lock, ._x, .DS_Store, fastsd's own temp files) start with a dot.
_PREFIXES = (".", "~$")
_LITTER = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"})
_LITTER_FOLDERS = frozenset({"$recycle.bin", "system volume information", "lost+found", "__macosx", "@eadir"})


def is_ignored_file_name(name: str) -> bool:
    """Whether a file of this name is hidden, unfinished or litter (fastsd's own temp files are hidden)."""
    lower = name.lower()
    return lower.startswith(_PREFIXES) or lower.endswith(_UNFINISHED) or lower in _LITTER


def is_ignored_folder_name(name: str) -> bool:
    """Whether a folder of this name is hidden (``.fastsd`` is) or a system's."""
    return name.startswith(".") or name.lower() in _LITTER_FOLDERS


class IgnoreRules:
    """The rules above, and the person's own patterns (``watch.ignore``).

    A pattern without ``/`` matches the name of a file or folder anywhere (``*.bak``, ``old``); one with ``/`` matches
    the path from the root, where ``*`` stays within a folder and ``**`` stands for any number of them
    (``Sessions/*/drafts``, ``**/raw/*.tif``); one that ends with ``/`` matches folders only. What lies in an ignored
    folder is ignored.

    Args:
        patterns: the person's patterns, matched with regard to case.
    """

    def __init__(self, patterns: Iterable[str] = ()) -> None:
        self._anywhere: list[re.Pattern[str]] = []
        self._anywhere_folders: list[re.Pattern[str]] = []
        self._paths: list[tuple[re.Pattern[str] | None, ...]] = []
        self._path_folders: list[tuple[re.Pattern[str] | None, ...]] = []
        for pattern in patterns:
            parts = [part for part in pattern.split("/") if part not in ("", ".")]
            if not parts:
                continue
            only_folders = pattern.endswith("/")
            if len(parts) == 1 and not pattern.startswith(("/", "./")):
                (self._anywhere_folders if only_folders else self._anywhere).append(re.compile(translate(parts[0])))
            else:
                compiled = tuple(None if part == "**" else re.compile(translate(part)) for part in parts)
                (self._path_folders if only_folders else self._paths).append(compiled)

    def ignores_file(self, path: str) -> bool:
        """Whether a file is ignored for its own name or path; its folders are asked with ``ignores_folder``."""
        name = path.rpartition("/")[2]
        return is_ignored_file_name(name) or self._matches(path, name, self._anywhere, self._paths)

    def ignores_folder(self, path: str) -> bool:
        """Whether a folder, and so everything below it, is ignored for its own name or path."""
        name = path.rpartition("/")[2]
        return (
            is_ignored_folder_name(name)
            or self._matches(path, name, self._anywhere, self._paths)
            or self._matches(path, name, self._anywhere_folders, self._path_folders)
        )

    @staticmethod
    def _matches(
        path: str,
        name: str,
        names: Sequence[re.Pattern[str]],
        paths: Sequence[tuple[re.Pattern[str] | None, ...]],
    ) -> bool:
        if any(pattern.match(name) for pattern in names):
            return True
        return bool(paths) and any(_path_matches(path.split("/"), pattern) for pattern in paths)


def _path_matches(parts: Sequence[str], pattern: Sequence[re.Pattern[str] | None]) -> bool:
    """Whether the parts of a path match the parts of a pattern; None stands for ``**``."""
    if not pattern:
        return not parts
    first, *rest = pattern
    if first is None:
        return any(_path_matches(parts[skipped:], rest) for skipped in range(len(parts) + 1))
    return bool(parts) and first.match(parts[0]) is not None and _path_matches(parts[1:], rest)
