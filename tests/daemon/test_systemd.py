"""The notification protocol against real sockets, and the unit against systemd's own tools where they are installed."""

import configparser
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from daemon.cli import main
from daemon.commands.service import unit_for
from daemon.config import Settings, WebUIKeys
from daemon.install import NAME, Unit, install_unit, render_unit, uninstall_unit
from daemon.systemd import Notifier
from sessions.refusal import Refusal

REPOSITORY = Path(__file__).parents[2]
ANALYZE = shutil.which("systemd-analyze")

SYSTEM = Unit(
    "system",
    command=Path("/usr/local/bin/fastsd"),
    root=Path("/srv/fast-dreambooth"),
    state=Path("/var/lib/fastsd"),
    secrets=Path("/etc/fastsd/environment"),
    user="fastsd",
    writable=(Path("/srv/webui/models/Stable-diffusion"), Path("/srv/webui/models/Lora")),
)
USER = Unit(
    "user",
    command=Path("/home/ann/fastsd/.venv/bin/fastsd"),
    root=Path("/home/ann/Fast-Dreambooth"),
    state=None,
    secrets=Path("/home/ann/.config/fastsd/environment"),
)


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest) -> Iterator[tuple[str, socket.socket]]:
    """The receiving end of a notification socket, and what NOTIFY_SOCKET says."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.settimeout(5)
        address = f"{folder}/notify" if request.param == "path" else f"@{folder}/notify"
        channel.bind(address.replace("@", "\0"))
        yield address, channel


def test_says_what_systemd_wants_to_hear(manager: tuple[str, socket.socket]) -> None:
    address, channel = manager
    notifier = Notifier({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "60000000", "WATCHDOG_PID": str(os.getpid())})
    assert notifier.ping_every == 30.0
    notifier.ready("watching Fäst\nDreambooth")
    assert channel.recv(4096).decode() == "READY=1\nSTATUS=watching Fäst Dreambooth"
    notifier.status("training cat")
    notifier.status("training cat")
    notifier.alive()
    assert channel.recv(4096) == b"STATUS=training cat"
    assert channel.recv(4096) == b"WATCHDOG=1", "the same status is not sent again"
    notifier.extend(1.5)
    assert channel.recv(4096) == b"EXTEND_TIMEOUT_USEC=1500000"
    notifier.stopping(200.0, "saving")
    assert channel.recv(4096) == b"STOPPING=1\nEXTEND_TIMEOUT_USEC=200000000\nSTATUS=saving"


def test_is_silent_without_systemd_and_survives_its_absence(tmp_path: Path) -> None:
    for environment in ({}, {"NOTIFY_SOCKET": str(tmp_path / "gone")}, {"WATCHDOG_USEC": "60000000"}):
        notifier = Notifier(environment)
        notifier.ready("x")
        notifier.alive()
        assert notifier.ping_every is None


def test_a_manager_that_does_not_read_does_not_stop_the_work(manager: tuple[str, socket.socket]) -> None:
    address, _ = manager
    notifier = Notifier({"NOTIFY_SOCKET": address})
    for number in range(2000):  # more than any queue of datagrams holds: a blocking send would stand still here
        notifier.status(f"{number} {'x' * 500}")


@pytest.mark.parametrize(("further", "interval"), [(1, "60000000"), (0, "soon"), (0, "0")])
def test_a_watchdog_that_is_not_meant_for_us(further: int, interval: str) -> None:
    pid = str(os.getpid() + further)
    environment = {"NOTIFY_SOCKET": "@nobody", "WATCHDOG_USEC": interval, "WATCHDOG_PID": pid}
    assert Notifier(environment).ping_every is None


@pytest.mark.parametrize(("unit", "file"), [(SYSTEM, "fastsd.service"), (USER, "user/fastsd.service")])
def test_the_examples_are_what_install_writes(unit: Unit, file: str) -> None:
    text = (REPOSITORY / "systemd" / file).read_text()
    comments, _, rest = text.partition("\n\n")
    assert all(line.startswith("#") for line in comments.splitlines())
    assert rest == render_unit(unit)


def settings_of(text: str) -> configparser.SectionProxy:
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment]
    parser.read_string(text)
    return parser["Service"]


def test_says_what_the_design_asks_for() -> None:
    service = settings_of(render_unit(SYSTEM))
    expected = {
        "Type": "notify",
        "WatchdogSec": "60",
        "KillMode": "mixed",
        "TimeoutStopSec": "300",
        "Restart": "on-failure",
        "RestartPreventExitStatus": "78",
        "OOMPolicy": "continue",
        "NoNewPrivileges": "yes",
        "ProtectSystem": "strict",
        "ProtectHome": "yes",
        "MemoryDenyWriteExecute": "no",
        "PrivateDevices": "no",
        "UMask": "0077",
        "User": "fastsd",
        "ReadWritePaths": (
            "/srv/fast-dreambooth /var/lib/fastsd -/srv/webui/models/Stable-diffusion -/srv/webui/models/Lora"
        ),
    }
    assert {key: service[key] for key in expected} == expected
    assert "User" not in settings_of(render_unit(USER))


def test_homes_are_readable_where_they_are_needed() -> None:
    at_home = replace(SYSTEM, command=Path("/home/ann/venv/bin/fastsd"))
    assert settings_of(render_unit(at_home))["ProtectHome"] == "read-only"
    python_at_home = replace(SYSTEM, read=(Path("/home/ann/python/bin/python3.11"),))
    assert settings_of(render_unit(python_at_home))["ProtectHome"] == "read-only"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"root": Path("relative")}, "absolute"),
        ({"root": Path("/srv/a\nExecStartPre=/bin/evil")}, "control"),
        ({"user": None}, "user"),
    ],
)
def test_refuses_what_would_break_out_of_a_line(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        render_unit(replace(SYSTEM, **changes))


def test_odd_names_are_quoted() -> None:
    odd = replace(SYSTEM, root=Path('/srv/my "best" 100% $HOME'))
    service = settings_of(render_unit(odd))
    assert service["ExecStart"] == r'/usr/local/bin/fastsd up "/srv/my \"best\" 100%% $$HOME"'
    assert service["ReadWritePaths"].startswith(r'"/srv/my \"best\" 100%% $HOME" ')


@pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("unit", [SYSTEM, USER], ids=["system", "user"])
@pytest.mark.parametrize("name", ["tree", "my tree's 100% $best"])
def test_systemd_accepts_it(tmp_path: Path, unit: Unit, name: str) -> None:
    root = tmp_path / name
    root.mkdir()
    here = replace(unit, root=root, command=Path("/bin/true"), user="root" if unit.user else None)
    file = tmp_path / NAME
    file.write_text(render_unit(here))
    done = subprocess.run([str(ANALYZE), "verify", str(file)], capture_output=True, text=True, check=False, timeout=60)
    complaints = [line for line in done.stderr.splitlines() if NAME in line]
    assert complaints == []
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not installed")
def test_the_sandbox_is_tight(tmp_path: Path) -> None:
    file = tmp_path / NAME
    file.write_text(render_unit(SYSTEM))
    command = [str(ANALYZE), "security", "--offline=yes", "--threshold=25", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if "Unknown" in done.stderr or "unrecognized" in done.stderr:
        pytest.skip("this systemd-analyze cannot look at files")
    assert done.returncode == 0, done.stdout[-500:]
    level = re.search(r"exposure level for fastsd.service: ([\d.]+)", done.stdout)
    assert level is not None
    assert float(level[1]) <= 2.0


class Control:
    """Takes the place of running systemctl: remembers, and fails where it is told to."""

    def __init__(self, failing: str = "") -> None:
        self.ran: list[str] = []
        self.failing = failing

    def __call__(self, command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
        self.ran.append(" ".join(command))
        failed = bool(self.failing) and self.failing in command
        return subprocess.CompletedProcess(command, int(failed), "", "Failed to connect to bus\n" if failed else "")


def test_installs_and_uninstalls(tmp_path: Path) -> None:
    control = Control()
    outcome = install_unit(USER, tmp_path / "units", control, has_systemd=True)
    assert outcome.done
    assert outcome.path == tmp_path / "units" / NAME
    assert outcome.path.read_text() == render_unit(USER)
    assert control.ran == [
        "systemctl --user daemon-reload",
        "systemctl --user enable fastsd.service",
        "systemctl --user restart --no-block fastsd.service",
    ]
    assert any("enable-linger" in line for line in outcome.said)
    control.ran.clear()
    assert uninstall_unit("user", tmp_path / "units", control, has_systemd=True).done
    assert not outcome.path.exists()
    assert control.ran == ["systemctl --user disable --now fastsd.service", "systemctl --user daemon-reload"]
    again = uninstall_unit("user", tmp_path / "units", control, has_systemd=True)
    assert "there is no" in again.said[0]


def test_tells_what_systemctl_could_not_do(tmp_path: Path) -> None:
    outcome = install_unit(USER, tmp_path, Control("enable"), has_systemd=True)
    assert not outcome.done
    assert "systemctl --user enable fastsd.service failed with 1: Failed to connect to bus" in outcome.said
    assert outcome.path.exists()


def test_without_systemd_says_what_to_type(tmp_path: Path) -> None:
    control = Control()
    outcome = install_unit(SYSTEM, tmp_path, control, has_systemd=False)
    assert control.ran == []
    assert "systemctl daemon-reload && systemctl enable --now fastsd.service" in outcome.said[1]


def test_no_right_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("sessions.files.write_text", denied)
    with pytest.raises(Refusal, match="with sudo"):
        install_unit(SYSTEM, tmp_path, Control(), has_systemd=True)


def test_the_unit_of_a_tree(tmp_path: Path) -> None:
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.touch()
    root, script = tmp_path / "tree", tmp_path / "webui/launch.py"
    script.parent.mkdir()
    script.touch()
    settings = Settings(webui=WebUIKeys(command=["python", str(script)], models=tmp_path / "models"))

    def unit(environment: dict[str, str]) -> Unit:
        return unit_for(root, "system", settings, environment=environment, home=tmp_path, python=python)

    with pytest.raises(Refusal, match="fastsd"):
        unit({})
    python.with_name("fastsd").touch()
    with pytest.raises(Refusal, match="fastsd init"):
        unit({})
    root.mkdir()
    assert unit({}).writable == (tmp_path / "models", tmp_path / "Lora", tmp_path / "webui")
    assert unit({}).state == Path("/var/lib/fastsd")
    assert unit({"FASTSD_STATE": str(tmp_path / "state")}).state == tmp_path / "state"


def test_command_line_shows_the_unit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["service", "install", str(tmp_path), "--print"]) == 0
    shown = capsys.readouterr().out
    assert f"ExecStart={Path(sys.executable).with_name('fastsd')} up {tmp_path}" in shown
    (tmp_path / "fastsd.yaml").write_text("webui: {kind: teapot}\n")
    assert main(["service", "install", str(tmp_path), "--print"]) == 78
