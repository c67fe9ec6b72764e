"""Handlers for the tests of workers: they do what their payload says."""

# ruff: noqa: ARG002 - every probe has the signature of a handler
from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from handlers.context import Cancelled, JobContext, JobResult, Stopping, Waiting
from handlers.kinds import Kind
from sessions.refusal import Refusal

MODULE = "tests.probes"
ROOT = Path(__file__).parents[1]
# Workers find this module by it.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
# A probe that waits gives up after this, so that no test leaves a process behind.
DEADLINE = 60.0


def kind(name: str = "probe", handler: str = "Probe", lane: str = "cpu", **changes: object) -> Kind:
    """A kind whose handler is one of this module."""
    values = {"name": name, "handler": f"{MODULE}:{handler}", "lane": lane, **changes}
    return Kind(**values)  # type: ignore[arg-type]


KINDS = {
    made.name: made
    for made in (
        kind("probe", attempts=2),
        kind("other", attempts=2),
        kind("batch", handler="BatchProbe", batch=4, attempts=3),
        kind("train", lane="gpu", silence=30.0),
    )
}


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait for a condition; fail after a while."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            message = "the condition did not come true"
            raise AssertionError(message)
        time.sleep(0.005)


def alive(pid: int) -> bool:
    """True while a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


class Probe:
    """Does what ``payload["do"]`` names."""

    def __init__(self) -> None:
        self._runs = 0

    def run(self, context: JobContext) -> JobResult:
        self._runs += 1
        if begun := context.payload.get("begun"):
            Path(begun).write_text(str(os.getpid()), encoding="ascii")
        facts = getattr(self, context.payload.get("do", "echo"))(context)
        return JobResult(facts={"run": self._runs, "pid": os.getpid(), **(facts or {})})

    def echo(self, context: JobContext) -> dict[str, object]:
        return {"payload": context.payload, "device": context.device}

    def paths(self, context: JobContext) -> dict[str, object]:
        """Give back a path as such: facts need not be plain JSON."""
        return {"path": Path(context.payload["path"]), "exists": Path(context.payload["path"]).exists()}

    def wait_for_file(self, context: JobContext) -> None:
        """Work until a file appears; can be cancelled and stopped."""
        deadline = time.monotonic() + DEADLINE
        while not Path(context.payload["file"]).exists() and time.monotonic() < deadline:
            context.progress(1, 2, "waiting")
            if context.is_stopping():
                raise Stopping
            time.sleep(0.01)

    def deaf(self, context: JobContext) -> None:
        """Work until a file appears; hear nothing."""
        deadline = time.monotonic() + DEADLINE
        while not Path(context.payload["file"]).exists() and time.monotonic() < deadline:
            time.sleep(0.01)

    def finish_anyway(self, context: JobContext) -> None:
        """Wait until cancelled, and be done all the same."""
        deadline = time.monotonic() + DEADLINE
        while not context.is_cancelled() and time.monotonic() < deadline:
            time.sleep(0.01)

    def segfault(self, context: JobContext) -> None:
        print("about to crash", file=sys.stderr, flush=True)
        ctypes.string_at(0)

    def leave(self, context: JobContext) -> None:
        print("last words", file=sys.stderr, flush=True)
        os._exit(3)

    def be_killed(self, context: JobContext) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def fail(self, context: JobContext) -> None:
        message = context.payload.get("message", "as the test wants")
        raise ValueError(message)

    def fail_first(self, context: JobContext) -> None:
        """Fail as long as the counting file has fewer than ``failures`` lines."""
        file = Path(context.payload["file"])
        lines = file.read_text(encoding="ascii").splitlines() if file.exists() else []
        if len(lines) < context.payload["failures"]:
            with file.open("a", encoding="ascii") as writer:
                writer.write("failed\n")
            message = "not yet"
            raise ValueError(message)

    def exhaust_memory(self, context: JobContext) -> None:
        raise MemoryError

    def allocate(self, context: JobContext) -> None:
        """Ask for more memory than there is."""
        bytearray(1 << 60)

    def refuse(self, context: JobContext) -> None:
        raise Refusal("empty", "The file is empty.", "Upload it again.", line=3)

    def lack(self, context: JobContext) -> None:
        reason = "The weights are missing: fastsd models get kosmos-2."
        raise Waiting(reason, retry_after=context.payload.get("retry_after", 40.0))

    def be_cancelled(self, context: JobContext) -> None:
        raise Cancelled

    def import_nothing(self, context: JobContext) -> None:
        import no_such_package  # type: ignore[import-not-found]  # noqa: F401

    def leave_by_exception(self, context: JobContext) -> None:
        raise SystemExit(5)

    def not_json(self, context: JobContext) -> dict[str, object]:
        return {"object": object()}

    def chatter(self, context: JobContext) -> None:
        """Many progress messages at once; the last one counts."""
        for step in range(context.payload["steps"]):
            context.progress(step + 1, context.payload["steps"], "step", loss=0.5)

    def last_word_then_silence(self, context: JobContext) -> None:
        """Two messages in a row, then none: the second must come through all the same."""
        context.progress(0, 1, "first")
        context.progress(0, 1, "second")
        self.deaf(context)

    def print_garbage(self, context: JobContext) -> None:
        """All ways to spoil stdout."""
        print('{"type": "outcome", "job": 1, "state": "done"}', flush=True)
        os.write(1, b"not json\n\xff\xfe")
        subprocess.run([sys.executable, "-c", "print('from a child')"], check=True)

    def read_stdin(self, context: JobContext) -> dict[str, object]:
        return {"read": sys.stdin.read()}

    def start_child(self, context: JobContext) -> None:
        """Start a process that would outlive the worker, and wait."""
        child = subprocess.Popen(["sleep", str(DEADLINE)])
        Path(context.payload["child"]).write_text(str(child.pid), encoding="ascii")
        if context.payload.get("leave"):
            os._exit(4)
        self.deaf(context)

    def once(self, context: JobContext) -> None:
        """Take a while; tell when two workers do the same job at the same time."""
        folder = Path(context.payload["folder"])
        owner = folder / f"{context.payload['name']}.owner"
        if owner.exists() and (other := owner.read_text(encoding="ascii")) and alive(int(other)):
            (folder / "overlap").write_text(f"{context.payload['name']} {other}", encoding="ascii")
        owner.write_text(str(os.getpid()), encoding="ascii")
        time.sleep(context.payload["seconds"])
        with (folder / "starts").open("ab", buffering=0) as log:
            log.write(json.dumps([context.payload["name"], os.getpid()]).encode() + b"\n")
        owner.unlink()


class BatchProbe(Probe):
    """Does several at once; ``crash`` in one of them takes all down."""

    def run_batch(self, contexts: Sequence[JobContext]) -> Sequence[JobResult | BaseException]:
        if any(context.payload.get("crash") for context in contexts):
            os.kill(os.getpid(), signal.SIGKILL)
        if any(context.payload.get("short") for context in contexts):
            return []
        ends: list[JobResult | BaseException] = []
        for context in contexts:
            if context.payload.get("refuse"):
                ends.append(Refusal("empty", "The file is empty.", "Upload it again."))
            else:
                ends.append(JobResult(facts={"batch": len(contexts), "name": context.payload.get("name")}))
        return ends

    def run(self, context: JobContext) -> JobResult:
        if context.payload.get("crash"):
            os.kill(os.getpid(), signal.SIGKILL)
        return JobResult(facts={"batch": 1, "name": context.payload.get("name")})


class SlowToLoad:
    """Crashes while it is made."""

    def __init__(self) -> None:
        os._exit(7)


class NotThere:
    """Cannot be made: a package is missing."""

    def __init__(self) -> None:
        import no_such_package  # noqa: F401
