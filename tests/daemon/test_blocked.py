"""Folders that cannot be used: an error file beside each of them, and beside no other."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from daemon.blocked import BlockedFolders
from daemon.session import Sessions
from sessions.errors import error_path

DENIED = os.strerror(errno.EACCES)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("a", "b", "b/inner"):
        (tmp_path / "tree" / name).mkdir(parents=True)
    return tmp_path / "tree"


def notes(root: Path) -> set[str]:
    return {path.relative_to(root.parent).as_posix() for path in root.parent.rglob("*.error.txt")}


def test_a_note_stands_as_long_as_its_folder_is_blocked(root: Path) -> None:
    sessions, unreadable = Sessions(root), {"b/inner": DENIED}
    blocked = BlockedFolders(root, sessions, lambda: unreadable)
    sessions.cannot_write("a", DENIED)
    sessions.cannot_write("", DENIED)
    blocked.tell()
    assert notes(root) == {"tree.error.txt", "tree/a.error.txt", "tree/b/inner.error.txt"}
    assert "cannot write into this folder: Permission denied" in error_path(root / "a").read_text()
    assert "the right to read there" in error_path(root / "b" / "inner").read_text()
    first = error_path(root / "a").stat().st_mtime_ns
    blocked.tell()
    assert error_path(root / "a").stat().st_mtime_ns == first, "what stands there is not written again"
    assert [line.partition(":")[0] for line in blocked.lines()] == [str(root), "a", "b/inner"]
    sessions.can_write("a")
    unreadable.clear()
    blocked.tell()
    assert notes(root) == {"tree.error.txt"}


def test_notes_of_an_earlier_daemon_go_where_they_no_longer_hold(root: Path) -> None:
    earlier = Sessions(root)
    for path in ("", "a", "b"):
        earlier.cannot_write(path, DENIED)
    BlockedFolders(root, earlier, dict).tell()
    of_a_picture = root / "a" / "x.jpg.error.txt"
    of_a_picture.touch()
    sessions = Sessions(root)
    sessions.cannot_write("b", DENIED)
    blocked = BlockedFolders(root, sessions, dict)
    for note in ("a.error.txt", "b.error.txt", "a/x.jpg.error.txt"):
        blocked.found(note)
    blocked.tell()
    assert notes(root) == {"tree/b.error.txt", "tree/a/x.jpg.error.txt"}


def test_a_full_disk_is_no_matter_of_rights(root: Path) -> None:
    sessions = Sessions(root)
    sessions.cannot_write("a", os.strerror(errno.ENOSPC))
    blocked = BlockedFolders(root, sessions, dict)
    blocked.tell()
    assert "Make room on the disk" in error_path(root / "a").read_text()
