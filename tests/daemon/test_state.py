"""The state folder: where it is, who holds its tree, and a socket that fits."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from daemon.state import State, TreeIsHeld, TreeLock, cache_home, state_home

REPOSITORY = Path(__file__).resolve().parents[2]
HOLD = """
import os, sys
from pathlib import Path
from daemon.state import State, TreeLock
state = State.of(Path(sys.argv[1]), os.environ)
state.prepare()
with TreeLock(state):
    print("held", flush=True)
    sys.stdin.read()
"""


def state_of(tmp_path: Path, home: str = "state") -> State:
    (tmp_path / "tree").mkdir(exist_ok=True)
    state = State.of(tmp_path / "tree", {"FASTSD_STATE": os.fspath(tmp_path / home)})
    state.prepare()
    return state


def holder(tmp_path: Path, home: str = "state") -> subprocess.Popen[str]:
    """A process that holds the tree."""
    (tmp_path / "tree").mkdir(exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, os.fspath(tmp_path / "tree")],
        env={**os.environ, "FASTSD_STATE": os.fspath(tmp_path / home)},
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


@pytest.mark.parametrize(
    ("environment", "state", "cache"),
    [
        ({"FASTSD_STATE": "/s", "XDG_STATE_HOME": "/x", "HOME": "/h"}, "/s", "/s/cache"),
        ({"XDG_STATE_HOME": "/x", "XDG_CACHE_HOME": "/c", "HOME": "/h"}, "/x/fastsd", "/c/fastsd"),
        ({"HOME": "/h"}, "/h/.local/state/fastsd", "/h/.cache/fastsd"),
        ({"FASTSD_STATE": "", "XDG_STATE_HOME": "", "HOME": "/h"}, "/h/.local/state/fastsd", "/h/.cache/fastsd"),
    ],
)
def test_where_things_are_kept(environment: dict[str, str], state: str, cache: str) -> None:
    assert state_home(environment) == Path(state)
    assert cache_home(environment) == Path(cache)


def test_a_root_has_one_state_however_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "tree")
    environment = {"FASTSD_STATE": os.fspath(tmp_path / "state")}
    folders = {State.of(tmp_path / name, environment).folder for name in ("tree", "link", "tree/../tree")}
    assert len(folders) == 1
    assert State.of(tmp_path / "other", environment).folder not in folders


def test_roots_of_one_name_have_states_of_their_own(tmp_path: Path) -> None:
    environment = {"FASTSD_STATE": os.fspath(tmp_path)}
    assert State.of(Path("/a/tree"), environment).folder != State.of(Path("/b/tree"), environment).folder


def test_all_known_roots_are_found_again(tmp_path: Path) -> None:
    environment = {"FASTSD_STATE": os.fspath(tmp_path / "state")}
    roots = [tmp_path / "one", tmp_path / os.fsdecode(b"caf\xe9 \n")]
    for root in roots:
        root.mkdir()
        State.of(root, environment).prepare()
    (tmp_path / "state/torn").mkdir()
    (tmp_path / "state/torn/root.json").write_text('{"root": "/ha')
    (tmp_path / "state/odd").mkdir()
    (tmp_path / "state/odd/root.json").write_text("[]")
    assert {state.root for state in State.all(environment)} == set(roots)
    assert {state.folder for state in State.all(environment)} == {State.of(root, environment).folder for root in roots}


def test_the_folder_is_its_owners_alone(tmp_path: Path) -> None:
    state = state_of(tmp_path)
    assert state.folder.stat().st_mode & 0o077 == 0


def test_the_lock_names_its_holder(tmp_path: Path) -> None:
    state, process = state_of(tmp_path), holder(tmp_path)
    try:
        with pytest.raises(TreeIsHeld) as caught, TreeLock(state):
            pass
        assert caught.value.holder["pid"] == process.pid
        assert caught.value.holder["host"] == socket.gethostname()
        assert f"process {process.pid} on {socket.gethostname()}" in str(caught.value)
        assert "fastsd status" in str(caught.value)
    finally:
        end(process)


def test_kill_minus_nine_releases_the_lock(tmp_path: Path) -> None:
    state, process = state_of(tmp_path), holder(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with TreeLock(state):
        assert json.loads((state.folder / "lock").read_bytes())["pid"] == os.getpid()
    with TreeLock(state):
        pass


def test_a_refused_lock_leaves_the_holders_alone(tmp_path: Path) -> None:
    state, process = state_of(tmp_path), holder(tmp_path)
    try:
        for _ in range(2):
            with pytest.raises(TreeIsHeld, match=str(process.pid)), TreeLock(state):
                pass
    finally:
        end(process)


def test_a_second_daemon_with_another_state_folder_is_found_out(tmp_path: Path) -> None:
    (tmp_path / "tree" / "Sessions").mkdir(parents=True)
    process = holder(tmp_path, "elsewhere")
    try:
        with pytest.raises(TreeIsHeld, match=str(process.pid)), TreeLock(state_of(tmp_path)):
            pass
    finally:
        end(process)
    with TreeLock(state_of(tmp_path)):
        pass


def test_nothing_is_left_in_a_root_that_may_be_an_unmounted_mount_point(tmp_path: Path) -> None:
    with TreeLock(state_of(tmp_path)):
        assert not list((tmp_path / "tree").iterdir())


@pytest.mark.parametrize("length", [20, 60, 80, 120, 200])
def test_however_long_the_path_is_the_socket_can_be_bound(tmp_path: Path, length: int) -> None:
    state = state_of(tmp_path, "s" * length)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(state.socket))
        try:
            listener.listen()
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(os.fspath(state.socket))
        finally:
            state.socket.unlink()


def test_the_longest_path_that_fits_is_used(tmp_path: Path) -> None:
    empty = len(os.fsencode(State(tmp_path, tmp_path / "x").socket))
    fits = State(tmp_path, tmp_path / ("x" * (1 + 107 - empty)))
    longer = State(tmp_path, tmp_path / ("x" * (2 + 107 - empty)))
    assert fits.socket.parent == fits.folder
    assert longer.socket.parent != longer.folder
    assert longer.socket != State(tmp_path, longer.folder.with_name("y" * 200)).socket
    fits.folder.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(fits.socket))


def test_two_long_states_have_two_sockets(tmp_path: Path) -> None:
    assert state_of(tmp_path, "a" * 200).socket != state_of(tmp_path, "b" * 200).socket
