from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from daemon.index import Fact, Index
from daemon.scan import Report, Scanner, Unreachable
from daemon.verdict import Trust, judge
from sessions.ignore import IgnoreRules


@dataclass
class Tree:
    """A tree, its index, and a disk that can be told to fail."""

    root: Path
    index: Index
    failing: dict[str, int] = field(default_factory=dict)
    skipped_folders: frozenset[str] = frozenset()
    patterns: tuple[str, ...] = ()
    inodes: bool = True

    def scandir(self, path: bytes) -> AbstractContextManager[Iterator[os.DirEntry[bytes]]]:
        relative = os.path.relpath(os.fsdecode(path), self.root)
        if relative in self.failing:
            raise OSError(self.failing[relative], os.strerror(self.failing[relative]))
        return os.scandir(path)

    @property
    def scanner(self) -> Scanner:
        return Scanner(
            str(self.root),
            self.index,
            IgnoreRules(self.patterns),
            self.skipped_folders.__contains__,
            inodes_mean_something=self.inodes,
            scandir=self.scandir,
        )

    def walk(self, start: str = "") -> tuple[dict[str, Fact], set[str], Report]:
        report = Report()
        changed: dict[str, Fact] = {}
        vanished: set[str] = set()
        for changes in self.scanner.walk(start, report):
            changed |= {fact.path: fact for fact in changes.changed}
            vanished |= set(changes.vanished)
        return changed, vanished, report

    def learn(self) -> None:
        changed, vanished, _ = self.walk()
        self.index.record(changed.values())
        self.index.forget(vanished)

    def put(self, path: str, content: bytes = b"x") -> Path:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        return file


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    root = tmp_path / "tree"
    root.mkdir()
    return Tree(root, Index(tmp_path / "index.sqlite"))


def test_new_changed_and_vanished_files_are_found(tree: Tree) -> None:
    for path in ("a.jpg", "s/b.jpg", "s/t/c.jpg", "s/t/d.jpg"):
        tree.put(path)
    changed, vanished, report = tree.walk()
    assert set(changed) == {"a.jpg", "s/b.jpg", "s/t/c.jpg", "s/t/d.jpg"}
    assert changed["a.jpg"].size == 1
    assert not vanished
    assert (report.folders, report.files) == (3, 4)
    tree.learn()
    assert tree.walk()[:2] == ({}, set())
    tree.put("s/b.jpg", b"longer")
    (tree.root / "a.jpg").unlink()
    tree.put("new/e.jpg")
    changed, vanished, _ = tree.walk()
    assert (set(changed), vanished) == ({"s/b.jpg", "new/e.jpg"}, {"a.jpg"})


def test_a_replaced_file_of_the_same_size_and_time_is_a_change(tree: Tree) -> None:
    file = tree.put("a.jpg", b"one")
    tree.learn()
    before = file.stat()
    other = tree.put("b.jpg", b"two")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(file)
    assert set(tree.walk()[0]) == {"a.jpg"}


def test_inodes_count_for_nothing_where_they_mean_nothing(tree: Tree) -> None:
    tree.inodes = False
    file = tree.put("a.jpg", b"one")
    tree.learn()
    before = file.stat()
    other = tree.put("b.jpg", b"two")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(file)
    assert tree.walk()[:2] == ({}, set())


def test_folders_that_vanished_take_all_below_them_along(tree: Tree) -> None:
    for path in ("s/a", "s/t/b", "s/t/u/c", "st/d"):
        tree.put(path)
    tree.learn()
    (tree.root / "s").rename(tree.root / "r")
    changed, vanished, _ = tree.walk()
    assert vanished == {"s/a", "s/t/b", "s/t/u/c"}
    assert set(changed) == {"r/a", "r/t/b", "r/t/u/c"}
    changed, vanished, _ = tree.walk("s")
    assert (changed, vanished) == ({}, {"s/a", "s/t/b", "s/t/u/c"})


def test_one_folder_is_compared_without_those_below(tree: Tree) -> None:
    for path in ("s/a", "s/t/b"):
        tree.put(path)
    changes = tree.scanner.folder("s", Report())
    assert [fact.path for fact in changes.changed] == ["s/a"]


@pytest.mark.parametrize("swap", ["file to folder", "folder to file"])
def test_a_file_and_a_folder_change_places(tree: Tree, swap: str) -> None:
    if swap == "file to folder":
        tree.put("x")
        tree.learn()
        (tree.root / "x").unlink()
        tree.put("x/y")
        assert (set(tree.walk()[0]), tree.walk()[1]) == ({"x/y"}, {"x"})
    else:
        tree.put("x/y")
        tree.learn()
        (tree.root / "x/y").unlink()
        (tree.root / "x").rmdir()
        tree.put("x")
        assert (set(tree.walk()[0]), tree.walk()[1]) == ({"x"}, {"x/y"})
        assert tree.walk("x")[1] == {"x/y"}


def test_what_is_no_file_is_told_and_never_opened(tree: Tree, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.jpg").write_bytes(b"x")
    tree.put("real.jpg")
    (tree.root / "link.jpg").symlink_to(tree.root / "real.jpg")
    (tree.root / "folder").symlink_to(outside)
    (tree.root / "loop").symlink_to(tree.root)
    (tree.root / ".hidden").symlink_to(outside)
    os.mkfifo(tree.root / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tree.root / "s"))
        changed, _, report = tree.walk()
    assert set(changed) == {"real.jpg"}
    assert report.skipped == {
        "link.jpg": "symbolic link",
        "folder": "symbolic link",
        "loop": "symbolic link",
        "pipe.jpg": "FIFO",
        "s": "socket",
    }


