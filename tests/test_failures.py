"""Failures as people meet them: what the folder says, what the exit code is, and that everything else goes on."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import pytest

from sessions.files import sha256_of
from tests.daemon_process import DaemonProcess, free_port
from tests.daemon_process import until as until_deadline
from tests.standins.running import webui, write_model

Found = TypeVar("Found")
NO_WEBUI = {"kind": "none"}
QUICK = {"settle": 0.3}
# Root may write anywhere; without these two rights it is somebody like anybody (capabilities(7)).
LESS_RIGHTS = """\
import ctypes, os, sys
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2
for right in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
    if os.getuid() == 0 and ctypes.CDLL(None, use_errno=True).prctl(PR_CAPBSET_DROP, right, 0, 0, 0):
        sys.exit(os.strerror(ctypes.get_errno()))
os.execv(sys.argv[1], sys.argv[1:])
"""
MISSING_CAPTIONER = "Get it with: fastsd models get kosmos-2"


def until(look: Callable[[], Found | None], what: str, seconds: float = 30.0) -> Found:
    """As elsewhere, with less patience: nothing here takes long."""
    return until_deadline(look, what, seconds)


def text_of(file: Path) -> str:
    """What a file says; "" while it is not there."""
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def error_of(file: Path) -> str:
    return text_of(file.with_name(f"{file.name}.error.txt"))


def fill(session: Path, photograph: Path, names: tuple[str, ...] = ("1.jpg",)) -> Path:
    """A session with pictures."""
    session.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copyfile(photograph, session / name)
    return session


@pytest.fixture
def rocket(photographs: list[Path]) -> Path:
    """The smallest of the photographs."""
    return photographs[-1]


@pytest.fixture
def sessions(daemon: DaemonProcess) -> Path:
    """The folder of sessions of a tree that settles quickly and has no WebUI."""
    daemon.settings(webui=NO_WEBUI, watch=QUICK)
    folder = daemon.root / "Sessions"
    folder.mkdir()
    return folder


# 1. Nothing but the program: no weights, no hub, no WebUI.


def test_without_weights_every_picture_is_cropped_and_the_captions_say_what_they_wait_for(
    daemon: DaemonProcess, sessions: Path, photographs: list[Path]
) -> None:
    session = sessions / "dog"
    session.mkdir()
    for photograph in photographs:
        shutil.copyfile(photograph, session / photograph.name)
    assert daemon.once() == 0, daemon.log.read_text()
    assert {crop.stem for crop in (session / "crops").iterdir()} == {photograph.stem for photograph in photographs}
    status = text_of(session / "STATUS.txt")
    assert "4: 4 cropped, 0 captioned" in status
    assert f"The captioner kosmos-2 is not on this machine. {MISSING_CAPTIONER}" in status
    assert not list(session.rglob("*.error.txt"))


def test_an_empty_tree_is_no_failure(daemon: DaemonProcess) -> None:
    assert daemon.once() == 0, daemon.log.read_text()


# 2. What lies in a folder of pictures and is none.


def test_spoilt_pictures_are_told_beside_them_and_the_others_go_on(
    daemon: DaemonProcess, sessions: Path, photographs: list[Path], rocket: Path
) -> None:
    session = fill(sessions / "mixed", rocket, ("good.jpg",))
    whole = photographs[1].read_bytes()
    (session / "cut.png").write_bytes(whole[: len(whole) // 3])
    (session / "a.jpg").touch()
    (session / "b.jpg").write_text("<!DOCTYPE html><html><body>404 not found</body></html>")
    os.mkfifo(session / "c.jpg")
    (session / "d.jpg").mkdir()
    (session / "notes.pdf").write_bytes(b"%PDF-1.4")

    assert daemon.once() == 1
    assert (session / "crops" / "good.jpg").is_file()
    assert "damaged or incomplete" in error_of(session / "cut.png")
    assert "Copy the picture here again" in error_of(session / "cut.png")
    assert "a.jpg is empty (0 bytes)" in error_of(session / "a.jpg")
    assert "it is a web page" in error_of(session / "b.jpg")
    status = text_of(session / "STATUS.txt")
    assert "a.jpg is empty" in status
    assert "a.jpg: a.jpg" not in status
    assert "2 files are no picture and left alone: notes.pdf, c.jpg" in status
    assert sorted(path.name for path in session.glob("*.error.txt")) == [
        "a.jpg.error.txt",
        "b.jpg.error.txt",
        "cut.png.error.txt",
    ]

    # Deleting the note has the file tried again; the file is what it was, and so is the answer.
    (session / "cut.png.error.txt").unlink()
    daemon.start()
    until(lambda: error_of(session / "cut.png"), "it is tried again")
    # A good picture in its place, while the daemon runs.
    (session / ".new").write_bytes(whole)
    (session / ".new").rename(session / "cut.png")
    until((session / "crops" / "cut.jpg").is_file, "the good picture is cropped")
    until(lambda: not error_of(session / "cut.png"), "its error file goes")
    until(lambda: "cut.png is damaged" not in text_of(session / "STATUS.txt"), "STATUS.txt forgets it")
    (session / "a.jpg").unlink()
    (session / "b.jpg").unlink()
    until(lambda: not list(session.glob("*.error.txt")), "the others' error files go with them")
    assert daemon.stop() == 0
    assert daemon.once() == 0, daemon.log.read_text()


# 3. A train.yaml that cannot be used.

WRONG = {
    "tab": ("start: now\nunet:\n\tsteps: 3\n", "(line 3)", "Use spaces"),
    "key": ("base: miniature\nresolutoin: 512\n", "(line 2)", "Did you mean 'resolution'?"),
    "value": ("base: miniature\nbatch_size: many\n", "(line 2)", "Write auto or a whole number"),
    "list": ("- base\n- miniature\n", "(line 1)", "'key: value'"),
}


def test_a_broken_train_yaml_is_told_with_its_line_and_a_fix(
    daemon: DaemonProcess, sessions: Path, rocket: Path
) -> None:
    for name, (spec, _, _) in WRONG.items():
        (fill(sessions / name, rocket, ("1.jpg", "2.jpg", "3.jpg")) / "train.yaml").write_text(spec)
    few = fill(sessions / "few", rocket, ("1.jpg", "2.jpg"))
    (few / "train.yaml").write_text("base: miniature\nstart: now\n")
    heavy = fill(sessions / "heavy", rocket, ("1.jpg", "2.jpg", "3.jpg"))
    (heavy / "train.yaml").write_text("base: sd15\nstart: now\n")

    assert daemon.once() == 1
    for name, (_, line, fix) in WRONG.items():
        told = error_of(sessions / name / "train.yaml")
        assert line in told
        assert fix in told
        assert line.strip("()") in text_of(sessions / name / "STATUS.txt")
    assert "There are 2 usable pictures in this session, and a run needs 3" in error_of(few / "train.yaml")
    assert "Add pictures" in error_of(few / "train.yaml")
    assert "Get it with: fastsd models get sd15" in text_of(heavy / "STATUS.txt")
    assert not error_of(heavy / "train.yaml")
    assert all(len(list((folder / "crops").iterdir())) >= 2 for folder in sessions.iterdir()), "the pictures went on"

    # Mended, one way or another: by another text, by more pictures, by taking the file away.
    daemon.start()
    for name in ("tab", "key", "value"):
        (sessions / name / "train.yaml").write_text("base: sd15\n")
    (sessions / "list" / "train.yaml").unlink()
    fill(few, rocket, ("3.jpg",))
    (few / "train.yaml").write_text("base: sd15\n")
    until(lambda: not list(sessions.rglob("*.error.txt")), "the error files go", 60)
    assert daemon.stop() == 0


# 4. A folder that may not be written.


@pytest.fixture
def restricted(daemon: DaemonProcess) -> DaemonProcess:
    """A daemon to which the permissions of files apply, even where the tests run as root."""
    daemon.wrapper = [sys.executable, "-c", LESS_RIGHTS]
    return daemon


def test_a_folder_without_write_permission_is_told_beside_it_and_goes_on_once_it_has_it(
    restricted: DaemonProcess, sessions: Path, rocket: Path
) -> None:
    daemon = restricted
    closed, dark = fill(sessions / "closed", rocket), fill(sessions / "dark", rocket)
    fill(dark / "inner", rocket, ("2.jpg",))
    free = fill(sessions / "free", rocket)
    closed.chmod(0o555)
    (dark / "inner").chmod(0)
    try:
        assert daemon.once() == 1
        told = text_of(sessions / "closed.error.txt")
        assert "fastsd cannot write into this folder: Permission denied" in told
        assert "Give the user that fastsd runs as the right to write there" in told
        assert "fastsd cannot look into this folder: Permission denied" in text_of(dark / "inner.error.txt")
        assert (free / "crops" / "1.jpg").is_file()
        assert (dark / "crops" / "1.jpg").is_file()

        daemon.start()
        shown = daemon.run("status", str(daemon.root)).stdout
        assert "Sessions/closed: fastsd cannot write into this folder: Permission denied." in shown
        until(lambda: "Sessions/dark/inner: fastsd cannot look into" in daemon.run("status").stdout, "status shows it")
        fill(free, rocket, ("2.jpg",))
        until((free / "crops" / "2.jpg").is_file, "the others go on")
    finally:
        closed.chmod(0o755)
        (dark / "inner").chmod(0o755)
    until((closed / "crops" / "1.jpg").is_file, "it goes on once it may", 40)
    until((dark / "crops" / "2.jpg").is_file, "what was dark is seen", 40)
    until(lambda: not list(sessions.rglob("*.error.txt")), "the error files go")
    assert daemon.stop() == 0


def test_a_folder_mended_while_no_daemon_ran_loses_its_error_file(
    restricted: DaemonProcess, sessions: Path, rocket: Path
) -> None:
    daemon = restricted
    closed = fill(sessions / "closed", rocket)
    closed.chmod(0o555)
    try:
        assert daemon.once() == 1
        assert text_of(sessions / "closed.error.txt")
    finally:
        closed.chmod(0o755)
    shutil.rmtree(daemon.state.folder)
    assert daemon.once() == 0, daemon.log.read_text()
    assert (closed / "crops" / "1.jpg").is_file()
    assert not text_of(sessions / "closed.error.txt")


# 5. The WebUI is not there, crashes, or cannot be started.


def with_model(session: Path, photograph: Path) -> Path:
    """A session as a person's history left it: a run that finished, and its file. Returns the file."""
    fill(session, photograph)
    run = "260101-beef"
    model = write_model(session / f"{session.name}-{run}.safetensors", seed=5)
    facts = {"outputs": [model.name], "sha256": sha256_of(model), "bytes": model.stat().st_size}
    records = [
        {"kind": "train", "run": run, "state": "finished", "steps": 3, "outputs": []},
        {"kind": "convert", "run": run, "family": "sd1", "prediction": "epsilon", "verified": "forward", **facts},
    ]
    manifest = session / ".fastsd" / "manifest.jsonl"
    manifest.parent.mkdir()
    manifest.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return model


