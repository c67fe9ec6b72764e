"""Downloads: models of the hub by name, model files by address. Resumed, checked, and never visible half."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from handlers.models import catalogue, miniature, registry
from handlers.models.catalogue import Entry
from sessions.refusal import Refusal

Progress = Callable[[float, float], None]


def get(name: str, cache: Path, progress: Progress, target: Path | None = None) -> Path:
    """Fetch a model; what is here already is not fetched again, and what was cut off goes on.

    Args:
        name: a name of ``registry``, or an https address of a model file.
        cache: the folder of downloads. A named model comes to lie in ``cache/models/NAME``.
        progress: called with bytes done and bytes in all (0: not known).
        target: the folder for a file that is named by its address: the tree's ``Models/``.

    Returns:
        The file or folder.

    Raises:
        Refusal: no such name, an address that is not taken, a file that is none, not enough room …
        Waiting: the other side cannot be reached, or wants a permission first; the reason says what helps.
        OSError: this side's disk.
    """
    if "://" in name:
        from handlers.fetch.http import download

        if target is None:
            raise Refusal(
                "download",
                "A file is fetched into a tree's Models folder.",
                "Name the tree: --root FOLDER, or run it there.",
            )
        return download(name, target, cache / "downloads", progress)
    entry = catalogue.ENTRIES.get(catalogue.ALIASES.get(name.lower(), name.lower()))
    if entry is None:
        known = ", ".join(entry.name for entry in catalogue.ENTRIES.values() if entry.origin != catalogue.BUILT_IN)
        raise Refusal("download", f"No model called {name!r} is known.", f"Known: {known}; or give an https address.")
    if entry.origin == catalogue.BUILT_IN:
        return miniature.ensure(entry.name, cache)
    if "://" in entry.origin:
        return _get_file(entry, cache, progress)
    here = registry.local_copy(entry, cache)
    if here is not None:
        return here
    from handlers.fetch.hub import fetch

    return fetch(entry, cache / "models" / entry.name, progress)


def _get_file(entry: Entry, cache: Path, progress: Progress) -> Path:
    """The folder of a model that is one file. What lies there and is not that file, or is damaged, goes aside."""
    from handlers.fetch.check import check_file
    from handlers.fetch.http import download

    folder = cache / "models" / entry.name
    file = folder / entry.index
    sha256 = entry.single[1] if entry.single else None
    if file.is_file():
        try:
            check_file(file, entry.index, sha256)
        except Refusal:
            file.replace(file.with_name(f"{file.name}.old"))
        else:
            return folder
    download(entry.origin, folder, cache / "downloads", progress, sha256=sha256, name=entry.index)
    return folder
