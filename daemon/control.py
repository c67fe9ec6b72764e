"""The control socket: how the command line talks to a running daemon. One JSON object a line, each way.

A request is ``{"command": name, ...}``; the answer is ``{"ok": true, ...}`` or ``{"ok": false, "error": sentence}``.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)
Answer = dict[str, Any]
Command = Callable[[Mapping[str, Any]], Awaitable[Answer]]


async def serve(path: Path, commands: Mapping[str, Command]) -> asyncio.Server:
    """Listen for requests, as the one daemon of this root (the tree lock is held).

    Args:
        path: the socket's path; a left-over of a dead daemon is replaced.
        commands: what can be asked, by name.
    """

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            line = await reader.readline()
            if line:
                writer.write(json.dumps(await _reply(line, commands)).encode() + b"\n")
                await writer.drain()
        except (ConnectionError, ValueError):
            pass
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    path.unlink(missing_ok=True)
    server = await asyncio.start_unix_server(answer, path=path, limit=1 << 20)
    path.chmod(0o600)
    return server


async def _reply(line: bytes, commands: Mapping[str, Command]) -> Answer:
    try:
        request = json.loads(line)
        name = request["command"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {"ok": False, "error": "a request is one JSON object with a command"}
    if not isinstance(name, str) or name not in commands:
        return {"ok": False, "error": f"unknown command {name!r}"}
    try:
        return {"ok": True, **await commands[name](request)}
    except (LookupError, ValueError, OSError) as error:
        return {"ok": False, "error": str(error)}
    except Exception as error:
        # Whoever asked has to hear something; silence would read as "no daemon runs".
        log.exception("the command %s failed", name)
        return {"ok": False, "error": f"{type(error).__name__}: {error}"}
