"""The sessions of a tree while the daemon runs: identity, manifest and output names, loaded when needed."""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from daemon.cropping import CropRules, read_crop_rules
from sessions import layout
from sessions.files import sweep_temporaries
from sessions.manifest import Identity, Manifest, new_identity, read_identity, write_identity

# Manifests of so many sessions are kept in memory; the others are read again when something happens in them.
_LOADED_SESSIONS = 4


@dataclass
class Session:
    """One session.

    Attributes:
        root: the tree.
        path: the session's folder, relative to the root ("" for the root itself).
        id: its identity, which a rename does not change.
        manifest: what was made in it.
    """

    root: Path
    path: str
    id: str
    manifest: Manifest
    _stems: dict[str, str] = field(default_factory=dict)
    _taken: dict[str, str] = field(default_factory=dict)
    _crop_rules: CropRules | None = None

    def __post_init__(self) -> None:
        for source, stem in self.manifest.stems().items():
            self._remember(source, stem)

    @property
    def folder(self) -> Path:
        """The session's folder."""
        return self.root / self.path if self.path else self.root

    @property
    def name(self) -> str:
        """What people call it: the folder's name."""
        return self.folder.name

    @property
    def crop_rules(self) -> CropRules:
        """What its train.yaml and crop.txt say about its crops."""
        if self._crop_rules is None:
            self._crop_rules = read_crop_rules(self.folder)
        return self._crop_rules

    def forget_crop_rules(self) -> None:
        """Its train.yaml or crop.txt changed: they are read again."""
        self._crop_rules = None

    def stem_for(self, source: str) -> str:
        """The stem of a picture's outputs; the same as long as the picture stays."""
        if source not in self._stems:
            self._remember(source, layout.output_stem(source, self._taken))
        return self._stems[source]

    def release_stem(self, source: str) -> None:
        """A picture is gone: its stem is free."""
        stem = self._stems.pop(source, None)
        if stem is not None:
            self._taken.pop(layout.same_stem(stem + "."), None)

    def _remember(self, source: str, stem: str) -> None:
        self._stems[source] = stem
        self._taken[layout.same_stem(stem + ".")] = source

    def outdate(self, kind: str, source: str) -> None:
        """What a record tells was made does not hold any more and is to be made again.

        The record stays in memory, marked (``stale``), so that its files are still known as ours.
        """
        record = self.manifest.get(kind, source)
        if record is not None:
            self.manifest.records[kind, source] = {**record, "stale": True}

    def source_of(self, output: str) -> str | None:
        """The picture whose output carries this file name, or None."""
        return self._taken.get(layout.same_stem(output))

    def inside(self, path: Path) -> str:
        """A path in the session, relative to its folder, as the manifest writes it."""
        return os.path.relpath(path, self.folder).replace(os.sep, "/")

    def relative(self, path: str) -> str:
        """A path of the tree, relative to the session's folder."""
        return path[len(self.path) + 1 :] if self.path else path

    def tree_path(self, relative: str) -> str:
        """The inverse of ``relative``."""
        return f"{self.path}/{relative}" if self.path else relative


