"""Where the session is now: people rename folders while a training runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from sessions.layout import find_session_folder

T = TypeVar("T")


class Place:
    """The folder of a session, looked up anew for every write.

    Args:
        folder: where it was when the job was handed out.
        root: the tree in which it may have moved.
        session: its identity (``.fastsd/session.json``); None where it has none and cannot be followed.
    """

    def __init__(self, folder: Path, root: Path, session: str | None) -> None:
        self._folder = folder
        self._root = root
        self._session = session

    def now(self) -> Path:
        """The folder.

        Raises:
            FileNotFoundError: it is no longer in the tree.
        """
        if self._session is not None:
            self._folder = find_session_folder(self._root, self._session, self._folder)
        elif not self._folder.is_dir():
            raise FileNotFoundError(f"the session {self._folder} is gone")
        return self._folder

    def is_gone(self) -> bool:
        """Whether the session is no longer in the tree."""
        try:
            self.now()
        except FileNotFoundError:
            return True
        return False

    def write(self, action: Callable[[Path], T]) -> T:
        """Do something in the folder; once more from the start where the folder moved meanwhile.

        Args:
            action: gets the session's folder. It must make folders one level at a time (``folder_in``), never the
                session's own, or a folder that was just renamed would come back empty.
        """
        for _ in range(3):
            folder = self.now()
            try:
                return action(folder)
            except FileNotFoundError:
                if folder.is_dir():
                    raise
        return action(self.now())


def folder_in(folder: Path, *names: str) -> Path:
    """A folder below an existing one, made level by level.

    Raises:
        FileNotFoundError: ``folder`` itself is gone.
    """
    for name in names:
        folder = folder / name
        folder.mkdir(exist_ok=True)
    return folder
