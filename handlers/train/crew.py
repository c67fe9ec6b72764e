"""Several devices work on one run: each takes a share of a step's pictures, and their gradients are added up.

The worker is the first of the crew. It decides, saves and shows; the others follow the same steps in processes of their
own and keep nothing. All begin with the same weights and make the same updates, so that no weights are ever sent.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from multiprocessing import connection
from typing import Any, Protocol

import torch
from accelerate import PartialState
from accelerate.utils import check_cuda_p2p_ib_support, reduce

from handlers.large_imports import large_imports
from handlers.pipe import die_with
from sessions.refusal import Refusal

# Samples are drawn by the first alone, and the others wait for it.
_PATIENCE = timedelta(hours=2)
# Numbers that are added up in one go.
_BUCKET = 1 << 25
# Within which the first one should have noticed by itself that another one ended.
_GRACE_SECONDS = 10.0
_LOOK_SECONDS = 0.5
# Where a connection broke: within which a member that ended is known to end, and to have ended.
_SIGN_SECONDS = 1.0
_DYING_SECONDS = 10.0


class Crew(Protocol):
    """Those who share the steps of a run.

    Attributes:
        rank: which one this process is, from 0.
        count: how many there are.
    """

    rank: int
    count: int

    def sum_of(self, numbers: Sequence[float]) -> list[float]:
        """The sum over all of each number."""

    def add_up(self, parameters: Sequence[Any]) -> None:
        """Every parameter's gradient becomes the sum over all; None where nobody has one."""


class Alone:
    """One device does it all."""

    rank = 0
    count = 1

    def sum_of(self, numbers: Sequence[float]) -> list[float]:
        """The numbers."""
        return list(numbers)

    def add_up(self, parameters: Sequence[Any]) -> None:
        """Nothing is to be added."""


class Member:
    """One of several, each in a process with a device of its own.

    Args:
        rank: which one.
        count: how many.
        device: a torch device string.
        port: where the first one is found on this machine.
    """

    def __init__(self, rank: int, count: int, device: str, port: int) -> None:
        self.rank = rank
        self.count = count
        self._device = device
        index = device.partition(":")[2] or "0"
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": index if device.startswith("cuda") else str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, torch.get_num_threads() // count)),
        }
        on_cpu = device == "cpu"
        if on_cpu:
            environment["GLOO_SOCKET_IFNAME"] = "lo"  # a host's own name often leads nowhere
        elif not check_cuda_p2p_ib_support():
            environment |= {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}
        self._before = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        PartialState(cpu=on_cpu, backend="gloo" if on_cpu else "nccl", timeout=_PATIENCE)

    def sum_of(self, numbers: Sequence[float]) -> list[float]:
        """As ``Crew.sum_of``."""
        # float32 is enough to show a loss, and what NCCL has on every GPU.
        summed = reduce(torch.tensor(numbers, dtype=torch.float32, device=self._device), "sum")
        found: list[float] = summed.tolist()
        return found

    def add_up(self, parameters: Sequence[Any]) -> None:
        """As ``Crew.add_up``."""
        has = torch.tensor([float(each.grad is not None) for each in parameters], device=self._device)
        somebody_has = reduce(has, "sum").tolist()
        shared = [each for each, known in zip(parameters, somebody_has, strict=True) if known]
        for parameter in shared:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets(shared):
            flat = reduce(torch.cat([each.grad.flatten() for each in bucket]), "sum")
            for each, part in zip(bucket, flat.split([each.numel() for each in bucket]), strict=True):
                each.grad.copy_(part.view_as(each.grad))

    def close(self) -> None:
        """Leave the crew, whoever is still there; this process may join another later."""
        if torch.distributed.is_initialized():
            if self._device == "cpu":
                torch.distributed.destroy_process_group()
            else:
                # NCCL's farewell is everybody's: it would wait for those who are gone.
                torch.distributed.distributed_c10d._abort_process_group()  # noqa: SLF001 - there is no other name
        PartialState._reset_state()  # noqa: SLF001 - accelerate's own way to forget a finished group
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _buckets(parameters: Sequence[Any]) -> Iterator[list[Any]]:
    bucket: list[Any] = []
    size = 0
    for parameter in parameters:
        if bucket and size + parameter.numel() > _BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.numel()
    if bucket:
        yield bucket