class Sessions:
    """All sessions of a tree that have been met. Only their identities stay in memory for good."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._ids: dict[str, str] = {}
        self._loaded: OrderedDict[str, Session] = OrderedDict()
        self._unwritable: dict[str, str] = {}

    def __iter__(self) -> Iterator[str]:
        """The folders of all sessions met, relative to the root."""
        return iter(sorted(self._ids))

    def __contains__(self, path: object) -> bool:
        """Whether a session lies in this folder."""
        return path in self._ids

    @property
    def unwritable(self) -> Mapping[str, str]:
        """Sessions whose folder cannot be written: path → why."""
        return self._unwritable

    def known_id(self, path: str) -> str:
        """The identity of a session that was met; "" where none lies in this folder."""
        return self._ids.get(path, "")

    def cannot_write(self, path: str, why: str) -> None:
        """Remember that a session's folder cannot be written."""
        self._unwritable[path] = why

    def can_write(self, path: str) -> None:
        """A session's folder was written to."""
        self._unwritable.pop(path, None)

    def at(self, path: str) -> Session:
        """The session in a folder; it gets an identity when it has none.

        Raises:
            FileNotFoundError: there is no such folder (any more).
            OSError: the folder cannot be read or written; it is remembered in ``unwritable`` until ``can_write``.
        """
        if path in self._loaded:
            self._loaded.move_to_end(path)
            return self._loaded[path]
        if not self._folder(path).is_dir():
            # A session whose folder was removed or renamed must not come back as an empty folder with our files in it.
            self.forget(path)
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(self._folder(path)))
        try:
            session = self._load(path)
        except OSError as error:
            self._unwritable[path] = error.strerror or str(error)
            raise
        self._ids[path] = session.id
        self._loaded[path] = session
        while len(self._loaded) > _LOADED_SESSIONS:
            self._loaded.popitem(last=False)
        return session

    def refresh(self, path: str) -> None:
        """Forget what is remembered of a folder in which another session lies by now: swapped, or made anew."""
        known = self._ids.get(path)
        with suppress(OSError):
            if known is not None and _require_readable(self._folder(path)) != known:
                self.forget(path)

    def _folder(self, path: str) -> Path:
        return self._root / path if path else self._root

    def _load(self, path: str) -> Session:
        folder = self._folder(path)
        _require_readable(folder)
        identity = read_identity(folder)
        if identity is None or self._is_copy(path, folder, identity):
            identity = new_identity(folder)
            write_identity(folder, identity)
        elif identity.name != folder.name:
            identity = Identity(identity.id, folder.name)
            write_identity(folder, identity)
        for own in ("", *sorted(layout.OWN_FOLDERS), layout.CAPTIONS):
            sweep_temporaries(folder / own)
        return Session(self._root, path, identity.id, Manifest.load(folder))

    def _is_copy(self, path: str, folder: Path, identity: Identity) -> bool:
        """Whether another living folder has this identity, and the better right to it.

        That is the folder whose name the identity carries (whichever of the two is met first), else the one that was
        met first.
        """
        namesake = folder.parent / identity.name
        if path and identity.name not in ("", folder.name) and layout.read_session_id(namesake) == identity.id:
            return True
        return any(
            known == identity.id and other != path and layout.read_session_id(self._folder(other)) == identity.id
            for other, known in self._ids.items()
        )

    def by_id(self, session_id: str) -> Session:
        """The session of an identity, wherever it lies now.

        Raises:
            LookupError: it is not in the tree any more.
        """
        for path, known in list(self._ids.items()):
            if known == session_id and layout.read_session_id(self._folder(path)) == session_id:
                return self.at(path)
        hint = next((path for path, known in self._ids.items() if known == session_id), "")
        try:
            folder = layout.find_session_folder(self._root, session_id, self._root / hint)
        except FileNotFoundError as error:
            raise LookupError(str(error)) from error
        if hint:
            self.forget(hint)
        return self.at("" if folder == self._root else folder.relative_to(self._root).as_posix())

    def forget(self, path: str) -> None:
        """A session's folder is gone, or is no session any more."""
        self._ids.pop(path, None)
        self._loaded.pop(path, None)
        self._unwritable.pop(path, None)

    def release(self) -> None:
        """Give the memory of all manifests back; they are read again when needed."""
        self._loaded.clear()


def _require_readable(folder: Path) -> str | None:
    """The identity that a folder carries, or None.

    Raises:
        OSError: there may be one, and it cannot be read now; a new one would make everything anew.
    """
    with suppress(FileNotFoundError, NotADirectoryError):
        (folder / layout.PRIVATE / "session.json").read_bytes()
    return layout.read_session_id(folder)


def describe(session: Session) -> dict[str, Any]:
    """A session as the command line shows it."""
    return {"id": session.id, "name": session.name, "folder": os.fspath(session.folder)}
