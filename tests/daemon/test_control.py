"""The control socket: real connections, good and bad."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from daemon import control
from daemon.client import NoDaemon, ask


class Listening:
    """A control server in a thread of its own, as the daemon's loop would have it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.loop = asyncio.new_event_loop()
        self.held = asyncio.Event()
        self._server = self.loop.run_until_complete(
            control.serve(path, {"echo": self.echo, "fail": self.fail, "crash": self.crash, "hold": self.hold}),
        )
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()

    async def echo(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return {"said": request.get("word")}

    async def fail(self, _: Mapping[str, Any]) -> dict[str, Any]:
        message = "There is no such job."
        raise LookupError(message)

    async def crash(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return {"number": int(request["number"])}

    async def hold(self, _: Mapping[str, Any]) -> dict[str, Any]:
        await self.held.wait()
        return {"held": True}

    def call(self, function: Callable[[], object]) -> None:
        self.loop.call_soon_threadsafe(function)

    def close(self) -> None:
        self.call(self._server.close)
        self.call(self.held.set)

        def stop() -> None:
            if len(asyncio.all_tasks(self.loop)) > 0:
                self.loop.call_later(0.01, stop)
            else:
                self.loop.stop()

        self.call(stop)
        self._thread.join(10)
        self.loop.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Listening]:
    made = Listening(tmp_path / "control.sock")
    yield made
    made.close()


def raw(path: Path, content: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(path))
        connection.sendall(content)
        connection.shutdown(socket.SHUT_WR)
        with connection.makefile("rb") as reader:
            return reader.read()


def test_a_request_is_answered(server: Listening) -> None:
    assert ask(server.path, "echo", word="grüße\udce9") == {"ok": True, "said": "grüße\udce9"}


def test_only_the_owner_may_ask(server: Listening) -> None:
    assert stat.S_IMODE(server.path.stat().st_mode) == 0o600


def test_an_unknown_command_is_named(server: Listening) -> None:
    answer = ask(server.path, "dance")
    assert not answer["ok"]
    assert "'dance'" in answer["error"]


def test_a_command_that_fails_says_why(server: Listening) -> None:
    assert ask(server.path, "fail") == {"ok": False, "error": "There is no such job."}


@pytest.mark.parametrize("number", [None, [], "x"])
def test_a_command_that_crashes_is_answered_too(server: Listening, number: object) -> None:
    answer = ask(server.path, "crash", number=number)
    assert not answer["ok"]
    assert answer["error"]


@pytest.mark.parametrize(
    "garbage",
    [
        b"hello\n",
        b"[]\n",
        b"{}\n",
        b"42\n",
        b"\xff\xfe\n",
        b'{"command": []}\n',
        b'{"command": null}\n',
        b"[" * 100_000 + b"\n",
    ],
)
def test_garbage_is_answered_and_does_no_harm(server: Listening, garbage: bytes) -> None:
    assert json.loads(raw(server.path, garbage))["ok"] is False
    assert ask(server.path, "echo", word=1)["said"] == 1


@pytest.mark.parametrize("content", [b"", b"{", b"x" * (3 << 20)])
def test_an_unfinished_or_endless_request_does_no_harm(server: Listening, content: bytes) -> None:
    with suppress(OSError):  # it may hang up on us
        raw(server.path, content)
    assert ask(server.path, "echo", word=1)["said"] == 1


def test_a_client_that_hangs_up_does_no_harm(server: Listening) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(server.path))
        connection.sendall(b'{"command": "hold"}\n')
    server.call(server.held.set)
    assert ask(server.path, "echo", word=1)["said"] == 1


def test_two_clients_are_answered_at_once(server: Listening) -> None:
    answers: list[dict[str, Any]] = []
    first = threading.Thread(target=lambda: answers.append(ask(server.path, "hold")))
    first.start()
    assert ask(server.path, "echo", word="second")["said"] == "second"
    assert answers == [], "the first still waits"
    server.call(server.held.set)
    first.join(10)
    assert answers == [{"ok": True, "held": True}]


def test_a_long_answer_arrives_whole(server: Listening) -> None:
    word = "x" * 500_000
    assert ask(server.path, "echo", word=word)["said"] == word


def test_the_socket_of_a_dead_daemon_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with pytest.raises(NoDaemon):
        ask(path, "echo")
    server = Listening(path)
    assert ask(path, "echo", word=1)["said"] == 1
    server.close()


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(NoDaemon):
        ask(tmp_path / "none.sock", "status")


@pytest.mark.parametrize("answer", [b"", b'{"ok": tr'])
def test_a_daemon_that_dies_while_it_answers_is_no_daemon(tmp_path: Path, answer: bytes) -> None:
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(path))
        listener.listen()

        def die() -> None:
            connection, _ = listener.accept()
            connection.recv(1000)
            connection.sendall(answer)
            connection.close()

        thread = threading.Thread(target=die)
        thread.start()
        with pytest.raises(NoDaemon):
            ask(path, "status")
        thread.join(10)
