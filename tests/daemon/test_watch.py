from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from daemon.watch import (
    HintBox,
    Hints,
    TreeEvents,
    file_system_type,
    limit_is_reached,
    numbers_files_for_good,
    read_mounts,
    sends_events,
    watch_limit,
)

LIMITED = ["unshare", "-Ur", "sh", "-c", 'echo 3 >/proc/sys/user/max_inotify_watches && exec "$@"', "sh"]
MOUNTS = r"""/dev/sda1 / ext4 rw 0 0
drive /content/drive fuse rw 0 0
remote:x /mnt/my\040drive fuse.rclone rw 0 0
/dev/sdb1 /mnt/disk fuseblk rw 0 0
server:/x /mnt/disk/net nfs4 rw 0 0
tmpfs /mnt/disk/net tmpfs rw 0 0
"""


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/home/anna", "ext4"),
        ("/content/drive", "fuse"),
        ("/content/drive/MyDrive/x", "fuse"),
        ("/content/driveway", "ext4"),
        ("/mnt/my drive/x", "fuse.rclone"),
        ("/mnt/disk/x", "fuseblk"),
        ("/mnt/disk/net/x", "tmpfs"),
    ],
)
def test_the_file_system_of_a_path(path: str, expected: str) -> None:
    assert file_system_type(path, MOUNTS) == expected


def test_this_machine_has_mounts() -> None:
    assert file_system_type("/", read_mounts())


def test_which_file_systems_tell_of_every_change() -> None:
    assert all(sends_events(name) for name in ("ext4", "btrfs", "tmpfs", "overlay", "fuseblk", ""))
    assert not any(sends_events(name) for name in ("fuse", "fuse.rclone", "nfs4", "cifs", "9p", "drvfs"))
    assert numbers_files_for_good("nfs4")
    assert not numbers_files_for_good("fuse.rclone")


def test_hints_keep_the_outermost_folders() -> None:
    hints = Hints(folders={"a", "a/b", "a b", "a/b/c", "c/d", "c-d"})
    assert set(hints.outermost_folders()) == {"a", "a b", "c/d", "c-d"}
    assert Hints(folders={"a", "", "b/c"}).outermost_folders() == [""]


def test_many_hints_in_one_folder_become_that_folder() -> None:
    hints = Hints(files={f"s/{number}" for number in range(129)} | {"t/a", "top"})
    files, folders = hints.crowded(128)
    assert (sorted(files), folders) == (["t/a", "top"], ["s"])


def test_a_box_wakes_once_until_it_is_emptied() -> None:
    wakes: list[int] = []
    box = HintBox(lambda: wakes.append(1))
    box.add("a", is_folder=False)
    box.add("b", is_folder=True)
    box.overflow()
    assert len(wakes) == 1
    hints = box.take()
    assert (hints.files, hints.folders, hints.overflow) == ({"a"}, {"b"}, True)
    assert not box.take()
    box.overflow()
    assert len(wakes) == 2


class Listening:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.files: set[str] = set()
        self.folders: set[str] = set()
        self.overflow = False
        self.box = HintBox(lambda: None)
        self.events = TreeEvents(str(root), self.box)
        self.events.start()

    def has(self, *files: str) -> bool:
        hints = self.box.take()
        self.files |= hints.files
        self.folders |= hints.folders
        self.overflow |= hints.overflow
        return self.files >= set(files)


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[Listening]:
    root = tmp_path / "tree"
    root.mkdir()
    one = Listening(root)
    yield one
    one.events.stop()
    assert not one.events.is_alive


def test_every_way_of_arriving_gives_a_hint(listening: Listening, tmp_path: Path) -> None:
    root = listening.root
    (tmp_path / "in.jpg").write_bytes(b"x")
    (tmp_path / "linked.jpg").write_bytes(b"x")
    (root / "copied.jpg").write_bytes(b"x")
    (tmp_path / "in.jpg").rename(root / "moved.jpg")
    (root / "link.jpg").hardlink_to(tmp_path / "linked.jpg")
    (root / ".tmp").write_bytes(b"x")
    (root / ".tmp").rename(root / "renamed.jpg")
    wait_until(lambda: listening.has("copied.jpg", "moved.jpg", "link.jpg", "renamed.jpg"))
    listening.files.clear()
    (root / "copied.jpg").rename(root / "else.jpg")
    (root / "moved.jpg").unlink()
    wait_until(lambda: listening.has("copied.jpg", "else.jpg", "moved.jpg"))


def test_folders_that_come_and_go_give_hints_for_themselves(listening: Listening, tmp_path: Path) -> None:
    root = listening.root
    (root / "a/b/c").mkdir(parents=True)
    (root / "a/b/c/x.jpg").write_bytes(b"x")
    wait_until(lambda: listening.has("a/b/c/x.jpg") and "a" in listening.folders)
    (root / "a").rename(tmp_path / "out")
    listening.folders.clear()
    wait_until(lambda: listening.has() and "a" in listening.folders)


def test_a_root_that_is_deleted_ends_the_events(listening: Listening) -> None:
    listening.root.rmdir()
    wait_until(lambda: listening.has() and "" in listening.folders)
    wait_until(lambda: not listening.events.is_alive)


def test_the_librarys_warning_of_lost_events_is_a_hint(listening: Listening) -> None:
    logging.getLogger("watchdog.observers.inotify_c").warning("Inotify queue overflowed; filesystem events were lost")
    assert listening.has()
    assert listening.overflow


def test_a_root_that_is_not_there_cannot_be_watched(tmp_path: Path) -> None:
    before = threading.active_count()
    events = TreeEvents(str(tmp_path / "nothing"), HintBox(lambda: None))
    with pytest.raises(OSError, match="No such file"):
        events.start()
    wait_until(lambda: threading.active_count() <= before)


def test_the_limit_is_far_away_here(tmp_path: Path) -> None:
    assert not limit_is_reached(str(tmp_path))
    limit = watch_limit()
    assert limit is None or limit > 0


def test_a_reached_limit_is_noticed(tmp_path: Path) -> None:
    """In a user namespace of its own, where the limit can be set to three watches."""
    for number in range(5):
        (tmp_path / str(number)).mkdir()
    script = (
        "import pathlib, sys\n"
        "from daemon.watch import HintBox, TreeEvents, limit_is_reached\n"
        "print(limit_is_reached(sys.argv[1]))\n"
        "events = TreeEvents(sys.argv[1], HintBox(lambda: None))\n"
        "events.start()\n"
        "print(limit_is_reached(sys.argv[1]))\n"
        "events.stop()\n"
        "print(limit_is_reached(sys.argv[1]))\n"
    )
    run = subprocess.run(
        [*LIMITED, sys.executable, "-c", script, str(tmp_path)],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    if "unshare" in run.stderr or "max_inotify_watches" in run.stderr:
        pytest.skip(f"no user namespaces here: {run.stderr.strip()}")
    assert run.stdout.split() == ["False", "True", "False"], run.stderr
