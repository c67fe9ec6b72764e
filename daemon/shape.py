"""Where sessions begin in a tree, learned from what has settled in it."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from pathlib import Path

from daemon.index import Index
from sessions import layout
from sessions.layout import Shape


class ShapeWatch:
    """Keeps the shape of a tree.

    Args:
        root: the tree.
        index: its settled facts.

    Attributes:
        shape: as far as the tree has been seen.
    """

    def __init__(self, root: Path, index: Index) -> None:
        self._root = root
        self._index = index
        self._spec_folders: set[str] = set()
        self.shape = Shape()

    def read_index(self) -> None:
        """Take in every train.yaml that is known. At start: later on, the index may be a moment behind."""
        self._spec_folders |= {
            folder for folder in self._index.folders() if any(map(layout.is_spec_name, self._index.known(folder)))
        }

    def settled(self, paths: Iterable[str] = ()) -> bool:
        """Files have settled. Returns whether sessions begin elsewhere than before."""
        top_files = set()
        for path in paths:
            folder, _, name = path.rpartition("/")
            if layout.is_spec_name(name):
                self._spec_folders.add(folder)
            if not folder:
                top_files.add(name)
        return self._learn(top_files)

    def vanished(self, paths: Iterable[str]) -> bool:
        """Files are gone. Returns whether sessions begin elsewhere than before."""
        specs = [path for path in paths if layout.is_spec_name(path.rpartition("/")[2])]
        if not specs:
            return False
        self._spec_folders -= {path.rpartition("/")[0] for path in specs if not self._spec_beside(path)}
        return self._learn(())

    def _learn(self, top_files: Collection[str]) -> bool:
        if not self._has_entries():
            return False  # out of reach: it says nothing about where sessions begin
        top_folders = {name for name in (layout.SESSIONS, layout.INSTANCE_IMAGES) if (self._root / name).is_dir()}
        files = set(top_files)
        if layout.SESSIONS not in top_folders and not self.shape.root_is_session:
            files |= set(self._index.known(""))
        shape = Shape.of(top_folders, files, self._spec_folders)
        if self.shape.root_is_session and not shape.has_sessions:
            shape = Shape(has_sessions=False, root_is_session=True, nested=shape.nested)
        changed = shape != self.shape
        self.shape = shape
        return changed

    def _has_entries(self) -> bool:
        try:
            with os.scandir(self._root) as entries:
                return next(entries, None) is not None
        except OSError:
            return False

    def _spec_beside(self, path: str) -> bool:
        """Whether another train.yaml lies in the folder of one that is gone."""
        folder = self._root / path.rpartition("/")[0]
        try:
            return any(layout.is_spec_name(entry.name) for entry in folder.iterdir())
        except OSError:
            return False
