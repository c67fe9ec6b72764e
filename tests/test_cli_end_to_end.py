"""The command line as people use it: against a live daemon, without one, and where it is used wrongly."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.daemon_process import DaemonProcess
from tests.daemon_process import until as until_deadline
from tests.networks import red_network
from tests.standins.running import write_model

SETTINGS = {"webui": {"kind": "none"}, "watch": {"settle": 0.3}}


def until(look: Callable[[], object], what: str, seconds: float = 30.0) -> None:
    """As elsewhere, with less patience: nothing here takes long."""
    until_deadline(look, what, seconds)


@pytest.fixture
def rocket(photographs: list[Path]) -> Path:
    return photographs[-1]


@pytest.fixture
def live(daemon: DaemonProcess, rocket: Path) -> DaemonProcess:
    """A daemon that runs on a tree with one picture, which is cropped."""
    daemon.settings(**SETTINGS)
    session = daemon.root / "Sessions" / "dog"
    session.mkdir(parents=True)
    shutil.copyfile(rocket, session / "1.jpg")
    daemon.start()
    until(lambda: daemon.jobs("crop", "done"), f"the picture is cropped; log: {daemon.log}")
    return daemon


def rows(text: str) -> list[dict[str, Any]]:
    """Jobs of a list; the contact sheet is drawn when it pleases."""
    return [row for line in text.splitlines() if (row := json.loads(line)).get("kind") != "sheet"]


# Wrong settings, a held tree, no tree.


def test_an_unknown_key_in_fastsd_yaml_is_told_beside_it_until_it_is_mended(daemon: DaemonProcess) -> None:
    settings = daemon.root / "fastsd.yaml"
    settings.write_text("webui: {kind: none}\ncaptoiner: miniature\n")
    done = daemon.run("up", str(daemon.root), "--once")
    assert done.returncode == 78
    assert "line 2" in done.stderr
    assert "captioner" in done.stderr
    told = (daemon.root / "fastsd.yaml.error.txt").read_text()
    assert "(line 2)" in told
    assert "The key `captoiner` is unknown." in told
    assert "Did you mean `captioner`?" in told
    # The first line of the terminal names the file, and nothing there is a traceback.
    assert str(settings) in done.stderr.splitlines()[0]
    assert "Traceback" not in done.stderr
    settings.write_text("webui: {kind: none}\n")
    assert daemon.run("up", str(daemon.root), "--once").returncode == 0
    assert not (daemon.root / "fastsd.yaml.error.txt").exists()


def test_a_second_daemon_names_the_one_that_holds_the_tree(live: DaemonProcess, tmp_path: Path) -> None:
    assert live.process is not None
    for state in (live.state_home, tmp_path / "other-state"):
        live.environment["FASTSD_STATE"] = str(state)
        second = live.run("up", str(live.root))
        assert second.returncode == 1
        assert f"is already watched by process {live.process.pid} on " in second.stderr
        assert "Stop that one first" in second.stderr
    live.environment["FASTSD_STATE"] = str(live.state_home)


def test_a_root_that_does_not_exist_is_said_with_what_helps(daemon: DaemonProcess, tmp_path: Path) -> None:
    done = daemon.run("up", str(tmp_path / "nothing"))
    assert done.returncode == 1
    assert "is no folder. Is it mounted? Make one with: fastsd init" in done.stderr
    assert not (tmp_path / "nothing").exists()
    assert not list(daemon.state_home.glob("nothing-*")), "no state is left behind"


def test_wrong_use_is_exit_code_2_with_a_word_of_help(daemon: DaemonProcess) -> None:
    for arguments in (("frobnicate",), ("crop",), ("cancel",), ("up", "--never")):
        done = daemon.run(*arguments)
        assert done.returncode == 2
        assert "--help" in done.stderr


# A live daemon.


def test_status_jobs_and_logs_tell_people_and_programs_the_same(live: DaemonProcess) -> None:
    shown = live.run("status", str(live.root))
    assert shown.returncode == 0
    assert "watching 2 files" in shown.stdout
    assert "dog: waiting (see below)" in shown.stdout
    assert "1 of 1 cropped, 0 captioned" in shown.stdout
    assert "Get it with: fastsd models get kosmos-2" in shown.stdout
    value = live.status()
    assert value["running"] is True
    assert live.process is not None
    assert value["pid"] == live.process.pid
    assert [(session["name"], session["pictures"]) for session in value["sessions"]] == [("dog", 1)]

    listed = live.run("jobs")
    assert listed.returncode == 0
    assert "caption" in listed.stdout
    assert "Get it with: fastsd models get kosmos-2" in listed.stdout, "why it does not start"
    assert "crop" not in listed.stdout
    everything = rows(live.run("jobs", "--all", "--json").stdout)
    assert {(row["kind"], row["state"]) for row in everything} == {("crop", "done"), ("caption", "ready")}
    assert all({"id", "subject", "attempts", "progress", "problem"} <= set(row) for row in everything)

    logs = live.run("logs", "-n", "5")
    assert logs.returncode == 0
    assert "crop of 1.jpg: done" in logs.stdout
    assert len(logs.stdout.splitlines()) <= 5

    assert live.stop() == 0
    after = live.run("status", str(live.root))
    assert after.returncode == 0
    assert f"no daemon runs, last seen {value['at'][:10]}" in after.stdout
    assert "1 of 1 cropped" in after.stdout
    assert live.status()["running"] is False
    assert {row["kind"] for row in rows(live.run("jobs", "--all", "--json").stdout)} == {"crop", "caption"}
    for command in ("pause", "resume", "retry"):
        told = live.run(command)
        assert told.returncode == 1
        assert f"No daemon watches {live.root}. Start one with: fastsd up" in told.stderr


def test_pause_holds_what_is_new_and_resume_lets_it_go(live: DaemonProcess, rocket: Path) -> None:
    session = live.root / "Sessions" / "dog"
    told = live.run("pause")
    assert told.returncode == 0
    assert "Go on with: fastsd resume" in told.stdout
    shutil.copyfile(rocket, session / "2.jpg")
    until(lambda: live.jobs("crop", "ready"), "its job is there")
    assert "paused" in live.run("status", str(live.root)).stdout
    until(lambda: "paused" in (session / "STATUS.txt").read_text(), "STATUS.txt says so")
    assert not (session / "crops" / "2.jpg").exists()
    answer = live.run("resume", "--json")
    assert answer.returncode == 0
    assert json.loads(answer.stdout)["ok"] is True
    until((session / "crops" / "2.jpg").is_file, "it goes on")
    until(lambda: "paused" not in (session / "STATUS.txt").read_text(), "STATUS.txt says so")


def test_jobs_are_cancelled_and_tried_again_by_their_number(live: DaemonProcess) -> None:
    session = live.root / "Sessions" / "dog"
    caption = live.jobs("caption", "ready")[0]["id"]
    told = live.run("cancel", str(caption))
    assert (told.returncode, told.stdout) == (0, "1 cancelled.\n")
    assert live.jobs("caption", "cancelled")
    again = live.run("cancel", str(caption))
    assert again.returncode == 1
    assert "have ended, or there are no such numbers" in again.stderr
    assert "No failed, refused or cancelled job has the number 4711" in live.run("retry", "4711").stderr
    answer = json.loads(live.run("retry", str(caption), "--json").stdout)
    assert (answer["count"], answer["jobs"]) == (1, [caption])
    assert live.jobs("caption", "ready")

    (session / "cut.jpg").write_bytes((session / "1.jpg").read_bytes()[:9000])
    note = session / "cut.jpg.error.txt"
    until(note.is_file, "it is refused")
    until(lambda: live.jobs("crop", "refused"), "its row says so")
    first = note.stat().st_mtime_ns
    told = live.run("retry")
    assert told.returncode == 0
    assert "to be tried again" in told.stdout
    until(lambda: note.is_file() and note.stat().st_mtime_ns != first, "it was tried again")


def test_sigterm_ends_it_quickly_and_after_kill_9_a_second_one_starts_at_once(live: DaemonProcess) -> None:
    assert live.process is not None
    began = time.monotonic()
    live.process.send_signal(signal.SIGTERM)
    assert live.process.wait(20) == 0
    assert time.monotonic() - began < 10
    assert "stopped; was: waiting" in (live.root / "Sessions" / "dog" / "STATUS.txt").read_text()
    live.start()
    live.process.send_signal(signal.SIGKILL)
    live.process.wait()
    live.start()
    until(lambda: live.jobs("caption", "ready"), "it knows what is to do")
    assert len(live.jobs("crop", "done")) == 1
    assert live.stop() == 0
    assert "Traceback" not in live.log.read_text()


# Without a daemon.


def test_crop_prints_a_row_a_picture_and_goes_on_past_a_bad_one(
    daemon: DaemonProcess, rocket: Path, tmp_path: Path
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    shutil.copyfile(rocket, folder / "good.jpg")
    (folder / "bad.jpg").write_bytes(b"")
    done = daemon.run("crop", str(folder), "--out", str(out), "--size", "128", "--json")
    assert done.returncode == 1
    found = {Path(row["source"]).name: row for row in rows(done.stdout)}
    good, bad = found["good.jpg"], found["bad.jpg"]
    assert set(good) == {"source", "output", "box", "subject", "size"}
    assert good["output"] == str(out / "good.jpg")
    assert good["subject"] in ("face", "grounded", "saliency", "centre")
    assert good["size"] == 128
    with Image.open(rocket) as picture, Image.open(out / "good.jpg") as crop:
        assert crop.size == (128, 128)
        x0, y0, x1, y1 = good["box"]
        assert 0 <= x0 < x1 <= picture.width
        assert 0 <= y0 < y1 <= picture.height
    assert set(bad) == {"source", "error", "reason"}
    assert "empty" in bad["reason"]

    segment = ("crop", str(folder / "good.jpg"), "--out", str(out), "--size", "128", "--subject", "segment")
    (row,) = rows(daemon.run(*segment, "--json").stdout)
    assert row["subject"] == "saliency"
    assert "fastsd models get segment" in row["warnings"][0]
    assert "fastsd models get segment" in daemon.run(*segment).stdout

    absent = daemon.run("crop", str(folder / "none.jpg"), "--out", str(out), "--json")
    assert absent.returncode == 1
    assert "none.jpg" in rows(absent.stdout)[0]["reason"]
    nothing = daemon.run("crop", str(tmp_path / "out2"), "--out", str(out))
    assert nothing.returncode != 0


def test_caption_without_weights_says_what_is_missing(daemon: DaemonProcess, rocket: Path, tmp_path: Path) -> None:
    done = daemon.run("caption", str(rocket), "--out", str(tmp_path / "out"))
    assert done.returncode == 1
    assert "Get it with: fastsd models get kosmos-2" in done.stderr


def test_inspect_says_what_a_file_is(daemon: DaemonProcess, tmp_path: Path) -> None:
    model = write_model(tmp_path / "a.safetensors", 1)
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(model.read_bytes()[:-10])
    done = daemon.run("inspect", str(model), str(torn), "--json", "--hash")
    assert done.returncode == 1
    whole, broken = rows(done.stdout)
    keys = {
        "file",
        "kind",
        "family",
        "prediction",
        "variant",
        "format",
        "dtype",
        "sha256",
        "autov2",
        "safe",
        "problems",
        "parameters",
        "layout",
        "metadata",
    }
    assert set(whole) == keys
    assert len(whole["sha256"]) == 64
    assert whole["autov2"] == whole["sha256"][:10]
    assert broken["problems"]
    assert "there is no such file" in daemon.run("inspect", str(tmp_path / "none")).stderr


def test_models_list_shows_what_there_is_and_how_to_get_what_is_not(daemon: DaemonProcess) -> None:
    listed = daemon.run("models", "list", "--json")
    assert listed.returncode == 0
    found = {row["name"]: row for row in rows(listed.stdout)}
    assert set(found["sd15"]) == {"name", "family", "kind", "path", "resolution", "bytes", "origin", "present"}
    assert {"miniature", "miniature-captioner", "kosmos-2"} <= set(found)
    assert not found["kosmos-2"]["present"]
    assert "fastsd models get kosmos-2" in daemon.run("models", "list").stdout


def test_init_makes_a_tree_that_the_daemon_takes_and_touches_nothing_twice(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    root = tmp_path / "new tree"
    done = daemon.run("init", str(root))
    assert done.returncode == 0
    assert "fastsd up" in done.stdout
    settings = root / "fastsd.yaml"
    assert settings.is_file()
    assert len(list((root / "Sessions").iterdir())) == 1
    settings.write_text("webui: {kind: none}\n")
    assert daemon.run("init", str(root)).returncode == 0
    assert settings.read_text() == "webui: {kind: none}\n"
    assert daemon.run("up", str(root), "--once").returncode == 0
    taken = tmp_path / "file"
    taken.touch()
    refused = daemon.run("init", str(taken))
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr


def test_doctor_names_what_is_missing_and_fails_not_for_it(daemon: DaemonProcess) -> None:
    daemon.settings(**SETTINGS)
    done = daemon.run("doctor", str(daemon.root), "--json")
    assert done.returncode == 0, done.stdout
    found = {row["what"]: row for row in rows(done.stdout)}
    assert found["tree"]["state"] == "ok"
    assert found["captioner"]["state"] == "note"
    assert "fastsd models get kosmos-2" in found["captioner"]["says"]
    assert (found["faces"]["state"], found["foreground"]["state"]) == ("ok", "ok")
    assert found["segment"]["state"] == "note"
    assert "fastsd models get segment" in found["segment"]["says"]
    network = daemon.root / "Models" / "u2netp.onnx"
    network.parent.mkdir(exist_ok=True)
    for content, state in ((b"nothing", "note"), (red_network(), "ok")):
        network.write_bytes(content)
        done = daemon.run("doctor", str(daemon.root), "--json")
        (segment,) = [row for row in rows(done.stdout) if row["what"] == "segment"]
        assert segment["state"] == state
        assert str(network) in segment["says"]


def test_the_output_of_a_command_may_be_cut_short(daemon: DaemonProcess) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            daemon.command("models", "list"),
            env=daemon.environment,
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        os.close(write)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
