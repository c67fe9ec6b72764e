"""The command line's side of the control socket (``daemon.control``), without asyncio: it must answer in a blink."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

Answer = dict[str, Any]


class NoDaemon(Exception):  # noqa: N818 - it says what is the case
    """Nobody listens on the control socket."""


def ask(path: Path, command: str, timeout: float = 10.0, **parameters: Any) -> Answer:
    """Ask a running daemon.

    Raises:
        NoDaemon: nobody listens there.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout)
            connection.connect(str(path))
            connection.sendall(json.dumps({"command": command, **parameters}).encode() + b"\n")
            with connection.makefile("rb") as reader:
                line = reader.readline()
    except OSError as error:
        raise NoDaemon from error
    if not line.endswith(b"\n"):
        raise NoDaemon  # it ended while it answered
    answer: Answer = json.loads(line)
    return answer
