"""Measures the watcher against its budgets and prints a table.

    python benchmarks/watch.py                     everything, within four minutes
    python benchmarks/watch.py --files 5000 --idle-seconds 10
    python benchmarks/watch.py --command fastsd up {root}      the idle figures of this command instead

Ratios are measured side by side in one run. The watcher runs in a process of its own, so that its memory and CPU time
are its own; figures come from /proc.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import select
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from daemon.index import Fact, Index
from daemon.routing import PICTURE_KINDS, PictureRules
from daemon.scan import Report, Scanner
from daemon.tree import TreeWatch, WatchSettings
from sessions.files import append_lines
from sessions.ignore import IgnoreRules
from sessions.manifest import manifest_path, new_identity, write_identity

_TICKS = os.sysconf("SC_CLK_TCK")


def build_tree(root: Path, folders: int, files: int) -> None:
    """``files`` small files, spread over ``folders`` session folders."""
    for number in range(folders):
        folder = root / "Sessions" / f"session {number:04}"
        folder.mkdir(parents=True)
        for picture in range(number, files, folders):
            (folder / f"picture ({picture}).jpg").write_bytes(b"picture")


def record_as_done(root: Path) -> None:
    """Give every session the manifest that it has when all its pictures are cropped and captioned: nothing is to do."""
    rules = PictureRules()
    for folder in (root / "Sessions").iterdir():
        write_identity(folder, new_identity(folder))
        lines = []
        for picture in folder.glob("*.jpg"):
            found = picture.stat()
            common = {"source": picture.name, "size": found.st_size, "mtime_ns": found.st_mtime_ns, "outputs": []}
            lines += [
                json.dumps({"kind": kind, **common, "stem": picture.stem, "params": rules.parameters(kind)})
                for kind in PICTURE_KINDS
            ]
        append_lines(manifest_path(folder), lines)


def bare_scan(root: str) -> int:
    """What the budget is measured against: list and stat everything, compare nothing."""
    count = 0
    pending = [root]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                else:
                    entry.stat(follow_symlinks=False)
                    count += 1
    return count


def measure_scan(root: Path, state: Path, repeats: int) -> tuple[float, float]:
    """Median seconds of the bare scan and of ours, in turn, with everything known."""
    index = Index(state / "scan.sqlite")
    scanner = Scanner(str(root), index, IgnoreRules(), lambda _folder: False)
    index.record(fact for changes in scanner.walk("", Report()) for fact in changes.changed)
    bare: list[float] = []
    ours: list[float] = []
    for _ in range(repeats):
        began = time.perf_counter()
        bare_scan(str(root))
        bare.append(time.perf_counter() - began)
        began = time.perf_counter()
        differing = sum(len(changes.changed) + len(changes.vanished) for changes in scanner.walk("", Report()))
        ours.append(time.perf_counter() - began)
        if differing:
            message = f"{differing} files differ in a tree that nobody touched"
            raise RuntimeError(message)
    index.close()
    return statistics.median(bare), statistics.median(ours)


# The measured process: says what it hands on, a line each, on stdout.


async def watch(root: Path, database: Path, settle: float) -> None:
    def say(facts: list[Fact]) -> None:
        now = time.monotonic()
        sys.stdout.write("".join(f"settled {now:.6f} {fact.path}\n" for fact in facts))
        sys.stdout.flush()

    tree = TreeWatch(
        root,
        Index(database),
        WatchSettings(settle=settle),
        lambda _folder: False,
        on_settled=say,
        on_vanished=lambda _paths: None,
    )
    task = asyncio.create_task(tree.run())
    await tree.first_scan.wait()
    print("ready", flush=True)
    await task


@contextmanager
def watcher(root: Path, database: Path, settle: float) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, __file__, "--watch", str(root), str(database), "--settle", str(settle)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONWARNINGS": "default"})
    try:
        yield process
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


class Lines:
    """The lines of a process, with a deadline."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        if process.stdout is None:
            message = "the process has no stdout"
            raise ValueError(message)
        self._descriptor = process.stdout.fileno()
        self._rest = b""

    def read(self, seconds: float) -> list[bytes]:
        """The lines that come within some seconds, or as soon as there are any; [] when none came."""
        ready, _, _ = select.select([self._descriptor], [], [], max(0.0, seconds))
        if not ready:
            return []
        chunk = os.read(self._descriptor, 1 << 20)
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        return lines or (self.read(seconds) if chunk else [])

    def until(self, word: bytes, seconds: float) -> None:
        """Read on until a line is this word."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if word in self.read(deadline - time.monotonic()):
                return
        message = f"no line {word!r} in {seconds:g} s"
        raise TimeoutError(message)


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def resident_megabytes(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


def measure_idle(pid: int, seconds: float) -> tuple[float, float]:
    """Percent of a core over some seconds, and megabytes at the end, of a process with its children."""
    pids = family(pid)
    before = sum(cpu_seconds(one) for one in pids)
    time.sleep(seconds)
    after = sum(cpu_seconds(one) for one in pids)
    return (after - before) / seconds * 100, sum(resident_megabytes(one) for one in pids)


def measure_latency(root: Path, lines: Lines, drops: int, settle: float) -> list[float]:
    """Seconds beyond the settle time from the end of a drop until it is handed on."""
    folder = root / "Sessions" / "session 0000"
    delays = []
    for number in range(drops):
        name = f"drop {number}.jpg"
        (folder / name).write_bytes(b"dropped")
        began = time.monotonic()
        deadline = began + settle + 30
        while time.monotonic() < deadline:
            found = [line for line in lines.read(deadline - time.monotonic()) if line.endswith(name.encode())]
            if found:
                delays.append(float(found[0].split()[1]) - began - settle)
                break
        else:
            message = f"{name} was never handed on"
            raise TimeoutError(message)
    return delays


def measure_burst(root: Path, process: subprocess.Popen[bytes], lines: Lines, files: int) -> tuple[int, int, float]:
    """Files lost and doubled, and seconds until the last one came, when all are written while the watcher is frozen."""
    folder = root / "Sessions" / "burst"
    process.send_signal(signal.SIGSTOP)
    folder.mkdir()
    for number in range(files):
        (folder / f"burst {number}.jpg").write_bytes(b"burst")
    process.send_signal(signal.SIGCONT)
    began = time.monotonic()
    last = began
    counts: Counter[bytes] = Counter()
    # Long enough for the scan that confirms after an overflow to hand something on twice.
    while time.monotonic() < last + 8:
        for line in lines.read(1.0):
            if b"/burst/" in line:
                counts[line.split(b" ", 2)[2]] += 1
                last = time.monotonic()
    return files - len(counts), sum(counts.values()) - len(counts), last - began


def row(what: str, value: str, budget: str = "") -> None:
    print(f"| {what:<52} | {value:>22} | {budget:<22} |", flush=True)


def report(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="fastsd-watch-") as temporary:
        root, state = Path(temporary, "tree"), Path(temporary, "state")
        root.mkdir()
        state.mkdir()
        build_tree(root, options.folders, options.files)
        row("what", "measured", "budget")
        row("-" * 52, "-" * 22, "-" * 22)
        row("tree", f"{options.files} in {options.folders}")
        bare, ours = measure_scan(root, state, options.repeats)
        row("bare scandir + stat", f"{bare:.3f} s")
        row("scan against the index", f"{ours:.3f} s = {ours / bare:.2f} x", "2 x")
        if options.command:
            record_as_done(root)
            arguments = [part.replace("{root}", str(root)) for part in options.command]
            process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, start_new_session=True)
            try:
                print(f"waiting {options.warm_up:g} s for: {shlex.join(arguments)}", file=sys.stderr)
                time.sleep(options.warm_up)
                show_idle(process.pid, options.idle_seconds, "idle")
            finally:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(30)
                process.kill()
                process.wait()
            return
        database = state / "watch.sqlite"
        with watcher(root, database, options.settle) as process:
            began = time.monotonic()
            Lines(process).until(b"ready", 120)
            row("first scan of an unknown tree, settled", f"{time.monotonic() - began:.1f} s")
            show_idle(process.pid, options.idle_seconds / 4, "idle after it")
        with watcher(root, database, options.settle) as process:
            lines = Lines(process)
            began = time.monotonic()
            lines.until(b"ready", 120)
            row("start with a known tree", f"{time.monotonic() - began:.1f} s")
            show_idle(process.pid, options.idle_seconds, "idle")
            delays = measure_latency(root, lines, options.drops, options.settle)
            row(f"drop to handed on, median of {len(delays)}", f"{statistics.median(delays) * 1000:.1f} ms", "100 ms")
            row("drop to handed on, slowest", f"{max(delays) * 1000:.1f} ms")
            lost, doubled, seconds = measure_burst(root, process, lines, options.burst)
            row(f"{options.burst} files at once, watcher frozen: lost", str(lost), "0")
            row(f"{options.burst} files at once, watcher frozen: doubled", str(doubled), "0")
            row("until the last of them was handed on", f"{seconds:.1f} s")


def show_idle(pid: int, seconds: float, name: str) -> None:
    percent, megabytes = measure_idle(pid, seconds)
    row(f"{name}, {seconds:g} s: one core", f"{percent:.2f} %", "0.2 %")
    row(f"{name}: memory", f"{megabytes:.1f} MB", "60 MB")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=50_000)
    parser.add_argument("--folders", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=9, help="scans of each kind")
    parser.add_argument("--idle-seconds", type=float, default=60.0)
    parser.add_argument("--settle", type=float, default=0.5)
    parser.add_argument("--drops", type=int, default=50)
    parser.add_argument("--burst", type=int, default=20_000)
    parser.add_argument("--warm-up", type=float, default=60.0, help="seconds that --command gets before it is measured")
    parser.add_argument("--watch", nargs=2, metavar=("ROOT", "DATABASE"), help=argparse.SUPPRESS)
    parser.add_argument(
        "--command",
        nargs=argparse.REMAINDER,
        help="measure the idle figures of this on a tree where all is done; {root} is the tree",
    )
    options = parser.parse_args()
    if options.watch:
        asyncio.run(watch(Path(options.watch[0]), Path(options.watch[1]), options.settle))
    else:
        report(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
