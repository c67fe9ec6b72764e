"""The supervisor with real processes: the stand-in for a WebUI with its faults, and a daemon that is killed."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pytest

from daemon.services import leftovers
from daemon.services.crashes import CrashLoop
from daemon.services.webui import (
    Limits,
    State,
    WebUISupervisor,
    WhileTraining,
    child_environment,
    describe_exit,
    port_answers,
    working_folder,
)
from handlers.context import JobContext
from handlers.publish.ask import A1111Client
from handlers.publish.job import PublishHandler
from handlers.publish.prove import NotTaken
from tests.standins.running import command_of, free_port, until, webui, write_model

QUICK = Limits(
    start=20.0, poll=0.05, health=0.1, silence=1.0, idle=5.0, signal=0.5, crashes=CrashLoop(limit=3, first=0.05)
)


class House:
    """A supervisor in a temporary folder, and the states it went through."""

    def __init__(
        self, tmp_path: Path, *options: str, limits: Limits = QUICK, port: int | None = None, timeout: float = 0.5
    ) -> None:
        write_model(tmp_path / "models/a.safetensors", 1)
        self.port = port or free_port()
        self.tmp_path = tmp_path
        self.starts = tmp_path / "starts"
        self.states: list[State] = []
        self.mark = f"{tmp_path}:webui"
        self.client = A1111Client(f"http://127.0.0.1:{self.port}", timeout=timeout)
        self.supervisor = WebUISupervisor(
            command_of(self.port, tmp_path / "models", "--starts", str(self.starts), *options),
            self.client,
            tmp_path / "logs",
            self.mark,
            environment=os.environ,
            limits=limits,
            on_change=self.states.append,
        )

    @property
    def phases(self) -> list[str]:
        return [state.phase for state in self.states]

    def pids(self) -> list[int]:
        return [int(line) for line in self.starts.read_text().split()]


def play(house: House, scene: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a scene in an event loop, and leave nothing running behind it."""

    async def run() -> None:
        try:
            await asyncio.wait_for(scene(), 60)
        finally:
            await house.supervisor.kill()
        assert leftovers.marked(house.mark) == []

    asyncio.run(run())


async def soon(condition: Callable[[], Any]) -> None:
    await asyncio.to_thread(until, condition)


async def within(seconds: float, waited: Awaitable[State]) -> State:
    return await asyncio.wait_for(waited, seconds)


def children(process: int) -> list[int]:
    # By parent, not by /proc/*/task/*/children: a pool's thread may end in between.
    return [child.pid for child in psutil.Process(process).children()]


def lives(process: int) -> bool:
    return Path(f"/proc/{process}").exists()


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def test_starts_is_ready_when_the_api_answers_and_stops(tmp_path: Path) -> None:
    house = House(tmp_path, "--start-delay", "0.2", "--api-delay", "0.4")

    async def scene() -> None:
        await house.supervisor.start()
        await within(20, house.supervisor.until("ready"))
        assert await asyncio.to_thread(house.client.models)
        await house.supervisor.start()
        await house.supervisor.stop()
        assert port_is_free(house.port)

    play(house, scene)
    assert house.phases == ["starting", "ready", "stopping", "stopped"]
    assert len(house.pids()) == 1
    assert not lives(house.pids()[0])
    [log] = (tmp_path / "logs").iterdir()
    assert "Running on local URL" in log.read_text()


def test_the_event_loop_is_never_held_up(tmp_path: Path) -> None:
    hang = tmp_path / "hang"
    house = House(tmp_path, "--hang-file", str(hang), timeout=1.0)
    gaps: list[float] = []

    async def heartbeat() -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.01)
            gaps.append(time.monotonic() - before)

    async def scene() -> None:
        beating = asyncio.create_task(heartbeat())
        await house.supervisor.start()
        await within(20, house.supervisor.until("ready"))
        hang.touch()
        await asyncio.sleep(1.3)  # the client's timeout is 1 s: a question that blocks would show
        beating.cancel()

    play(house, scene)
    assert max(gaps) < 0.9


