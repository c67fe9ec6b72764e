"""The watcher as a whole, on real files: what arrives is handed on once, and the index equals the tree in the end."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from daemon.index import Fact, Index
from daemon.tree import State, TreeWatch, WatchSettings
from tests.daemon.test_watch import LIMITED

REPOSITORY = Path(__file__).resolve().parents[2]
MODES: list[Literal["native", "scan"]] = ["native", "scan"]


class Watched:
    """A tree under watch, and what was handed on."""

    def __init__(self, root: Path, database: Path, **keys: Any) -> None:
        self.root = root
        self.index = Index(database)
        self.settled: list[Fact] = []
        self.vanished: list[str] = []
        self.failures = 0
        options = {"settle": 0.05, "poll": 0.05, "rescan": 60.0} | keys
        self.tree = TreeWatch(
            root,
            self.index,
            WatchSettings(**options),
            lambda folder: folder.rpartition("/")[2] == "crops",
            on_settled=self._settle,
            on_vanished=self.vanished.extend,
            counts_as_movement=lambda path: not path.endswith("STATUS.txt"),
        )
        self.task: asyncio.Task[None] | None = None

    def _settle(self, facts: list[Fact]) -> None:
        if self.failures:
            self.failures -= 1
            message = "the consumer failed"
            raise RuntimeError(message)
        self.settled += facts

    @property
    def counts(self) -> Counter[str]:
        return Counter(fact.path for fact in self.settled)

    async def until(self, condition: Callable[[], bool], seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.task is None or not self.task.done(), self.task
            assert time.monotonic() < deadline, (self.tree.state, self.tree.reason, self.counts, self.vanished)
            await asyncio.sleep(0.005)

    async def scan(self) -> None:
        """Wait for a whole scan that begins now, and for what it found."""
        before = self.tree._report
        self.tree.request_scan()
        await self.until(lambda: self.tree._report is not before and not self.tree.unsettled)

    def tree_facts(self) -> dict[str, tuple[int, int, int]]:
        facts = {}
        for folder, folders, files in os.walk(self.root):
            folders[:] = [name for name in folders if name != "crops" and not name.startswith(".")]
            for name in files:
                path = Path(folder, name)
                status = path.lstat()
                facts[os.fspath(path.relative_to(self.root))] = (status.st_size, status.st_mtime_ns, status.st_ino)
        return facts

    def index_facts(self) -> dict[str, tuple[int, int, int]]:
        return {fact.path: (fact.size, fact.mtime_ns, fact.inode) for fact in self.index.under()}

    def agrees(self) -> bool:
        return not self.tree.unsettled and self.index_facts() == self.tree_facts()


@asynccontextmanager
async def watching(root: Path, database: Path, *, wait: bool = True, **keys: Any) -> AsyncIterator[Watched]:
    root.mkdir(exist_ok=True)
    watched = Watched(root, database, **keys)
    watched.task = asyncio.create_task(watched.tree.run())
    try:
        if wait:
            await watched.until(watched.tree.first_scan.is_set)
        yield watched
    finally:
        watched.task.cancel()
        with suppress(asyncio.CancelledError):
            await watched.task
        watched.index.close()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "tree"
    folder.mkdir()
    return folder


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "index.sqlite"


def copy_in(root: Path, outside: Path) -> set[str]:
    shutil.copy(outside / "one.jpg", root / "one.jpg")
    return {"one.jpg"}


def move_in(root: Path, outside: Path) -> set[str]:
    (outside / "one.jpg").rename(root / "one.jpg")
    return {"one.jpg"}


def hard_link(root: Path, outside: Path) -> set[str]:
    (root / "one.jpg").hardlink_to(outside / "one.jpg")
    return {"one.jpg"}


def write_and_rename(root: Path, _outside: Path) -> set[str]:
    (root / ".one.tmp").write_bytes(b"x")
    (root / ".one.tmp").rename(root / "one.jpg")
    return {"one.jpg"}


def move_folder_in(root: Path, outside: Path) -> set[str]:
    (outside / "folder").rename(root / "folder")
    return {f"folder/{number}.jpg" for number in range(103)}


def nested_folders(root: Path, _outside: Path) -> set[str]:
    paths = set()
    for number in range(60):
        folder = root / f"n{number}" / "deep" / "deeper"
        folder.mkdir(parents=True)
        (folder / "x.jpg").write_bytes(b"x")
        (folder.parent / "y.jpg").write_bytes(b"x")
        paths |= {f"n{number}/deep/deeper/x.jpg", f"n{number}/deep/y.jpg"}
    return paths


def move_folder_out_and_write_there(root: Path, outside: Path) -> set[str]:
    (root / "known").rename(outside / "gone")
    (outside / "gone" / "phantom.jpg").write_bytes(b"x")
    (outside / "gone" / "a.jpg").write_bytes(b"changed")
    return set()


def move_folder_within(root: Path, _outside: Path) -> set[str]:
    (root / "known").rename(root / "renamed")
    return {"renamed/a.jpg", "renamed/deep/b.jpg"}


def write_in_place(root: Path, _outside: Path) -> set[str]:
    (root / "known/a.jpg").write_bytes(b"other content")
    return {"known/a.jpg"}


def replace_by_rename(root: Path, outside: Path) -> set[str]:
    (outside / "one.jpg").replace(root / "known/a.jpg")
    return {"known/a.jpg"}


def delete(root: Path, _outside: Path) -> set[str]:
    shutil.rmtree(root / "known")
    return set()


async def check_operation(
    operation: Callable[[Path, Path], set[str]],
    mode: Literal["native", "scan"],
    root: Path,
    database: Path,
    outside: Path,
) -> None:
    known = {"known/a.jpg", "known/deep/b.jpg", "stays.jpg", "stays too.jpg"}
    async with watching(root, database, events=mode) as watched:
        assert set(watched.counts) == known
        watched.settled.clear()
        expected = operation(root, outside)
        await watched.until(lambda: set(watched.counts) >= expected and watched.agrees())
        await watched.scan()
        assert watched.counts == Counter(expected)
        assert set(watched.vanished) == known - set(watched.tree_facts())
        assert len(watched.vanished) == len(set(watched.vanished))
        assert watched.agrees()
        assert watched.tree.state is State.WATCHING
        assert watched.tree.has_events == (mode == "native")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "operation",
    [
        copy_in,
        move_in,
        hard_link,
        write_and_rename,
        move_folder_in,
        nested_folders,
        move_folder_out_and_write_there,
        move_folder_within,
        write_in_place,
        replace_by_rename,
        delete,
    ],
)
def test_every_operation_ends_with_the_index_equal_to_the_tree(
    operation: Callable[[Path, Path], set[str]],
    mode: Literal["native", "scan"],
    root: Path,
    database: Path,
    tmp_path: Path,
) -> None:
    outside = tmp_path / "outside"
    (outside / "folder").mkdir(parents=True)
    (outside / "one.jpg").write_bytes(b"x")
    for number in range(103):
        (outside / "folder" / f"{number}.jpg").write_bytes(b"x")
    (root / "known/deep").mkdir(parents=True)
    for path in ("known/a.jpg", "known/deep/b.jpg", "stays.jpg", "stays too.jpg"):
        (root / path).write_bytes(b"x")
    asyncio.run(check_operation(operation, mode, root, database, outside))


@pytest.mark.parametrize("mode", MODES)
def test_a_slow_writer_is_waited_for(mode: Literal["native", "scan"], root: Path, database: Path) -> None:
    script = (
        "import sys, time\n"
        "with open(sys.argv[1], 'wb', buffering=0) as file:\n"
        "    for _ in range(20):\n"
        "        file.write(b'x' * 1000)\n"
        "        time.sleep(0.05)\n"
    )

    def start_writer() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", script, str(root / "slow.jpg")])

    async def check() -> None:
        async with watching(root, database, events=mode, settle=0.8) as watched:
            writer = start_writer()
            await watched.until(lambda: bool(watched.settled))
            assert writer.wait(10) == 0
            assert [(fact.path, fact.size) for fact in watched.settled] == [("slow.jpg", 20_000)]

    asyncio.run(check())


def test_a_file_found_at_start_settles_too(root: Path, database: Path) -> None:
    async def check() -> None:
        growing = root / "growing.jpg"
        growing.write_bytes(b"x")
        async with watching(root, database, settle=1.0, wait=False) as watched:
            for _ in range(12):
                await asyncio.sleep(0.1)
                with growing.open("ab") as file:
                    file.write(b"x")
                assert not watched.settled
                assert not watched.tree.first_scan.is_set()
            await watched.until(watched.tree.first_scan.is_set)
            assert [(fact.path, fact.size) for fact in watched.settled] == [("growing.jpg", 13)]

    asyncio.run(check())


def test_a_restart_hands_on_only_what_changed_and_a_lost_database_everything(root: Path, database: Path) -> None:
    async def check() -> None:
        for number in range(300):
            (root / f"{number}.jpg").write_bytes(b"x")
        async with watching(root, database) as watched:
            assert len(watched.counts) == 300
        (root / "0.jpg").unlink()
        (root / "1.jpg").write_bytes(b"changed")
        (root / "new.jpg").write_bytes(b"x")
        async with watching(root, database) as watched:
            assert watched.counts == Counter(["1.jpg", "new.jpg"])
            assert watched.vanished == ["0.jpg"]
        async with watching(root, database) as watched:
            await watched.scan()
            assert not watched.settled
            assert not watched.vanished
        for file in database.parent.glob("index.sqlite*"):
            file.unlink()
        async with watching(root, database) as watched:
            assert watched.counts == Counter(watched.tree_facts().keys())

    asyncio.run(check())


def test_a_scan_waits_for_room_when_very_much_is_new(
    root: Path, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("daemon.tree._WAITING_AT_MOST", 10)
    monkeypatch.setattr("daemon.tree._STEP_SECONDS", 0.0)
    for number in range(30):
        (root / str(number)).mkdir()
        for name in "abcde":
            (root / str(number) / f"{name}.jpg").write_bytes(b"x")

    async def check() -> None:
        most = 0
        async with watching(root, database, wait=False) as watched:

            def is_complete() -> bool:
                nonlocal most
                most = max(most, watched.tree.unsettled)
                return watched.tree.first_scan.is_set()

            await watched.until(is_complete)
            assert watched.counts == Counter(watched.tree_facts().keys())
            assert 5 <= most < 15

    asyncio.run(check())


def test_what_the_consumer_did_not_take_is_handed_on_again(
    root: Path, database: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def check() -> None:
        async with watching(root, database) as watched:
            watched.failures = 2
            (root / "a.jpg").write_bytes(b"x")
            await watched.until(watched.agrees)
            assert watched.failures == 0
            assert watched.counts == Counter(["a.jpg"])

    with caplog.at_level(logging.CRITICAL, logger="daemon.deliver"):
        asyncio.run(check())


# A watcher in a process of its own: appends what it hands on to a log, a line each.
SCRIPT = """
import asyncio, os, sys
from pathlib import Path
from daemon.index import Index
from daemon.tree import TreeWatch, WatchSettings