def publication(daemon: DaemonProcess, session: Path) -> dict[str, object] | None:
    records = daemon.manifest(session).of_kind("publish")
    return records[0] if records else None


def test_a_webui_that_is_absent_is_no_failure_and_gets_the_model_when_it_comes(
    daemon: DaemonProcess, rocket: Path
) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    daemon.settings(webui={"kind": "a1111", "url": url, "switch": "always"}, watch=QUICK)
    session = daemon.root / "Sessions" / "zwx"
    model = with_model(session, rocket)
    assert daemon.once() == 0, daemon.log.read_text()
    status = text_of(session / "STATUS.txt")
    assert f"The model is ready. It waits for a WebUI at {url}: start it, or set webui.kind: none" in status
    assert publication(daemon, session) is None

    daemon.start()
    until(lambda: daemon.jobs("publish", "waiting"), "the running daemon has asked for it, too")
    with webui(daemon.models, port=port):
        # It is asked for every half minute; who cannot wait says so.
        assert daemon.run("retry").returncode == 0
        found = until(lambda: publication(daemon, session), "the model is published", 60)
        assert found["sd_model_hash"] == sha256_of(model)[:10]
        assert found["proof"] == "picture"
        until(lambda: "proven by a picture" in text_of(session / "STATUS.txt"), "STATUS.txt says so")
    assert daemon.stop() == 0


