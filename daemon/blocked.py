"""Folders that fastsd may not write or look into: told beside the folder, and taken back when it goes on."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from daemon.session import Sessions
from sessions.errors import remove_error, write_error
from sessions.layout import ERROR_SUFFIX
from sessions.refusal import Refusal

log = logging.getLogger(__name__)
# No affair of one folder's permissions.
_FULL = frozenset(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT))


class BlockedFolders:
    """Keeps an error file beside every folder that is blocked, and beside no other.

    Args:
        root: the tree.
        sessions: they know which of their folders cannot be written.
        unreadable: () → folders that the last scan could not look into: path → the system's words.
    """

    def __init__(self, root: Path, sessions: Sessions, unreadable: Callable[[], Mapping[str, str]]) -> None:
        self._root = root
        self._sessions = sessions
        self._unreadable = unreadable
        # The root's own note lies outside the tree: nobody finds it.
        self._told: dict[str, str] = {"": ""}

    def found(self, note: str) -> None:
        """An error file lies in the tree. Where it is about a folder, it is ours to take back."""
        folder = note.removesuffix(ERROR_SUFFIX)
        if folder not in self._told and (self._root / folder).is_dir():
            self._told[folder] = ""

    def refusals(self) -> dict[str, Refusal]:
        """Every blocked folder, relative to the root, and what there is to be said of it."""
        told = {path: _refusal("look into", "read", why) for path, why in self._unreadable().items()}
        for path, why in self._sessions.unwritable.items():
            told[path] = _refusal("write into", "write", why)
        return told

    def lines(self) -> list[str]:
        """A line a blocked folder, for ``fastsd status``."""
        return [f"{path or self._root}: {refusal}" for path, refusal in sorted(self.refusals().items())]

    def tell(self) -> None:
        """Bring the error files in line with what is blocked now."""
        refusals = self.refusals()
        for path in [path for path in self._told if path not in refusals]:
            del self._told[path]
            try:
                remove_error(self._folder(path))
            except OSError as error:
                log.warning("%s: its error file cannot be taken away: %s", path, error)
        for path, refusal in refusals.items():
            try:
                write_error(self._folder(path), refusal)
            except OSError as error:
                if self._told.get(path) != refusal.what:
                    log.warning("%s: %s (and this cannot be told beside it: %s)", self._folder(path), refusal, error)
            self._told[path] = refusal.what

    def _folder(self, path: str) -> Path:
        return self._root / path if path else self._root


def _refusal(verb: str, right: str, why: str) -> Refusal:
    what = f"fastsd cannot {verb} this folder: {why}."
    if why in _FULL:
        return Refusal("disk-full", what, "Make room on the disk; fastsd then goes on by itself.")
    advice = f"Give the user that fastsd runs as the right to {right} there; it then goes on by itself."
    return Refusal("blocked", what, advice)
