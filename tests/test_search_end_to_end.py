"""The search as people use it: a daemon that keeps the index, and the command with one and without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from daemon.cli import CONFIGURATION, FAILED, USAGE, main
from daemon.searching import index_folder
from handlers.models.miniature import world
from handlers.search.store import digest_of, twins_of
from tests.daemon_process import DaemonProcess, until


def drawn(number: int) -> world.Picture:
    return world.draw(world.random_scene(np.random.default_rng((78, number)), 1 + number % 3), 128)


def fill(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        drawn(number).image.save(folder / f"{number}.png")


def found(daemon: DaemonProcess, *arguments: str) -> list[str]:
    """Names of what ``fastsd search`` finds."""
    done = daemon.run("search", str(daemon.root), *arguments, "--json")
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    assert answer["model"] == "miniature-search"
    return [str(Path(hit["source"]).relative_to(daemon.root)) for hit in answer["found"]]


def test_the_daemon_keeps_the_index_and_the_command_asks_it(daemon: DaemonProcess) -> None:
    # Without a captioner, the crops are enough.
    daemon.settings(search="miniature", webui={"kind": "none"})
    session = daemon.root / "Sessions" / "shapes"
    fill(session, 6)
    drawn(2).image.resize((112, 112)).save(session / "again.png")
    daemon.start()
    index = index_folder(daemon.state.folder, "miniature")
    until(lambda: digest_of(index, "Sessions/shapes"), "the pictures are in the index")
    assert {"2.png", "again.png"} in [
        {Path(p.one).name, Path(p.other).name} for p in twins_of(index, "Sessions/shapes")
    ]
    words = world.caption(drawn(3).scene)
    assert found(daemon, words, "--count", "1") == ["Sessions/shapes/3.png"]
    # Killed and with a picture renamed meanwhile, it goes on from what it knows.
    daemon.kill()
    (session / "3.png").rename(session / "three.png")
    assert found(daemon, words, "--count", "1") == ["Sessions/shapes/three.png"]
    assert daemon.once() == 0, daemon.log.read_text()[-2000:]
    assert found(daemon, "--like", str(session / "again.png"), "--count", "1") == ["Sessions/shapes/2.png"]


def test_weights_that_are_missing_are_told_in_status_and_hold_nothing_up(daemon: DaemonProcess) -> None:
    daemon.settings(search="siglip2-base", webui={"kind": "none"})
    session = daemon.root / "Sessions" / "shapes"
    fill(session, 3)
    assert daemon.once() == 0, daemon.log.read_text()[-2000:]
    assert len(daemon.manifest(session).of_kind("crop")) == 3
    assert "Get it with: fastsd models get siglip2-base" in (session / "STATUS.txt").read_text()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], (USAGE, "words, or a picture with --like")),
        (["a", "--like", "b.png"], (USAGE, "words, or a picture with --like")),
        (["a", "--count", "0"], (USAGE, "no number of pictures")),
        (["--like", "nowhere.png"], (FAILED, "no such picture")),
        (["a"], (FAILED, "fastsd models get siglip2-base")),
        (["a", "--model", "kosmos-2"], (FAILED, "No search model called 'kosmos-2'")),
        (["a", "--model", "clip-vit-base"], (FAILED, "fastsd models get clip-vit-base")),
    ],
)
def test_what_cannot_be_asked_is_told_before_anything_starts(
    arguments: list[str],
    expected: tuple[int, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FASTSD_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "tree").mkdir()
    assert main(["search", str(tmp_path / "tree"), *arguments]) == expected[0]
    assert expected[1] in capsys.readouterr().err
    assert not (tmp_path / "state").exists()


def test_settings_that_cannot_be_used_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTSD_STATE", str(tmp_path / "state"))
    (tmp_path / "fastsd.yaml").write_text("serach: miniature\n")
    assert main(["search", str(tmp_path), "a heart"]) == CONFIGURATION
    assert "serach" in capsys.readouterr().err
    assert main(["search", str(tmp_path / "nowhere"), "a heart"]) == USAGE
