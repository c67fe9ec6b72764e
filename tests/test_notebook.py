"""The notebook's one cell, run as a script on a machine that pretends to be Colab: its Drive, its pip, its torch."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.standins.running import until

NOTEBOOK = Path(__file__).parents[1] / "notebooks/fastsd.ipynb"

# Stand-ins on PATH write down how they were called; `fastsd up` runs until it is ended.
PIP = """\
#!/bin/sh
echo "pip $*" >> "$CALLS"
case "$1" in
    list) printf 'numpy==2.0.2\\ntorch==2.6.0+cu124\\ntorchvision==0.21.0+cu124\\ntorchsde==0.2.6\\nPillow==11.0\\n' ;;
    install) exit "${PIP_FAILS:-0}" ;;
esac
"""
FASTSD = """\
#!/bin/sh
echo "fastsd $* state=$FASTSD_STATE" >> "$CALLS"
case "$1" in
    init) mkdir -p "$2" ;;
    doctor) echo "doctor: a GPU is missing"; exit 1 ;;
    up) echo "watching $2"; [ -z "$UP_ENDS" ] || exit 3; sleep 60 ;;
esac
"""
DRIVE = """\
from pathlib import Path
import os

def mount(path):
    with open(os.environ["CALLS"], "a") as calls:
        calls.write(f"mount {path}\\n")
    (Path(path) / "MyDrive").mkdir(parents=True, exist_ok=True)
"""


def cell_source() -> str:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    [cell] = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return "".join(cell["source"])


class Colab:
    """A folder that the cell takes for Colab's machine."""

    def __init__(self, tmp_path: Path) -> None:
        self.content = tmp_path / "content"
        self.calls_file = tmp_path / "calls"
        self.path = tmp_path / "bin"
        self.path.mkdir()
        for name, text in (("pip", PIP), ("fastsd", FASTSD)):
            file = self.path / name
            file.write_text(text.replace("#!/bin/sh", f"#!{shutil.which('bash')}"))
            file.chmod(0o755)
        package = tmp_path / "python/google/colab"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "drive.py").write_text(DRIVE)
        self.environment = {
            **os.environ,
            "PATH": f"{self.path}:{os.environ['PATH']}",
            "PYTHONPATH": str(tmp_path / "python"),
            "FASTSD_CONTENT": str(self.content),
            "CALLS": str(self.calls_file),
            "PYTHONUNBUFFERED": "1",
        }

    def start(self, changes: dict[str, str] | None = None, **environment: str) -> "subprocess.Popen[str]":
        """Run the cell with other values in its form."""
        source = cell_source()
        for name, value in (changes or {}).items():
            source, count = re.subn(rf'^{name} = ".*?"', f"{name} = {value!r}", source, flags=re.MULTILINE)
            assert count == 1
        return subprocess.Popen(
            [sys.executable, "-c", source],
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, changes: dict[str, str] | None = None, **environment: str) -> tuple[int, str]:
        process = self.start(changes, UP_ENDS="1", **environment)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    @property
    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines() if self.calls_file.exists() else []

    def call(self, start: str) -> str:
        [found] = [call for call in self.calls if call.startswith(start)]
        return found


@pytest.fixture
def colab(tmp_path: Path) -> Iterator[Colab]:
    colab = Colab(tmp_path)
    yield colab
    pid_file = colab.content / "fastsd/up.pid"
    if pid_file.exists():
        daemon = int(pid_file.read_text())
        command = Path(f"/proc/{daemon}/cmdline")
        if command.exists() and os.fsencode(colab.path / "fastsd") in command.read_bytes():
            os.killpg(daemon, signal.SIGKILL)


def test_is_a_notebook_with_one_form_cell() -> None:
    notebook: dict[str, Any] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["metadata"]["accelerator"]) == (4, "GPU")
    [cell] = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert cell["metadata"]["cellView"] == "form"
    assert cell["outputs"] == []
    assert cell["execution_count"] is None
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    source = cell_source()
    compile(source, "cell", "exec")
    assert source.startswith("# @title ")
    assert re.findall(r"^(\w+) = .*# @param ", source, re.MULTILINE) == ["folder", "version", "webui"]


def test_mounts_installs_checks_and_starts(colab: Colab) -> None:
    code, output = colab.run()
    root = colab.content / "drive/MyDrive/Fast-Dreambooth"
    local = colab.content / "fastsd"
    assert code == 0, output
    assert colab.calls == [
        f"mount {colab.content / 'drive'}",
        "pip list --format=freeze",
        f"pip install --quiet --upgrade --constraint {local / 'constraints.txt'} fastsd[all]",
        f"fastsd init {root} state={local / 'state'}",
        f"fastsd doctor {root} state={local / 'state'}",
        f"fastsd up {root} state={local / 'state'}",
    ]
    assert (local / "constraints.txt").read_text().split() == [
        "numpy==2.0.2",
        "torch==2.6.0+cu124",
        "torchvision==0.21.0+cu124",
    ]
    assert "doctor: a GPU is missing" in output
    assert f"watching {root}" in output, "the log is shown"
    assert output.rstrip().endswith("fastsd has ended.")