def test_a_webui_that_crashes_at_its_first_two_starts_gets_the_model_at_the_third(
    daemon: DaemonProcess, rocket: Path, tmp_path: Path
) -> None:
    starts = tmp_path / "starts"
    keys = daemon.webui_keys("--crash-starts", "2", "--starts", str(starts))
    daemon.settings(webui=keys, watch=QUICK)
    session = daemon.root / "Sessions" / "zwx"
    with_model(session, rocket)
    daemon.start()
    until(lambda: "It is started again in" in text_of(session / "STATUS.txt"), "STATUS.txt tells of the crash", 30)
    until(lambda: publication(daemon, session), "the model is published", 60)
    assert len(starts.read_text().splitlines()) == 3
    assert daemon.stop() == 0


def test_a_webui_command_that_does_not_exist_is_said_clearly_and_the_daemon_lives_on(
    daemon: DaemonProcess, rocket: Path
) -> None:
    keys = daemon.webui_keys() | {"command": ["/nowhere/launch.py", "--api"]}
    daemon.settings(webui=keys, watch=QUICK)
    session = daemon.root / "Sessions" / "zwx"
    with_model(session, rocket)
    daemon.start()
    sentence = "/nowhere/launch.py cannot be started: No such file or directory. See webui.command in fastsd.yaml."
    until(lambda: sentence in text_of(session / "STATUS.txt"), "STATUS.txt says so", 30)
    assert sentence in daemon.run("status", str(daemon.root)).stdout
    fill(session, rocket, ("2.jpg",))
    until((session / "crops" / "2.jpg").is_file, "the pictures go on")
    assert daemon.stop() == 0