def test_two_crashes_at_start_and_then_fine(tmp_path: Path) -> None:
    house = House(tmp_path, "--crash-starts", "2")

    async def scene() -> None:
        await house.supervisor.start()
        await within(20, house.supervisor.until("ready"))

    play(house, scene)
    assert house.phases[:6] == ["starting", "crashed", "starting", "crashed", "starting", "ready"]
    assert house.states[1].reason.startswith(
        'The WebUI ended by itself with exit code 1. Its last words: "RuntimeError: Torch is not able to use GPU".'
    )


def test_gives_up_and_can_be_started_again(tmp_path: Path) -> None:
    house = House(tmp_path, "--crash-starts", "3")

    async def scene() -> None:
        await house.supervisor.start()
        state = await within(20, house.supervisor.until("given-up"))
        assert "It crashed 3 times in a row" in state.reason
        assert "start fastsd again" in state.reason
        await house.supervisor.start()
        await within(20, house.supervisor.until("ready"))

    play(house, scene)
    assert len(house.pids()) == 4


def test_a_command_that_does_not_exist_is_told(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.supervisor._command[0] = str(tmp_path / "nothing")

    async def scene() -> None:
        await house.supervisor.start()
        state = await within(20, house.supervisor.until("crashed"))
        assert "nothing cannot be started: No such file" in state.reason

    play(house, scene)


def test_never_answering_counts_as_a_crash(tmp_path: Path) -> None:
    limits = Limits(**{**vars(QUICK), "start": 0.5})
    house = House(tmp_path, "--api-delay", "600", limits=limits)

    async def scene() -> None:
        await house.supervisor.start()
        state = await within(20, house.supervisor.until("crashed"))
        assert "has not answered within 0.5 seconds of its start" in state.reason

    play(house, scene)


def test_a_hung_webui_is_started_again(tmp_path: Path) -> None:
    hang = tmp_path / "hang"
    house = House(tmp_path, "--hang-file", str(hang))

    async def scene() -> None:
        await house.supervisor.start()
        await within(20, house.supervisor.until("ready"))
        hang.touch()
        state = await within(20, house.supervisor.until("crashed"))
        assert "has not answered for 1 seconds" in state.reason
        hang.unlink()
        await within(20, house.supervisor.until("ready"))

    play(house, scene)
    assert len(house.pids()) == 2


def test_a_crash_while_it_runs_brings_it_back(tmp_path: Path) -> None:
    house = House(tmp_path)

    async def scene() -> None:
        await house.supervisor.start()
        await within(20, house.supervisor.until("ready"))
        os.kill(house.pids()[0], signal.SIGSEGV)
        state = await within(20, house.supervisor.until("crashed"))
        assert "signal SIGSEGV" in state.reason
        await within(20, house.supervisor.until("ready"))

    play(house, scene)


def test_stop_ends_what_ignores_signals_and_what_left_the_group(tmp_path: Path) -> None:
    house = House(tmp_path, "--ignore-signals", "--grandchild")

    async def scene() -> None:
        await house.supervisor.start()
        await within(20, house.supervisor.until("ready"))
        [grandchild] = children(house.pids()[0])
        await house.supervisor.stop()
        assert port_is_free(house.port)
        assert not lives(house.pids()[0])
        assert not lives(grandchild)

    play(house, scene)


def test_a_grandchild_that_holds_the_port_does_not_outlive_a_crash(tmp_path: Path) -> None:
    house = House(tmp_path, "--grandchild")

    async def scene() -> None:
        await house.supervisor.start()
        await within(20, house.supervisor.until("ready"))
        os.kill(house.pids()[0], signal.SIGKILL)
        await within(20, house.supervisor.until("crashed"))
        await within(20, house.supervisor.until("ready"))

    play(house, scene)
    assert len(house.pids()) == 2


def test_stop_waits_for_the_picture(tmp_path: Path) -> None:
    house = House(tmp_path, "--picture-seconds", "1")
    pictures: list[bytes] = []

    def draw() -> None:
        client = A1111Client(house.client.url)
        pictures.append(client.txt2img("x", steps=1, width=64, height=64, seed=1).content)

    async def scene() -> None:
        await house.supervisor.start()
        await within(20, house.supervisor.until("ready"))
        drawing = Thread(target=draw)
        drawing.start()
        await soon(lambda: not house.client.idle())
        await house.supervisor.stop()
        await asyncio.to_thread(drawing.join)

    play(house, scene)
    assert pictures


def test_makes_room_for_training_and_comes_back(tmp_path: Path) -> None:
    house = House(tmp_path)

    async def scene() -> None:
        await house.supervisor.start()
        await within(20, house.supervisor.until("ready"))
        ways: tuple[WhileTraining, ...] = ("keep", "unload")
        for way in ways:
            await house.supervisor.yield_gpu(way)
            assert house.phases == ["starting", "ready"]
            await house.supervisor.resume()
        await house.supervisor.yield_gpu("stop")
        assert house.phases == ["starting", "ready", "stopping", "stopped"]
        assert "room for a training" in house.states[-1].reason
        assert port_is_free(house.port)
        await house.supervisor.resume()
        await within(20, house.supervisor.until("ready"))
        await house.supervisor.resume()

    play(house, scene)
    assert len(house.pids()) == 2


def test_what_is_stopped_stays_stopped_after_a_training(tmp_path: Path) -> None:
    house = House(tmp_path)

    async def scene() -> None:
        await house.supervisor.yield_gpu("stop")
        await house.supervisor.resume()
        assert house.supervisor.state.phase == "stopped"

    play(house, scene)
    assert not house.starts.exists()


def test_somebody_elses_webui_is_used_and_left_alone(tmp_path: Path) -> None:
    with webui(tmp_path / "theirs") as server:
        house = House(tmp_path, port=int(server.url.rsplit(":", 1)[1]))

        async def scene() -> None:
            await house.supervisor.start()
            state = await within(20, house.supervisor.until("ready"))
            assert not state.ours
            assert "did not start" in state.reason
            await house.supervisor.yield_gpu("stop")
            await house.supervisor.stop()
            assert "still answers" in house.supervisor.state.reason

        play(house, scene)
        assert server.client.ready()
        assert not house.starts.exists()


def test_takes_over_when_somebody_elses_webui_goes(tmp_path: Path) -> None:
    with webui(tmp_path / "theirs") as server:
        house = House(tmp_path, port=int(server.url.rsplit(":", 1)[1]))

        async def scene() -> None:
            await house.supervisor.start()
            await within(20, house.supervisor.until("ready"))
            server.process.kill()
            await soon(house.starts.exists)
            await soon(lambda: house.supervisor.state == State("ready"))

        play(house, scene)


def test_another_program_on_the_port_blocks(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        house = House(tmp_path, port=other.getsockname()[1])

        async def scene() -> None:
            await house.supervisor.start()
            state = await within(20, house.supervisor.until("blocked"))
            assert "end it, or set webui.url" in state.reason

        play(house, scene)
    assert not house.starts.exists()


def test_keeps_the_last_five_logs(tmp_path: Path) -> None:
    limits = Limits(**{**vars(QUICK), "crashes": CrashLoop(limit=8, first=0.01, longest=0.01)})
    house = House(tmp_path, "--crash-starts", "100", limits=limits)

    async def scene() -> None:
        await house.supervisor.start()
        await within(30, house.supervisor.until("given-up"))

    play(house, scene)
    assert len(list((tmp_path / "logs").iterdir())) == 5
    assert len(house.pids()) == 8


@pytest.mark.parametrize("options", [(), ("--lazy",)], ids=["a1111", "forge"])
def test_a_model_that_crashes_the_webui_is_taken_back_and_the_webui_lives(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    """The publish job and the supervisor together: one says what to serve, the other that it is served."""
    settings = ("--settings", str(tmp_path / "config.json"))
    house = House(tmp_path, "--crash-on-load", "cat", *settings, *options)
    model = write_model(tmp_path / "tree/cat-1.safetensors", 2)
    webui_settings = {"kind": "auto", "url": house.client.url, "models": str(tmp_path / "models"), "switch": "always"}
    payload = {"model": str(model), "name": "cat", "run": "1", "webui": webui_settings}
    context = JobContext(
        *(1, "publish", payload, "cpu", tmp_path),
        report=lambda *_: None,
        is_cancelled=lambda: False,
        is_stopping=lambda: False,
    )

    async def scene() -> None:
        await house.supervisor.start()
        await within(20, house.supervisor.until("ready"))
        await asyncio.to_thread(house.client.switch, "a")
        with pytest.raises(NotTaken, match="It has its previous model again, a; its log says more"):
            await asyncio.to_thread(PublishHandler().run, context)
        await within(20, house.supervisor.until("ready"))
        chosen = await asyncio.to_thread(house.client.chosen)
        assert chosen is not None
        assert chosen.startswith("a.safetensors")

    play(house, scene)
    assert len(house.pids()) == 2


DAEMON = """
    import asyncio, os, sys
    from pathlib import Path
    from daemon.services.webui import Limits, WebUISupervisor
    from handlers.publish.ask import A1111Client

    async def main(url, logs, mark, *command):
        supervisor = WebUISupervisor(command, A1111Client(url), Path(logs), mark, environment=os.environ,
                                     limits=Limits(poll=0.05, signal=0.5))
        await supervisor.start()
        await supervisor.until("ready")
        print("ready", flush=True)
        await asyncio.Event().wait()

    asyncio.run(main(*sys.argv[1:]))
"""


@pytest.fixture
def daemon_with_webui(tmp_path: Path) -> Any:
    """A process that supervises a stand-in that ignores signals and has a grandchild. Gives (process, port, mark)."""
    write_model(tmp_path / "models/a.safetensors", 1)
    port, mark = free_port(), f"{tmp_path}:webui"
    command = command_of(port, tmp_path / "models", "--ignore-signals", "--grandchild")
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(DAEMON), url, str(tmp_path / "logs"), mark, *command],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        yield process, port, mark
    finally:
        process.kill()
        process.communicate()
        leftovers.end(mark, 0.0)


def test_kill_9_of_the_daemon_leaves_no_orphan(daemon_with_webui: Any) -> None:
    process, port, mark = daemon_with_webui
    assert len(leftovers.marked(mark)) == 3  # guardian, WebUI, grandchild
    os.killpg(process.pid, signal.SIGKILL)
    until(lambda: leftovers.marked(mark) == [], what="the end of all that the daemon started")
    assert port_is_free(port)


def test_leftovers_of_a_dead_guardian_are_ended_at_the_next_start(daemon_with_webui: Any, tmp_path: Path) -> None:
    process, port, mark = daemon_with_webui
    [guardian] = children(process.pid)
    process.send_signal(signal.SIGSTOP)  # so that it is no help
    os.kill(guardian, signal.SIGKILL)
    until(lambda: len(leftovers.marked(mark)) == 1, what="the end of the WebUI with its guardian")
    process.kill()
    process.wait()
    assert not port_is_free(port)
    house = House(tmp_path, port=port)
    assert house.mark == mark

    async def scene() -> None:
        await house.supervisor.start()
        state = await within(20, house.supervisor.until("ready"))
        assert state.ours

    play(house, scene)


def test_only_marked_processes_are_ended(tmp_path: Path) -> None:
    def sleeper(mark: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, leftovers.MARK: mark}
        return subprocess.Popen([sys.executable, "-c", "input()"], env=environment, stdin=subprocess.PIPE)

    ours, theirs = sleeper(f"{tmp_path}:webui"), sleeper(f"{tmp_path}:webui-2")
    try:
        until(lambda: leftovers.marked(f"{tmp_path}:webui") == [ours.pid])
        assert leftovers.end(f"{tmp_path}:webui") == 1
        assert ours.wait(5) == -signal.SIGTERM
        assert theirs.poll() is None
        assert leftovers.end(f"{tmp_path}:webui") == 0
    finally:
        for process in (ours, theirs):
            process.kill()
            process.communicate()


def test_environment_of_the_child() -> None:
    daemons = {"PATH": "/bin", "NOTIFY_SOCKET": "@x", "FASTSD_WEBUI_AUTH": "ann:secret", "CUDA_VISIBLE_DEVICES": "1"}
    child = child_environment(daemons, "mark")
    assert child == {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "1", "PYTHONUNBUFFERED": "1", "FASTSD_SERVICE": "mark"}


def test_small_things(tmp_path: Path) -> None:
    script = tmp_path / "launch.py"
    script.touch()
    assert working_folder(["python", "-u", str(script), "--api"]) == tmp_path
    assert working_folder(["python", "launch.py", "--ckpt-dir", str(tmp_path)]) is None
    assert describe_exit(139) == "signal SIGSEGV"
    assert describe_exit(1) == "exit code 1"
    assert describe_exit(255) == "exit code 255"
    assert not port_answers(f"http://127.0.0.1:{free_port()}")
