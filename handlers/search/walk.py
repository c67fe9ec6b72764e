"""The pictures of a tree, found without a daemon: the same ones that it would crop."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from handlers.search.store import Picture
from sessions import layout
from sessions.ignore import IgnoreRules
from sessions.layout import Role, Shape


def pictures_of(root: Path, ignore: Iterable[str] = ()) -> list[Picture]:
    """Every picture of the sessions below a root, as it is now; links are not followed.

    Args:
        root: the tree.
        ignore: ``watch.ignore`` of its settings.
    """
    rules = IgnoreRules(ignore)
    found: dict[str, os.stat_result] = {}
    top_folders: list[str] = []
    top_files: list[str] = []
    specs: list[str] = []
    for parent, folders, names in os.walk(root):
        here = Path(parent).relative_to(root).as_posix()
        prefix = "" if here == "." else f"{here}/"
        ours = {name for name in folders if layout.is_own_folder(prefix + name)}
        folders[:] = sorted(name for name in folders if name not in ours and not rules.ignores_folder(prefix + name))
        names = [name for name in sorted(names) if not rules.ignores_file(prefix + name)]
        if not prefix:
            top_folders, top_files = list(folders), names
        specs += [prefix.rstrip("/") for name in names if layout.is_spec_name(name)]
        for name in filter(layout.is_picture_name, names):
            try:
                status = os.lstat(Path(parent, name))
            except OSError:
                continue  # it went while we looked
            if stat.S_ISREG(status.st_mode):
                found[prefix + name] = status
    shape = Shape.of(top_folders, top_files, specs)
    return [
        Picture(path, status.st_size, status.st_mtime_ns)
        for path, status in found.items()
        if (place := layout.place_of(path, shape)) is not None and place.role is Role.PICTURE
    ]
