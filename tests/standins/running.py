"""Starting the stand-in for a WebUI as a process of its own, and small model files for it to load."""

from __future__ import annotations

import json
import random
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handlers.publish.ask import A1111Client

SCRIPT = Path(__file__).with_name("webui.py")


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def until(condition: Callable[[], Any], seconds: float = 30.0, what: str = "the condition") -> None:
    """Wait for a condition; fail when the time is over."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not come within {seconds:g} s")
        time.sleep(0.02)


def write_model(path: Path, seed: int) -> Path:
    """A real safetensors file with one tensor of random numbers."""
    content = random.Random(seed).randbytes(64)
    header = json.dumps({"weight": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}}).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(header)) + header + content)
    return path


def write_tensors(path: Path, names: Mapping[str, int], metadata: Mapping[str, str] | None = None) -> Path:
    """A real safetensors file: name → how many float32 numbers."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, count in names.items():
        table[name] = {"dtype": "F32", "shape": [count], "data_offsets": [end, end + 4 * count]}
        end += 4 * count
    header = json.dumps(table).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(end))
    return path


def command_of(port: int, models: Path, *options: str) -> list[str]:
    """The command line of a stand-in."""
    return [sys.executable, "-u", str(SCRIPT), "--port", str(port), "--models", str(models), *options]


@dataclass
class Running:
    """A stand-in that runs.

    Attributes:
        client: asks it.
        models: its model folder.
        process: it.
    """

    client: A1111Client
    models: Path
    process: subprocess.Popen[str]

    @property
    def url(self) -> str:
        return self.client.url


@contextmanager
def webui(models: Path, *options: str, port: int | None = None, wait: bool = True) -> Iterator[Running]:
    """A stand-in on a free port, ended with the block. ``wait``: until its API answers."""
    models.mkdir(parents=True, exist_ok=True)
    port = port or free_port()
    process = subprocess.Popen(
        command_of(port, models, *options), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    client = A1111Client(f"http://127.0.0.1:{port}", timeout=5.0)
    try:
        if wait:
            until(lambda: process.poll() is not None or client.ready(), what="the stand-in's API")
            assert process.poll() is None, process.stdout and process.stdout.read()
        yield Running(client, models, process)
    finally:
        process.kill()
        process.communicate()