class MemberLost(Exception):  # noqa: N818 - what happened, in the words of the crew
    """One of the crew ended before the work did: a run goes on from its last checkpoint when it is tried again."""


Limit = Callable[[float, Exception], AbstractContextManager[None]]
"""A block that may take so many seconds, else the job ends by the exception (``JobContext.within``)."""


@contextmanager
def crew_of(devices: Sequence[str], follow: str, task: Mapping[str, Any], limit: Limit) -> Iterator[Crew]:
    """The crew of a run, with this process as the first; the others' processes end with the block.

    Args:
        devices: one a member; the first is this process's.
        follow: ``module:function``, what the others do; called with their ``Crew``, their device and ``task``.
        task: what it is told; can be pickled.
        limit: ends the job where another member ended and this one waits for it in vain.

    Raises:
        Refusal: code ``crew``: the others cannot be reached.
        MemberLost: one of them ended too early.
    """
    if len(devices) < 2:
        yield Alone()
        return
    # Spawned: a process that computes on a GPU must not be forked.
    spawning = multiprocessing.get_context("spawn")
    port = _free_port()
    seats = [
        {"rank": rank, "count": len(devices), "device": device, "port": port} for rank, device in enumerate(devices)
    ]
    processes = [
        spawning.Process(target=_serve, args=(seat, follow, dict(task), os.getpid()), daemon=True) for seat in seats[1:]
    ]
    for process in processes:
        process.start()
    closing = threading.Event()
    watching = threading.Thread(target=_watch, args=(processes, closing, limit), name="crew", daemon=True)
    watching.start()
    member: Member | None = None
    try:
        try:
            member = Member(0, len(devices), devices[0], port)
        except (RuntimeError, OSError) as error:
            if lost := _lost_now(processes):
                raise lost from error
            raise Refusal(
                "crew",
                f"The {len(devices)} devices of this machine cannot work together ({error}).",
                "Write gpus: each into fastsd.yaml, so that one of them trains.",
            ) from error
        try:
            yield member
        except RuntimeError as error:
            # Where the others' end is noticed, it is only known that nobody answers.
            if lost := _lost_now(processes):
                raise lost from error
            raise
    finally:
        closing.set()
        watching.join()
        for process in processes:
            process.kill()  # they keep nothing
            process.join()
            process.close()
        if member:
            member.close()


def _lost(processes: Sequence[Any]) -> MemberLost | None:
    """What is to be said of members that ended by an error; None where there are none."""
    ended = [process.exitcode for process in processes if process.exitcode]
    if not ended:
        return None
    return MemberLost(
        f"One of the {len(processes) + 1} processes that share this training ended (exit code {ended[0]}); "
        "the worker's log says why."
    )


def _lost_now(processes: Sequence[Any]) -> MemberLost | None:
    """As ``_lost``, where a connection broke just now: a process that is dying is waited for.

    Its files are closed a while before its exit code can be asked for, under load a long while.
    """
    dying = connection.wait([process.sentinel for process in processes], _SIGN_SECONDS)
    ends = time.monotonic() + _DYING_SECONDS
    # Asked anew: when two threads ask for an exit code at once, one of them is told that there is none.
    while any(each.sentinel in dying and each.exitcode is None for each in processes) and time.monotonic() < ends:
        time.sleep(0.05)
    return _lost(processes)


def _watch(processes: Sequence[Any], closing: threading.Event, limit: Limit) -> None:
    """End the job a while after another member ended by an error: what waits for its numbers cannot be interrupted."""
    while not closing.wait(_LOOK_SECONDS):
        if lost := _lost(processes):
            with limit(_GRACE_SECONDS, lost):
                closing.wait()


def _serve(seat: Mapping[str, Any], follow: str, task: Mapping[str, Any], parent: int) -> None:
    """The life of a member that is not the first."""
    die_with(parent)
    # A wish to stop is the first one's to hear, also where all are told: it finishes the step with the others and saves
    # before it ends them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    from importlib import import_module

    module, _, function = follow.partition(":")
    with large_imports():
        found = import_module(module)
    getattr(found, function)(Member(**seat), seat["device"], task)
    sys.stdout.flush()
    sys.stderr.flush()
    # The work is done: what libraries do at their end, with the others still there, must not look like a failure.
    os._exit(0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