# 7. The tree goes away, as a mount does.


def test_a_root_that_vanishes_is_waited_for_and_nothing_is_made_twice(
    daemon: DaemonProcess, rocket: Path, tmp_path: Path
) -> None:
    daemon.settings(webui=NO_WEBUI, watch={"events": "scan", "poll": 0.3, "settle": 0.2})
    session = fill(daemon.root / "Sessions" / "dog", rocket, ("1.jpg", "2.jpg", "3.jpg"))
    daemon.start()
    until(lambda: len(daemon.manifest(session).of_kind("crop")) == 3, "the pictures are cropped")
    until(lambda: not daemon.jobs("crop", "running"), "the rows have ended")
    away = tmp_path / "away"
    daemon.root.rename(away)
    until(lambda: (daemon.ask("status") or {}).get("state") == "unreachable", "the daemon notices")
    shown = daemon.run("status", str(daemon.root))
    assert "unreachable" in shown.stdout
    assert "Is it mounted?" in shown.stdout
    assert not daemon.root.exists(), "nothing is written where the tree was"
    kept = {path: path.read_bytes() for path in away.rglob("*") if path.is_file() and path.name != "STATUS.txt"}

    # An empty mount point, as after an unmount.
    daemon.root.mkdir()
    until(lambda: "Not the folder that lay at" in (daemon.ask("status") or {})["tree"]["reason"], "it is not our tree")
    assert not list(daemon.root.iterdir())
    daemon.root.rmdir()
    away.rename(daemon.root)
    until(lambda: (daemon.ask("status") or {}).get("state") == "watching", "the tree is back")
    fill(session, rocket, ("4.jpg",))
    until(lambda: len(daemon.manifest(session).of_kind("crop")) == 4, "it goes on")
    lines = (session / ".fastsd" / "manifest.jsonl").read_text().splitlines()
    assert sum('"crop"' in line for line in lines) == 4, "nothing is made twice"
    assert not any('"gone"' in line for line in lines), "nothing is forgotten"
    assert not (session / ".fastsd" / "trash").exists(), "nothing is thrown away"
    for path, content in kept.items():
        if path.name not in ("manifest.jsonl", "lock"):
            assert (daemon.root / path.relative_to(away)).read_bytes() == content
    assert daemon.stop() == 0


# 9. The disk is full.


@pytest.fixture
def small_disk(daemon: DaemonProcess) -> Iterator[Path]:
    """A tree on a file system of two megabytes."""
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(daemon.root)]
    if os.getuid() != 0 or sys.platform != "linux":
        pytest.skip("mounting a small file system needs root on Linux")
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield daemon.root
    finally:
        daemon.stop()
        mnt_detach = 2  # umount2(2): whoever still looks at it does not keep it
        ctypes.CDLL(None).umount2(os.fsencode(daemon.root), mnt_detach)


def test_a_full_disk_is_said_and_work_goes_on_when_there_is_room(
    daemon: DaemonProcess, small_disk: Path, rocket: Path
) -> None:
    daemon.settings(webui=NO_WEBUI, watch=QUICK)
    session = fill(small_disk / "Sessions" / "dog", rocket, ("1.jpg",))
    daemon.start()
    until((session / "crops" / "1.jpg").is_file, "there is room for the first")
    daemon.ask("pause")
    shutil.copyfile(rocket, session / "2.jpg")
    until(lambda: daemon.jobs("crop", "ready"), "its job is there")
    with (small_disk / ".ballast").open("wb", buffering=0) as ballast:
        with suppress(OSError):
            while ballast.write(bytes(4096)):
                pass
        # Room for notes, and none for a picture.
        ballast.truncate(ballast.tell() - 24 * 1024)
        daemon.ask("resume")
        until(lambda: "The disk is full. Make room on it" in text_of(session / "STATUS.txt"), "STATUS.txt says so")
        assert "The disk is full. Make room on it" in daemon.run("status", str(small_disk)).stdout
        assert not error_of(session / "2.jpg"), "the picture is not at fault"
        # No room for anything.
        with suppress(OSError):
            while ballast.write(bytes(4096)):
                pass
        (session / "no picture").touch()
        until(lambda: "No space left on device" in daemon.run("status", str(small_disk)).stdout, "status says so")
    assert not (session / "crops" / "2.jpg").exists()
    assert not list(small_disk.rglob(".fastsd-tmp-*")), "nothing half-written"
    (small_disk / ".ballast").unlink()
    until((session / "crops" / "2.jpg").is_file, "it goes on by itself", 60)
    until(lambda: "isk is full" not in text_of(session / "STATUS.txt"), "STATUS.txt says so")
    assert not list(small_disk.rglob("*.error.txt"))
    assert daemon.stop() == 0
