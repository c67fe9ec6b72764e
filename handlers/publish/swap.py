"""Bringing a model file into a WebUI's folder, and having the WebUI choose it.

A WebUI remembers files by name and serves stale weights for a name that it has seen, so a file never replaces another:
names carry the run's id, and where a name is taken by something else the file's hash is added to it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, Protocol, TypeVar

from handlers.context import Waiting
from handlers.publish.ask import A1111Client, Model
from sessions import files

SIDECARS = (".yaml", ".preview.png", ".json")
_BLOCK = 1 << 22
# File systems without hard links, another device, a folder or a kernel that does not want them: copy instead.
_NO_LINK = {errno.EXDEV, errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EINVAL}

Report = Callable[[int, int], None]


class Listed(Protocol):
    """What a WebUI lists: a model, or a LoRA."""

    @property
    def filename(self) -> str:
        """The file, as the WebUI's process sees it."""


Entry = TypeVar("Entry", bound=Listed)


@dataclass(frozen=True)
class Shelf:
    """A folder of a WebUI that files are published to.

    Attributes:
        folder: it.
        setting: the key of fastsd.yaml that names it.
        what: what the WebUI keeps there, for people.
    """

    folder: Path
    setting: str = "webui.models"
    what: str = "model"


@dataclass(frozen=True)
class Placed:
    """A model file in a WebUI's folder.

    Attributes:
        path: where it is now.
        sha256: of its content, 64 hex digits.
        way: ``link`` (a second name of the same bytes), ``copy``, or ``there`` (it had been there already).
    """

    path: Path
    sha256: str
    way: Literal["link", "copy", "there"]


def sha256_with_progress(model: Path, report: Report) -> str:
    """The SHA-256 of a file; ``report`` hears (bytes done, bytes in all)."""
    with model.open("rb") as reader:
        return _pump(reader, None, report)


def place(model: Path, shelf: Shelf, sha256: str, stem: str, report: Report) -> Placed | None:
    """Put a model with its sidecars into a folder, as a second name of the same file or as a whole copy.

    Args:
        model: the finished file.
        shelf: the WebUI's folder.
        sha256: of ``model``.
        stem: the name to give it, without the ending.
        report: hears (bytes copied, bytes in all).

    Returns:
        Where it lies, or None when another file has that name.

    Raises:
        Waiting: the folder is not there, cannot be written, or has no room.
    """
    folder = shelf.folder
    final = folder / (stem + model.suffix)
    try:
        if not folder.is_dir():
            raise Waiting(
                f"The model is ready, but the WebUI's {shelf.what} folder {folder} is not there: mount it, or set "
                f"{shelf.setting} in fastsd.yaml."
            )
        if final.exists():
            if not _same(model, final, sha256):
                return None
            _place_sidecars(model, folder, stem)
            return Placed(final, sha256, "there")
        _place_sidecars(model, folder, stem)
        files.sweep_temporaries(folder)  # what a killed copy left
        way: Literal["link", "copy"] = "link" if _link(model, final) else "copy"
        if way == "copy":
            _copy(model, final, sha256, report)
    except PermissionError as error:
        raise Waiting(
            f"The model is ready, but fastsd may not write to the WebUI's {shelf.what} folder {folder}: give its user "
            f"the right to, or set {shelf.setting} in fastsd.yaml."
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_room(model, folder) from error
        raise
    return Placed(final, sha256, way)


def seems_placed(model: Path, folder: Path) -> bool:
    """Whether a file of the model's name and size lies in the folder: cheap, for a job that only waits."""
    final = folder / model.name
    return final.is_file() and final.stat().st_size == model.stat().st_size


def models_folder(configured: str | None, client: A1111Client) -> Path:
    """The folder to publish to: the configured one, else the one that the WebUI tells or keeps its models in.

    Raises:
        Waiting: neither is known, or it is none of this machine.
        handlers.publish.ask.WebUIError: the WebUI cannot be asked.
    """
    if configured:
        return Path(configured).expanduser()
    told = client.folder()
    folder = Path(told) if told else usual_folder(client.models())
    if folder is None or not folder.is_dir():
        raise Waiting(
            f"The model is ready, but the WebUI at {client.url} does not tell where it keeps its models on this "
            "machine: set webui.models in fastsd.yaml."
        )
    return folder


def usual_folder(models: Iterable[Model]) -> Path | None:
    """The folder that most of the listed files lie in, the shorter one of equals; None without any."""
    counts = Counter(str(Path(model.filename).parent) for model in models)
    if not counts:
        return None
    return Path(min(counts, key=lambda folder: (-counts[folder], len(folder), folder)))


def find(models: Iterable[Entry], path: Path) -> Entry | None:
    """The entry of a file in a WebUI's list of models, or of LoRAs.

    By the real path; else, for a WebUI that sees the folder under another one (a container), by the file's name,
    which is unique because it carries the run's id.
    """
    listed = list(models)
    real = os.path.realpath(path)
    for model in listed:
        if os.path.realpath(model.filename) == real:
            return model
    same_name = [model for model in listed if model.filename.replace("\\", "/").rsplit("/", 1)[-1] == path.name]
    return same_name[0] if len(same_name) == 1 else None


def _same(model: Path, final: Path, sha256: str) -> bool:
    if model.samefile(final):
        return True
    return model.stat().st_size == final.stat().st_size and files.sha256_of(final) == sha256


def _link(model: Path, final: Path) -> bool:
    try:
        os.link(model.resolve(), final)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno in _NO_LINK:
            return False
        raise
    files.sync_folder(final.parent)
    return True


def _copy(model: Path, final: Path, sha256: str, report: Report) -> None:
    if shutil.disk_usage(final.parent).free < model.stat().st_size:
        raise _no_room(model, final.parent)
    # ".part": a WebUI lists whatever ends like a model, half written ones and hidden ones too.
    temporary = files.temporary_name(final.with_suffix(".part"))
    try:
        with model.open("rb") as reader, temporary.open("xb") as writer:
            copied = _pump(reader, writer, report)
            files.sync_file(writer)
        if copied != sha256:
            message = f"{model} changed while it was copied to {final.parent}; it will be tried again"
            raise OSError(message)
        files.publish(temporary, final)
    finally:
        with suppress(OSError):
            temporary.unlink()


def _pump(reader: IO[bytes], writer: IO[bytes] | None, report: Report) -> str:
    """Read to the end, write it where asked, and hash it."""
    size = os.fstat(reader.fileno()).st_size
    digest, done = hashlib.sha256(), 0
    while block := reader.read(_BLOCK):
        digest.update(block)
        if writer is not None:
            writer.write(block)
        done += len(block)
        report(done, size)
    return digest.hexdigest()


def _place_sidecars(model: Path, folder: Path, stem: str) -> None:
    """Before the model, so that it never appears without its configuration; what people changed there stays."""
    for suffix in SIDECARS:
        source, final = model.with_name(model.stem + suffix), folder / (stem + suffix)
        if source.is_file() and not final.exists():
            files.copy_file(source, final)


def _no_room(model: Path, folder: Path) -> Waiting:
    return Waiting(
        f"The model is ready, but there is no room for it in the WebUI's folder {folder}: "
        f"{model.stat().st_size / 1e9:.1f} GB are needed.",
        retry_after=120.0,
    )
