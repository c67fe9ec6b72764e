"""The command line as its users have it: processes, exit codes, sentences; and how little it loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon.cli import build_parser
from daemon.jobs import JobRequest
from daemon.queue import Queue
from daemon.state import State
from tests.daemon.test_control import Listening

REPOSITORY = Path(__file__).resolve().parents[2]
# What only a daemon or a worker needs, and what takes long to load.
HEAVY = {
    *("torch", "numpy", "PIL", "cv2", "diffusers", "transformers", "accelerate", "googleapiclient", "huggingface_hub"),
    *("pydantic", "yaml", "asyncio", "watchdog", "apscheduler", "rich", "sqlite3", "http", "ssl", "logging"),
}
# `python -c "import argparse, json, pathlib, socket, hashlib"` loads about a hundred modules itself.
MOST_MODULES = 150
LIST_MODULES = """
import json, os, sys
from daemon.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as left:
    code = left.code
sys.stdout.flush()
print(json.dumps([code, sorted(sys.modules)]), file=sys.stderr)
"""


class Console:
    """A user with a state folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "tree"
        self.root.mkdir()
        self.environment = {**os.environ, "FASTSD_STATE": os.fspath(folder / "state"), "OMP_NUM_THREADS": "1"}

    @property
    def state(self) -> State:
        return State.of(self.root, self.environment)

    def run(self, *arguments: str | Path, code: str = "") -> subprocess.CompletedProcess[str]:
        command = ["-c", code] if code else ["-m", "daemon"]
        return subprocess.run(
            [sys.executable, *command, *(os.fspath(argument) for argument in arguments)],
            env={**self.environment, "PYTHONPATH": os.fspath(REPOSITORY)},
            cwd=self.root,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
            timeout=120,
            check=False,
        )


@pytest.fixture
def console(tmp_path: Path) -> Console:
    return Console(tmp_path)


@pytest.fixture
def server(console: Console) -> Iterator[Listening]:
    """Something that answers in the daemon's place, though it knows other commands."""
    console.state.prepare()
    made = Listening(console.state.socket)
    yield made
    made.close()


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["status"], ["status", "--json"], ["status", "--help"], ["up", "--help"], ["--version"]],
    ids=" ".join,
)
@pytest.mark.parametrize("known", [False, True], ids=["no tree", "a tree"])
def test_what_answers_in_a_blink_loads_little(console: Console, arguments: list[str], known: bool) -> None:
    if known:
        console.state.prepare()
        console.state.snapshot.write_text(json.dumps({"root": str(console.root), "sessions": [], "at": "yesterday"}))
    done = console.run(*arguments, code=LIST_MODULES)
    code, modules = json.loads(done.stderr.splitlines()[-1])
    assert code in (0, None)
    assert done.stdout or arguments == ["status", "--json"]
    assert HEAVY & {name.partition(".")[0] for name in modules} == set()
    assert len(modules) <= MOST_MODULES


def test_every_command_can_be_opened(console: Console) -> None:
    """Its module is there and has the function that the parser names."""
    parser = build_parser()
    samples = {
        "up": [],
        "demo": [],
        "init": ["x"],
        "doctor": [],
        "status": [],
        "jobs": [],
        "retry": [],
        "cancel": ["1"],
        "pause": [],
        "resume": [],
        "logs": [],
        "crop": ["x", "--out", "y"],
        "caption": ["x", "--out", "y"],
        "train": ["x"],
        "convert": ["x", "y"],
        "inspect": ["x"],
        "models": ["list"],
        "service": ["install", "x"],
    }
    import importlib

    for name, arguments in samples.items():
        module, function = parser.parse_args([name, *arguments]).room.split(":")
        assert callable(getattr(importlib.import_module(f"daemon.commands.{module}"), function)), name


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["dance"],
        ["up", "a", "b"],
        ["cancel"],
        ["cancel", "one"],
        ["crop", "x.jpg"],
        ["models"],
        ["service", "restart"],
        ["status", "--xml"],
        ["convert", "a", "b", "--dtype", "int1"],
    ],
    ids=" ".join,
)
def test_wrong_use_says_where_help_is(console: Console, arguments: list[str]) -> None:
    done = console.run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "--help" in done.stderr
    assert "Traceback" not in done.stderr


def test_bad_settings_are_told_with_their_own_code(console: Console) -> None:
    (console.root / "fastsd.yaml").write_text("base: auto\ncaptoiner: x\n")
    done = console.run("up", console.root, "--once")
    assert done.returncode == 78
    assert "line 2" in done.stderr
    assert "Did you mean `captioner`?" in done.stderr
    assert "(line 2)" in (console.root / "fastsd.yaml.error.txt").read_text()
    assert console.run("train", console.root).returncode == 78


def test_a_settings_file_that_is_not_there_is_told(console: Console) -> None:
    done = console.run("up", console.root, "--config", "nowhere.yaml")
    assert done.returncode == 78
    assert "--config" in done.stderr


def test_a_root_that_is_not_there_is_told(console: Console) -> None:
    done = console.run("up", console.root / "nowhere")
    assert done.returncode == 1
    assert "fastsd init" in done.stderr


def test_status_without_a_daemon_is_no_failure(console: Console) -> None:
    nothing = console.run("status")
    assert (nothing.returncode, nothing.stderr) == (0, "")
    assert "fastsd up" in nothing.stdout
    assert console.run("status", "--json").stdout == ""
    named = console.run("status", console.root)
    assert named.returncode == 0
    assert f"fastsd up {console.root}" in named.stdout
    value = json.loads(console.run("status", "--json", console.root).stdout)
    assert (value["root"], value["running"]) == (str(console.root), False)