@pytest.mark.parametrize(
    ("version", "wanted"),
    [
        ("latest", "fastsd[all]"),
        (" ", "fastsd[all]"),
        ("0.1.0", "fastsd[all]==0.1.0"),
        ("0.2.0rc1", "fastsd[all]==0.2.0rc1"),
        ("git+https://example.org/fastsd@main", "fastsd[all] @ git+https://example.org/fastsd@main"),
    ],
)
def test_versions(colab: Colab, version: str, wanted: str) -> None:
    assert colab.run({"version": version})[0] == 0
    assert colab.call("pip install").endswith(f"constraints.txt {wanted}")


@pytest.mark.parametrize(
    ("folder", "path"),
    [
        ("Pictures/My cats", "MyDrive/Pictures/My cats"),
        ("/MyDrive/Cats/", "MyDrive/Cats"),
        ("Shareddrives/Team/Cats", "Shareddrives/Team/Cats"),
        ("", "MyDrive/Fast-Dreambooth"),
    ],
)
def test_folders(colab: Colab, folder: str, path: str) -> None:
    assert colab.run({"folder": folder})[0] == 0
    assert f"fastsd up {colab.content / 'drive' / path} " in colab.call("fastsd up")


def test_webui_of_the_form_goes_into_a_copy_of_the_settings(colab: Colab) -> None:
    root = colab.content / "drive/MyDrive/Fast-Dreambooth"
    root.mkdir(parents=True)
    people = "captioner: miniature\nwebui: {switch: always, url: http://127.0.0.1:1}\n"
    (root / "fastsd.yaml").write_text(people)
    address = "http://127.0.0.1:7861"
    assert colab.run({"webui": address})[0] == 0
    copy = colab.content / "fastsd/fastsd.yaml"
    assert colab.call("fastsd up").startswith(f"fastsd up {root} --config {copy}")
    assert json.loads(copy.read_text()) == {"captioner": "miniature", "webui": {"switch": "always", "url": address}}
    assert (root / "fastsd.yaml").read_text() == people, "what people put there is never changed"
    colab.calls_file.unlink()
    assert colab.run({"webui": "none"})[0] == 0
    assert json.loads(copy.read_text())["webui"] == {"kind": "none"}
    assert not [call for call in colab.calls if call.startswith("fastsd init")]


def test_a_failed_installation_starts_nothing(colab: Colab) -> None:
    code, output = colab.run(PIP_FAILS="1")
    assert code == 1
    assert "could not be installed" in output
    assert not [call for call in colab.calls if call.startswith("fastsd")]


def stopped(cell: "subprocess.Popen[str]") -> str:
    """What a cell still says when it is stopped as a person stops it: again, where once was not enough.

    An interrupt that meets Python in a finalizer is swallowed there.
    """
    for _ in range(2):
        cell.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            return cell.communicate(timeout=30)[0]
    raise AssertionError("the cell goes on")


def test_stopping_the_cell_leaves_the_daemon_and_running_it_again_follows_it(colab: Colab) -> None:
    first = colab.start()
    log = colab.content / "fastsd/up.log"
    until(lambda: log.exists() and "watching" in log.read_text())
    assert first.stdout is not None
    until(lambda: "watching /" in (first.stdout.readline() if first.stdout else ""))
    assert "goes on in the background" in stopped(first)
    daemon = int((colab.content / "fastsd/up.pid").read_text())
    again = colab.start()
    try:
        until(lambda: "watching /" in (again.stdout.readline() if again.stdout else ""))
        assert colab.call("fastsd up"), "there is one daemon"
        assert int((colab.content / "fastsd/up.pid").read_text()) == daemon
        os.killpg(daemon, signal.SIGKILL)
        output, _ = again.communicate(timeout=30)
        assert "fastsd has ended." in output
    finally:
        again.kill()
        again.communicate()


def test_outside_colab(colab: Colab) -> None:
    code, output = colab.run(PYTHONPATH="")
    assert code == 0
    assert "This is not Colab" in output


def test_needs_nothing_but_what_colab_has_before_the_installation() -> None:
    before = cell_source().split("# fastsd, beside the torch")[0]
    imports = re.findall(r"^ *(?:import|from) ([\w.]+)", before, re.MULTILINE)
    assert {name.split(".")[0] for name in imports} - set(sys.stdlib_module_names) == {"google"}
