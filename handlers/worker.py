"""The worker process: runs the jobs of one kind, tells how they go, and dies with the daemon.

``python -m handlers.worker --kind K --handler module:Class --device cpu --cache DIR --parent PID``. The protocol is in
``docs/architecture.md``. The main thread runs the handler; one thread reads stdin, another sends heartbeats and the
progress that was held back.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from handlers.context import BatchHandler, Cancelled, Handler, JobContext, JobResult, Stopping
from handlers.large_imports import large_imports
from handlers.outcome import Outcome
from handlers.pipe import Reporter, die_with, prefer_as_victim, read_messages, take_pipes


class Desk:
    """What the daemon asked for: jobs to run, jobs to cancel, to stop. Filled by a thread, read by the main one."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[list[Mapping[str, Any]] | None] = queue.SimpleQueue()
        self._cancelled: set[int] = set()
        self._stopping = False

    def receive(self, message: Mapping[str, Any]) -> None:
        """Take one message of the daemon."""
        match message:
            case {"type": "run", "jobs": list(jobs)}:
                # A job that was cancelled once and is tried again keeps its number.
                self._cancelled.difference_update(job["job"] for job in jobs)
                self._work.put(jobs)
            case {"type": "cancel", "job": int(job)}:
                self._cancelled.add(job)
            case {"type": "stop"}:
                self.stop()

    def stop(self) -> None:
        """Ask the handler to save and stop."""
        self._stopping = True
        self._work.put(None)

    def next_jobs(self) -> list[Mapping[str, Any]] | None:
        """The jobs to run next; None to end."""
        return self._work.get()

    def is_stopping(self) -> bool:
        """True once the worker is to end."""
        return self._stopping

    def is_cancelled(self, job: int) -> bool:
        """True once this job is cancelled."""
        return job in self._cancelled


class Worker:
    """Runs jobs of one kind with one handler, loaded with the first job.

    Args:
        load: makes the handler.
        desk: what to do.
        reporter: how it went.
        device: a torch device string.
        cache: a folder on a local disk.
    """

    def __init__(self, load: Callable[[], Handler], desk: Desk, reporter: Reporter, device: str, cache: Path) -> None:
        self._load = load
        self._handler: Handler | None = None
        self._desk = desk
        self._reporter = reporter
        self._device = device
        self._cache = cache
        self._batch: list[int] = []

    def run(self) -> None:
        """Work until told to stop. Every job that was handed in gets one outcome."""
        while (jobs := self._desk.next_jobs()) is not None:
            self._batch = [job["job"] for job in jobs]
            contexts = [context for context in map(self._context, jobs) if self._begins(context)]
            if not contexts:
                continue
            if self._handler is None:
                # Loading may crash, too: with "started" the daemon knows whom to blame.
                self._reporter.send({"type": "started", "jobs": [contexts[0].job]})
                try:
                    self._handler = self._load()
                except BaseException as error:
                    for context in contexts:
                        self._reporter.outcome(context.job, Outcome.of(error))
                    continue
            if isinstance(self._handler, BatchHandler) and len(contexts) > 1:
                self._run_batch(self._handler, contexts)
            else:
                for context in contexts:
                    if self._begins(context):
                        self._run_one(self._handler, context)

    def _context(self, job: Mapping[str, Any]) -> JobContext:
        number = job["job"]
        return JobContext(
            job=number,
            kind=job["kind"],
            payload=job["payload"],
            device=self._device,
            cache=self._cache,
            report=partial(self._reporter.progress, number),
            is_cancelled=partial(self._desk.is_cancelled, number),
            is_stopping=self._desk.is_stopping,
            limit=partial(self._limit, number),
        )

    @contextmanager
    def _limit(self, job: int, seconds: float, end: Exception) -> Iterator[None]:
        timer = threading.Timer(seconds, self._give_up, (job, end))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _give_up(self, job: int, end: Exception) -> None:
        """End a job that cannot be interrupted, by ending the process. The jobs beside it are given back.

        What has ended already is told twice, and heard once.
        """
        self._reporter.outcome(job, Outcome.of(end))
        for other in self._batch:
            if other != job:
                self._reporter.outcome(other, Outcome.of(Stopping()))
        sys.stderr.flush()
        os._exit(0)

    def _begins(self, context: JobContext) -> bool:
        """False, and the job's outcome is told, where it was cancelled or the worker stops."""
        if context.is_cancelled():
            self._reporter.outcome(context.job, Outcome.of(Cancelled()))
            return False
        if context.is_stopping():
            self._reporter.outcome(context.job, Outcome.of(Stopping()))
            return False
        return True

    def _run_one(self, handler: Handler, context: JobContext) -> None:
        self._reporter.send({"type": "started", "jobs": [context.job]})
        end: JobResult | BaseException
        try:
            end = handler.run(context)
        except BaseException as error:
            end = error
        self._reporter.outcome(context.job, Outcome.of(_checked(end)))

    def _run_batch(self, handler: BatchHandler, contexts: Sequence[JobContext]) -> None:
        self._reporter.send({"type": "started", "jobs": [context.job for context in contexts]})
        ends: Sequence[JobResult | BaseException]
        try:
            ends = handler.run_batch(contexts)
            if len(ends) != len(contexts):
                message = f"the handler returned {len(ends)} results for {len(contexts)} jobs"
                raise TypeError(message)  # noqa: TRY301 - it ends the jobs as any error of the handler does
        except BaseException as error:
            ends = [error] * len(contexts)
        for context, end in zip(contexts, ends, strict=True):
            self._reporter.outcome(context.job, Outcome.of(_checked(end)))


def _checked(end: object) -> JobResult | BaseException:
    if isinstance(end, JobResult | BaseException):
        return end
    return TypeError(f"the handler returned {type(end).__name__} instead of a JobResult")


def load_handler(name: str) -> Handler:
    """Make the handler that ``module:Class`` names. Raises what the import raises."""
    importlib.invalidate_caches()
    module, _, attribute = name.partition(":")
    with large_imports():
        kind = getattr(importlib.import_module(module), attribute)
    handler: Handler = kind()
    return handler


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the worker process; does not return."""
    parser = argparse.ArgumentParser(prog="handlers.worker")
    for name in ("--kind", "--handler", "--device"):
        parser.add_argument(name, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--parent", type=int, required=True)
    options = parser.parse_args(arguments)
    die_with(options.parent)
    commands, answers = take_pipes()
    faulthandler.enable()
    prefer_as_victim()
    desk, reporter = Desk(), Reporter(answers)
    # Ctrl-C in a terminal is the daemon's business: it asks the workers to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: desk.stop())
    reporter.send({"type": "ready", "pid": os.getpid()})
    threading.Thread(target=read_messages, args=(commands, desk.receive), name="commands", daemon=True).start()
    threading.Thread(target=reporter.beat_forever, name="heartbeat", daemon=True).start()
    Worker(partial(load_handler, options.handler), desk, reporter, options.device, options.cache).run()
    sys.stdout.flush()
    sys.stderr.flush()
    # Libraries' threads and exit hooks may hang; everything that matters is on the disk.
    os._exit(0)


if __name__ == "__main__":
    main()