def test_a_known_file_that_became_a_link_has_vanished(tree: Tree) -> None:
    tree.put("a.jpg")
    tree.put("b.jpg")
    tree.learn()
    (tree.root / "a.jpg").unlink()
    (tree.root / "a.jpg").symlink_to(tree.root / "b.jpg")
    assert tree.walk()[1] == {"a.jpg"}


def test_ignored_and_skipped_things_are_left_out_but_not_forgotten(tree: Tree) -> None:
    tree.skipped_folders = frozenset({"s/crops"})
    tree.patterns = ("*.bak",)
    for path in (".fastsd/a.jpg", "s/crops/b.jpg", "s/c.bak", "s/.d.jpg", "s/e.jpg.part", "s/f.jpg"):
        tree.put(path)
    assert set(tree.walk()[0]) == {"s/f.jpg"}
    tree.learn()
    tree.skipped_folders = frozenset({"s"})
    assert tree.walk()[:2] == ({}, set())
    assert not tree.scanner.takes("s/f.jpg")
    assert tree.scanner.is_left_out("s/deeper")
    assert not tree.scanner.is_left_out("")


@pytest.mark.parametrize("name", [b"a\nb.jpg", b"\xff\xfe.jpg", b"-rf", "é".encode() * 127 + b"x", b" "])
def test_any_name_is_a_name(tree: Tree, name: bytes) -> None:
    (tree.root / os.fsdecode(name)).write_bytes(b"x")
    tree.learn()
    assert tree.walk()[:2] == ({}, set())
    assert tree.index.lookup(os.fsdecode(name)) == tree.scanner.look(os.fsdecode(name))
    (tree.root / os.fsdecode(name)).unlink()
    assert tree.walk()[1] == {os.fsdecode(name)}


def test_times_that_no_integer_holds_do_not_return_for_ever(tree: Tree) -> None:
    file = tree.put("old.jpg")
    os.utime(file, ns=(-(10**18), -(10**18)))
    far = tree.put("far.jpg")
    os.utime(far, (1 << 33, 1 << 33))
    tree.learn()
    assert tree.walk()[:2] == ({}, set())


@pytest.mark.parametrize("number", [errno.ENOTCONN, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("place", [".", "s/t"])
def test_a_lost_mount_is_unreachable(tree: Tree, number: int, place: str) -> None:
    tree.put("s/t/a.jpg")
    tree.learn()
    tree.failing[place] = number
    with pytest.raises(Unreachable, match="mounted"):
        tree.walk()


def test_a_missing_root_is_unreachable(tree: Tree) -> None:
    tree.put("a.jpg")
    tree.learn()
    tree.root.rename(tree.root.with_name("elsewhere"))
    with pytest.raises(Unreachable):
        tree.walk()
    with pytest.raises(Unreachable):
        tree.scanner.identity()
    tree.root.write_bytes(b"a file")
    with pytest.raises(Unreachable, match="not a folder"):
        tree.scanner.identity()


def test_a_folder_that_cannot_be_read_is_told_and_forgets_nothing(tree: Tree) -> None:
    for path in ("s/a.jpg", "s/t/b.jpg", "c.jpg"):
        tree.put(path)
    tree.learn()
    tree.failing["s"] = errno.EACCES
    (tree.root / "c.jpg").unlink()
    changed, vanished, report = tree.walk()
    assert (changed, vanished) == ({}, {"c.jpg"})
    assert set(report.unreadable) == {"s"}


def test_a_folder_that_vanishes_meanwhile_is_no_error(tree: Tree) -> None:
    tree.put("s/a.jpg")
    tree.put("b.jpg")
    tree.failing["s"] = errno.ENOENT
    assert set(tree.walk()[0]) == {"b.jpg"}


def verdict(**changes: object) -> Trust:
    given: dict[str, object] = {
        "root": "R", "known": 100, "vanished": 1, "files": 99, "same_root": True, "has_events": False,
    }  # fmt: skip
    result = judge(**(given | changes))  # type: ignore[arg-type]
    assert bool(result.reason) == (result.trust is not Trust.FULL)
    return result.trust


def test_how_far_a_walk_is_believed() -> None:
    assert verdict() is Trust.FULL
    assert verdict(vanished=0, files=0, known=0) is Trust.FULL
    assert verdict(vanished=50, files=50) is Trust.FULL
    assert verdict(vanished=51, files=49) is Trust.FINDS_ONLY
    assert verdict(vanished=51, files=49, has_events=True) is Trust.FULL
    assert verdict(known=19, vanished=18, files=1) is Trust.FULL
    assert verdict(known=20, vanished=11, files=9) is Trust.FINDS_ONLY
    assert verdict(known=3, vanished=3, files=0) is Trust.NONE
    assert verdict(known=3, vanished=3, files=0, has_events=True) is Trust.FULL
    assert verdict(known=3, vanished=2, files=1, same_root=False, has_events=True) is Trust.NONE
    assert verdict(known=100, vanished=40, files=60, same_root=False, has_events=True) is Trust.FULL