root, database, log, die = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4] == "die"
out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

def settled(facts):
    os.write(out, "".join(f"{fact.path}\\n" for fact in facts).encode())
    if die:
        os.kill(os.getpid(), 9)

async def main():
    tree = TreeWatch(root, Index(database), WatchSettings(settle=0.2), lambda folder: False,
                     on_settled=settled, on_vanished=lambda paths: None)
    task = asyncio.create_task(tree.run())
    await tree.first_scan.wait()
    os.write(out, b"ready\\n")
    await task

asyncio.run(main())
"""


@pytest.fixture
def start(root: Path, database: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    processes: list[subprocess.Popen[bytes]] = []

    def run(log: Path, *, die: bool = False) -> subprocess.Popen[bytes]:
        arguments = [sys.executable, "-c", SCRIPT, str(root), str(database), str(log), "die" if die else "live"]
        processes.append(subprocess.Popen(arguments, cwd=REPOSITORY))
        return processes[-1]

    yield run
    for process in processes:
        process.kill()
        process.wait()


def lines(log: Path) -> Counter[str]:
    return Counter(log.read_text().splitlines()) if log.exists() else Counter()


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_kill_while_handing_on_hands_on_again(
    root: Path, tmp_path: Path, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    for number in range(50):
        (root / f"{number}.jpg").write_bytes(b"x")
    assert start(tmp_path / "first", die=True).wait(30) == -signal.SIGKILL
    start(tmp_path / "second")
    wait_for(lambda: lines(tmp_path / "second")["ready"] == 1)
    names = {f"{number}.jpg" for number in range(50)}
    assert set(lines(tmp_path / "first")) == names
    assert lines(tmp_path / "second") == Counter([*names, "ready"])


def test_a_burst_while_the_watcher_is_frozen_loses_and_doubles_nothing(
    root: Path, tmp_path: Path, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    queue_length = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    # More events than the kernel keeps: two a file. On machines with a long queue, the burst alone is the test.
    count = max(2_000, min(queue_length // 2 + 1_000, 12_000))
    log = tmp_path / "log"
    process = start(log)
    wait_for(lambda: lines(log)["ready"] == 1)
    process.send_signal(signal.SIGSTOP)
    (root / "burst").mkdir()
    expected = Counter(["ready"])
    for number in range(count):
        (root / "burst" / f"{number}.jpg").write_bytes(b"x")
        expected[f"burst/{number}.jpg"] += 1
    process.send_signal(signal.SIGCONT)
    wait_for(lambda: lines(log) >= expected, 60)
    # After an overflow a second scan confirms the first: a file dropped after it comes later than any double.
    time.sleep(2.5)
    (root / "last.jpg").write_bytes(b"x")
    expected["last.jpg"] += 1
    wait_for(lambda: lines(log)["last.jpg"] == 1)
    assert lines(log) == expected


def test_an_overflow_brings_a_scan_and_one_more(root: Path, database: Path) -> None:
    async def check() -> None:
        async with watching(root, database) as watched:
            report = watched.tree._report
            logging.getLogger("watchdog.observers.inotify_c").warning("Inotify queue overflowed; events were lost")
            await watched.until(lambda: watched.tree._report is not report)
            report = watched.tree._report
            await watched.until(lambda: watched.tree._report is not report)

    asyncio.run(check())


def test_a_root_that_is_renamed_away_forgets_nothing_and_comes_back(root: Path, database: Path) -> None:
    async def check() -> None:
        (root / "a.jpg").write_bytes(b"x")
        async with watching(root, database) as watched:
            away = root.with_name("away")
            root.rename(away)
            (away / "a.jpg").write_bytes(b"events of this reach us under the old name")
            watched.tree.request_scan()
            await watched.until(lambda: watched.tree.state is State.UNREACHABLE)
            assert str(root) in watched.tree.reason
            root.mkdir()
            (root / "stranger.jpg").write_bytes(b"x")
            await asyncio.sleep(0.3)  # several looks
            assert watched.tree.state is State.UNREACHABLE
            shutil.rmtree(root)
            away.rename(root)
            await watched.until(lambda: watched.tree.state is State.WATCHING and watched.agrees())
            assert watched.tree.reason == ""
            assert watched.vanished == []
            assert watched.counts == Counter({"a.jpg": 2})
            await watched.until(lambda: watched.tree.has_events)
            (root / "b.jpg").write_bytes(b"x")
            await watched.until(lambda: watched.counts["b.jpg"] == 1)

    asyncio.run(check())


def test_a_deletion_is_not_believed_when_the_root_itself_is_another(root: Path, database: Path) -> None:
    async def check() -> None:
        for number in range(3):
            (root / f"{number}.jpg").write_bytes(b"x")
        async with watching(root, database, settle=0.3) as watched:
            (root / "0.jpg").unlink()
            await watched.until(lambda: watched.tree.unsettled == 1)
            root.rename(root.with_name("away"))
            root.mkdir()
            await watched.until(lambda: watched.tree.state is State.UNREACHABLE)
            assert watched.vanished == []
            assert watched.index.count() == 3

    asyncio.run(check())


def test_an_emptied_root_without_events_is_a_lost_mount_until_the_person_says_otherwise(
    root: Path, database: Path
) -> None:
    async def check() -> None:
        (root / "a.jpg").write_bytes(b"x")
        async with watching(root, database, events="scan") as watched:
            (root / "a.jpg").unlink()
            await watched.until(lambda: watched.tree.state is State.UNREACHABLE)
            assert "empty" in watched.tree.reason
            assert watched.index.count() == 1
            watched.tree.accept_losses()
            await watched.until(lambda: watched.tree.state is State.WATCHING and watched.agrees())
            assert watched.vanished == ["a.jpg"]

    asyncio.run(check())


def test_half_a_tree_without_events_is_not_forgotten_but_new_files_go_on(root: Path, database: Path) -> None:
    async def check() -> None:
        (root / "a").mkdir()
        for number in range(30):
            (root / "a" / f"{number}.jpg").write_bytes(b"x")
        (root / "b.jpg").write_bytes(b"x")
        async with watching(root, database, events="scan") as watched:
            (root / "a").rename(root.with_name("away"))
            (root / "new.jpg").write_bytes(b"x")
            await watched.until(lambda: watched.tree.held_back == 30 and watched.counts["new.jpg"] == 1)
            assert "30 of 3" in watched.tree.reason  # of 31 or 32: new.jpg may be among them by then
            assert watched.vanished == []
            root.with_name("away").rename(root / "a")
            await watched.until(lambda: watched.tree.held_back == 0 and watched.agrees())
            assert watched.tree.reason == ""
            assert watched.vanished == []
            assert watched.counts["a/0.jpg"] == 1

    asyncio.run(check())


def test_errno_107_pauses_and_forgets_nothing(root: Path, database: Path) -> None:
    lost = False

    def scandir(path: bytes) -> AbstractContextManager[Iterator[os.DirEntry[bytes]]]:
        if lost:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        return os.scandir(path)

    async def check() -> None:
        nonlocal lost
        for number in range(30):
            (root / f"{number}.jpg").write_bytes(b"x")
        async with watching(root, database, events="scan") as watched:
            watched.tree._scanner._scandir = scandir
            lost = True
            await watched.until(lambda: watched.tree.state is State.UNREACHABLE)
            assert "errno 107" in watched.tree.reason
            lost = False
            await watched.until(lambda: watched.tree.state is State.WATCHING)
            await watched.scan()
            assert len(watched.settled) == 30
            assert watched.vanished == []

    asyncio.run(check())


def test_a_root_that_is_not_there_yet_is_waited_for(root: Path, database: Path) -> None:
    async def check() -> None:
        async with watching(root, database, wait=False) as watched:
            root.rmdir()
            watched.tree.request_scan()
            await watched.until(lambda: watched.tree.state is State.UNREACHABLE)
            root.mkdir()
            (root / "a.jpg").write_bytes(b"x")
            await watched.until(lambda: watched.counts["a.jpg"] == 1)

    asyncio.run(check())


def test_any_name_is_handed_on(root: Path, database: Path) -> None:
    names = [b"a\nb.jpg", b"\xff\xfe.jpg", b"-rf.jpg", "é".encode() * 125 + b".jpg", b"x" * 251 + b".jpg", b" "]
    expected = Counter(os.fsdecode(name) for name in names)

    async def check() -> None:
        async with watching(root, database) as watched:
            for name in expected:
                (root / name).write_bytes(b"x")
            await watched.until(watched.agrees)
            assert watched.counts == expected
        async with watching(root, database) as watched:
            assert not watched.settled

    asyncio.run(check())


def test_ignored_and_skipped_files_are_not_handed_on(root: Path, database: Path) -> None:
    async def check() -> None:
        async with watching(root, database, ignore=("*.bak",)) as watched:
            for path in ("crops/a.jpg", ".fastsd/x.json", "captions/a.txt", "a.bak", "a.jpg.part", "b.jpg"):
                (root / path).parent.mkdir(exist_ok=True)
                (root / path).write_bytes(b"x")
            (root / "link.jpg").symlink_to(root / "b.jpg")
            await watched.until(lambda: len(watched.counts) >= 2)
            await watched.scan()
            assert watched.counts == Counter(["captions/a.txt", "b.jpg"])
            assert watched.tree.skipped == {"link.jpg": "symbolic link"}
            assert (watched.tree.folders, watched.tree.files) == (2, 2)

    asyncio.run(check())


def test_quiet_counts_what_moves_but_not_what_does_not_matter(root: Path, database: Path) -> None:
    async def check() -> None:
        (root / "s").mkdir()
        async with watching(root, database) as watched:
            assert watched.tree.quiet_for("s", time.monotonic()) == float("inf")
            (root / "s/STATUS.txt").write_bytes(b"x")
            await watched.until(lambda: watched.counts["s/STATUS.txt"] == 1)
            assert watched.tree.quiet_for("s", time.monotonic()) == float("inf")
            before = time.monotonic()
            (root / "s/a.jpg").write_bytes(b"x")
            await watched.until(lambda: watched.counts["s/a.jpg"] == 1)
            now = time.monotonic()
            assert watched.tree.quiet_for("s", now) <= now - before
            assert watched.tree.quiet_for("t", now) == float("inf")

    asyncio.run(check())


def test_a_reached_watch_limit_falls_back_to_scanning(tmp_path: Path) -> None:
    """In a user namespace of its own, where the limit can be set to three watches."""
    script = (
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from tests.daemon.test_tree import watching\n"
        "async def main():\n"
        "    root = Path(sys.argv[1]) / 'tree'\n"
        "    for number in range(8):\n"
        "        (root / str(number)).mkdir(parents=True)\n"
        "    async with watching(root, Path(sys.argv[1]) / 'index.sqlite') as watched:\n"
        "        print('limit' in watched.tree.reason)\n"
        "        for number in range(8):\n"
        "            (root / str(number) / 'a.jpg').write_bytes(b'x')\n"
        "        await watched.until(lambda: len(watched.counts) == 8)\n"
        "        print(sum(watched.counts.values()))\n"
        "asyncio.run(main())\n"
    )
    run = subprocess.run(
        [*LIMITED, sys.executable, "-c", script, str(tmp_path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    if "unshare" in run.stderr or "max_inotify_watches" in run.stderr:
        pytest.skip(f"no user namespaces here: {run.stderr.strip()}")
    assert run.stdout.split() == ["True", "8"], run.stderr


def test_an_idle_watcher_sleeps(root: Path, database: Path) -> None:
    async def check() -> None:
        (root / "a.jpg").write_bytes(b"x")
        async with watching(root, database) as watched:
            await watched.scan()
            rounds = 0
            real = watched.tree._round

            async def counted() -> bool:
                nonlocal rounds
                rounds += 1
                return await real()

            watched.tree._round = counted  # type: ignore[method-assign]
            await asyncio.sleep(1.0)
            assert rounds <= 1

    asyncio.run(check())


FOLDERS = ["", "a", "a/b", "c"]
NAMES = ["x.jpg", "y.txt", "z"]
operations = st.one_of(
    st.tuples(st.just("write"), st.sampled_from(FOLDERS), st.sampled_from(NAMES), st.integers(0, 5)),
    st.tuples(st.just("append"), st.sampled_from(FOLDERS), st.sampled_from(NAMES), st.integers(1, 5)),
    st.tuples(st.just("replace"), st.sampled_from(FOLDERS), st.sampled_from(NAMES), st.integers(0, 5)),
    st.tuples(st.just("unlink"), st.sampled_from(FOLDERS), st.sampled_from(NAMES), st.just(0)),
    st.tuples(st.just("rename"), st.sampled_from(FOLDERS), st.sampled_from(NAMES), st.integers(0, 11)),
    st.tuples(st.just("remove folder"), st.sampled_from(FOLDERS[1:]), st.just(""), st.just(0)),
    st.tuples(st.just("move folder"), st.sampled_from(FOLDERS[1:]), st.just(""), st.integers(0, 3)),
    st.tuples(st.just("swap for a folder"), st.sampled_from(FOLDERS), st.sampled_from(NAMES), st.just(0)),
    st.tuples(st.just("wait"), st.just(""), st.just(""), st.integers(1, 4)),
)


def perform(root: Path, outside: Path, operation: tuple[str, str, str, int]) -> None:
    kind, folder, name, number = operation
    path = root / folder / name
    with suppress(OSError, shutil.Error):
        if kind in ("write", "append", "replace"):
            path.parent.mkdir(parents=True, exist_ok=True)
            target = path if kind != "replace" else outside / "new"
            with target.open("ab" if kind == "append" else "wb") as file:
                file.write(b"x" * number)
            if kind == "replace":
                target.replace(path)
        elif kind == "unlink":
            path.unlink()
        elif kind == "rename":
            other = root / FOLDERS[number % 4] / NAMES[number % 3]
            path.rename(other)
        elif kind == "remove folder":
            shutil.rmtree(path)
        elif kind == "move folder":
            path.rename(root / FOLDERS[1:][number % 3] / "moved" if number % 2 else root / "moved")
        elif kind == "swap for a folder":
            path.unlink()
            path.mkdir()
            (path / "inside.jpg").write_bytes(b"x")


@pytest.mark.parametrize("mode", MODES)
@given(sequence=st.lists(operations, min_size=1, max_size=20))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_sequence_of_operations_ends_with_the_index_equal_to_the_tree(
    mode: Literal["native", "scan"], sequence: list[tuple[str, str, str, int]]
) -> None:
    async def check(folder: Path) -> None:
        root, outside = folder / "tree", folder / "outside"
        outside.mkdir()
        root.mkdir()
        (root / "always.jpg").write_bytes(b"x")
        async with watching(root, folder / "index.sqlite", events=mode, settle=0.02, poll=0.02) as watched:
            for operation in sequence:
                if operation[0] == "wait":
                    await asyncio.sleep(operation[3] / 100)
                perform(root, outside, operation)
            # Events alone have to find most of it; half of it gone at once on a root without events is not reached.
            await watched.until(watched.agrees)
            await watched.scan()
            assert watched.agrees()
            last = {fact.path: (fact.size, fact.mtime_ns, fact.inode) for fact in watched.settled}
            assert {path: last[path] for path in watched.tree_facts()} == watched.tree_facts()
            for path, count in watched.counts.items():
                versions = len({fact for fact in watched.settled if fact.path == path})
                assert count <= versions + watched.vanished.count(path)

    with tempfile.TemporaryDirectory() as temporary:
        asyncio.run(check(Path(temporary)))