@pytest.mark.parametrize("content", ["", "{", "[]", '"x"', "null"])
def test_a_damaged_snapshot_is_passed_over(console: Console, content: str) -> None:
    console.state.prepare()
    console.state.snapshot.write_text(content)
    done = console.run("status")
    assert (done.returncode, done.stderr) == (0, "")
    assert str(console.root) in done.stdout


def test_status_shows_what_the_daemon_said_last(console: Console) -> None:
    console.state.prepare()
    counts = {"pictures": 3, "cropped": 2, "captioned": 1}
    session = {"name": "caf\udce9", "state": "idle", "waits": ["for \udce9"], **counts}
    snapshot = {"root": str(console.root), "at": "2026-01-02", "sessions": [session]}
    console.state.snapshot.write_text(json.dumps(snapshot))
    done = console.run("status")
    assert done.returncode == 0, done.stderr
    assert "last seen 2026-01-02" in done.stdout
    assert "2 of 3 cropped, 1 captioned" in done.stdout
    assert "caf" in done.stdout


def test_a_daemon_that_cannot_answer_is_shown_as_one_that_runs(console: Console, server: Listening) -> None:
    done = console.run("status")
    assert done.returncode == 0, done.stderr
    assert "unknown command 'status'" in done.stdout


@pytest.mark.parametrize("command", [["retry"], ["retry", "1"], ["cancel", "1"], ["pause"], ["resume"]], ids=" ".join)
def test_commands_to_a_daemon_that_does_not_run(console: Console, command: list[str]) -> None:
    done = console.run(*command)
    assert done.returncode == 1
    assert "No tree has been watched" in done.stderr
    console.state.prepare()
    done = console.run(*command)
    assert done.returncode == 1
    assert f"No daemon watches {console.root}. Start one with: fastsd up" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_a_daemon_refuses_is_told(console: Console, server: Listening) -> None:
    done = console.run("pause")
    assert done.returncode == 1
    assert "unknown command 'pause'" in done.stderr


def test_jobs_without_a_daemon_come_from_its_file(console: Console) -> None:
    assert console.run("jobs").returncode == 2
    console.state.prepare()
    assert "No jobs" in console.run("jobs").stdout
    with Queue(console.state.queue) as queue:
        queue.put([JobRequest("1", "crop", "s", "x\udce9.jpg"), JobRequest("2", "train", "s", "run 1")], 1.0)
        job = queue.claim("cpu", ["crop"], 1, 1.0)[0]
        queue.done(job, 2.0)
    rows = [json.loads(line) for line in console.run("jobs", "--json").stdout.splitlines()]
    assert [(row["kind"], row["state"]) for row in rows] == [("train", "ready")]
    rows = [json.loads(line) for line in console.run("jobs", "--json", "--all").stdout.splitlines()]
    assert {row["subject"] for row in rows} == {"run 1", "x\udce9.jpg"}
    assert "crop" in console.run("jobs", "--all").stdout


def test_the_tree_that_is_meant_is_the_one_around_us(console: Console, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for root in (console.root, other):
        State.of(root, console.environment).prepare()
    assert f"No daemon watches {console.root}" in console.run("pause").stderr
    console.root = tmp_path
    done = console.run("pause")
    assert "say which one" in done.stderr
    assert str(other) in done.stderr


def test_logs(console: Console) -> None:
    assert console.run("logs").returncode == 2
    console.state.prepare()
    done = console.run("logs")
    assert (done.returncode, "There is no log yet" in done.stderr) == (1, True)
    (console.state.logs / "daemon.log").write_bytes(b"".join(b"line %d \xff\n" % number for number in range(100)))
    assert console.run("logs", "-n", "3").stdout.splitlines()[0].startswith("line 97")
    assert len(console.run("logs").stdout.splitlines()) == 50
    for number in ("0", "-1"):
        done = console.run("logs", "-n", number)
        assert (done.returncode, done.stdout) == (0, "")


def test_a_log_is_followed_into_the_next_file(console: Console) -> None:
    console.state.prepare()
    log = console.state.logs / "daemon.log"
    log.write_text("first\n")
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "daemon", "logs", "-f"],
        env={**console.environment, "PYTHONPATH": os.fspath(REPOSITORY)},
        cwd=console.root,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "first\n"
        with log.open("a") as writer:
            writer.write("second\n")
        assert process.stdout.readline() == "second\n"
        log.rename(log.with_name("daemon.log.1"))
        log.write_text("third\n")
        assert process.stdout.readline() == "third\n"
    finally:
        process.kill()
        process.communicate()


def test_the_reader_of_the_output_may_go_away(console: Console) -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m daemon --help | head -1; exit ${{PIPESTATUS[0]}}"],
        env={**console.environment, "PYTHONPATH": os.fspath(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def test_init_makes_a_tree_and_touches_nothing_that_is_there(console: Console, tmp_path: Path) -> None:
    root = tmp_path / "new"
    assert console.run("init", root).returncode == 0
    assert (root / "Models").is_dir()
    settings = root / "fastsd.yaml"
    example = root / "Sessions/my first model/train.example.yaml"
    assert settings.read_text().startswith("# fastsd.yaml")
    assert example.exists()
    settings.write_text("base: miniature\n")
    example.write_text("mine\n")
    assert console.run("init", root).returncode == 0
    assert (settings.read_text(), example.read_text()) == ("base: miniature\n", "mine\n")
    (tmp_path / "file").write_text("")
    done = console.run("init", tmp_path / "file")
    assert done.returncode == 1
    assert "Choose a folder" in done.stderr
