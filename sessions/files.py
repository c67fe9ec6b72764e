"""The only writer: a file appears whole under its name, or not at all.

Temp file in the same folder, fsync, rename, fsync of the folder (promise 3). Temp names start with
``TEMPORARY_PREFIX``: hidden, ignored by the watcher, and swept when the process that made them is gone.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

TEMPORARY_PREFIX = ".fastsd-tmp-"
_HASH_BLOCK = 1 << 20
# FUSE mounts (Google Drive, rclone) may refuse to sync a folder, or anything at all; the rename is still atomic there.
_SYNC_UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EISDIR}


def temporary_name(final: Path) -> Path:
    """A fresh temp path in the folder of ``final``; it carries this process's id, so that a sweep can tell it is dead.

    The suffix is kept: some libraries choose the format by it.
    """
    return final.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{secrets.token_hex(4)}{final.suffix[:16]}")


def sync_file(file: IO[Any]) -> None:
    """Flush and fsync an open file, where the file system can."""
    file.flush()
    _sync_descriptor(file.fileno())


def sync_folder(folder: Path) -> None:
    """Fsync a folder, so that a rename in it survives a power cut, where the file system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        if error.errno in _SYNC_UNSUPPORTED:
            return
        raise
    try:
        _sync_descriptor(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Fsync every file and folder below (and with) a folder, before it is renamed as a whole."""
    for parent, _, names in os.walk(folder):
        for name in names:
            with (Path(parent) / name).open("rb") as file:
                _sync_descriptor(file.fileno())
        sync_folder(Path(parent))


def _sync_descriptor(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _SYNC_UNSUPPORTED:
            raise


@contextmanager
def atomic_path(final: Path) -> Iterator[Path]:
    """Give a temp path to write to; at the end it is synced and renamed to ``final``.

    For libraries that want a path. Raises whatever the body raises, after removing the temp file.
    """
    temporary = temporary_name(final)
    try:
        yield temporary
        with temporary.open("rb") as file:
            _sync_descriptor(file.fileno())
        publish(temporary, final)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


@contextmanager
def atomic_file(final: Path) -> Iterator[IO[bytes]]:
    """Like ``atomic_path``, but gives an open binary file."""
    temporary = temporary_name(final)
    try:
        with temporary.open("xb") as file:
            yield file
            sync_file(file)
        publish(temporary, final)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def publish(temporary: Path, final: Path) -> None:
    """Rename a finished temp file (or folder, if ``final`` does not exist) to its name, and sync the folder."""
    temporary.replace(final)
    sync_folder(final.parent)


def write_bytes(final: Path, content: bytes) -> None:
    """Write a whole file atomically; missing folders are made."""
    final.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(final) as file:
        file.write(content)


def write_text(final: Path, text: str) -> None:
    """Write UTF-8 text atomically; missing folders are made."""
    write_bytes(final, text.encode("utf-8", errors="surrogateescape"))


def write_json(final: Path, value: Any) -> None:
    """Write JSON atomically, indented, with a newline at the end. Names that are no UTF-8 are escaped."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=_json_default)
    try:
        content = text.encode()
    except UnicodeEncodeError:
        content = json.dumps(value, indent=2, default=_json_default).encode()
    write_bytes(final, content + b"\n")


def _json_default(value: Any) -> Any:
    if isinstance(value, Path):
        return os.fspath(value)
    message = f"cannot write {type(value).__name__} as JSON"
    raise TypeError(message)


def append_lines(final: Path, lines: list[str]) -> None:
    """Append lines and sync. A torn last line is closed first, so that it spoils only itself."""
    final.parent.mkdir(parents=True, exist_ok=True)
    with final.open("ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write("".join(f"{line}\n" for line in lines).encode("utf-8", errors="surrogateescape"))
        sync_file(file)


def copy_file(source: Path, final: Path) -> None:
    """Copy a file atomically; the copy gets the mode that the umask gives, not the source's."""
    final.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as reader, atomic_file(final) as writer:
        shutil.copyfileobj(reader, writer, _HASH_BLOCK)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file as 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def sweep_temporaries(folder: Path) -> int:
    """Remove temp files and folders that dead processes left directly in ``folder``. Returns how many."""
    swept = 0
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(TEMPORARY_PREFIX) and not _owner_lives(entry.name):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)
                else:
                    with suppress(OSError):
                        Path(entry.path).unlink()
                swept += 1
    return swept


def _owner_lives(name: str) -> bool:
    owner = name.removeprefix(TEMPORARY_PREFIX).split("-", 1)[0]
    if not owner.isdigit():
        return False
    try:
        os.kill(int(owner), 0)
    except ProcessLookupError:
        return False
    except (OverflowError, PermissionError):
        return True
    return True
