"""``fastsd caption``, ``attention`` and ``models export`` as people run them: real workers, the trained miniature."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from daemon.cli import DONE, FAILED, USAGE, main
from handlers.models.miniature import world
from handlers.models.miniature.judge import box_overlap


@pytest.fixture
def picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> world.Picture:
    monkeypatch.setenv("FASTSD_STATE", str(tmp_path / "state"))
    drawn = world.draw(world.random_scene(np.random.default_rng(3), 1))
    (tmp_path / "in").mkdir()
    drawn.image.save(tmp_path / "in" / "a.png")
    return drawn


def rows(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_captions_answers_and_features_in_one_call(
    picture: world.Picture, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    phrase = world.phrase(picture.scene.things[0])
    out, features = tmp_path / "out", tmp_path / "features.safetensors"
    (tmp_path / "in" / "b.png").write_bytes(b"no picture")
    box = ",".join(f"{side:.3f}" for side in picture.boxes[0])
    command = ["caption", str(tmp_path / "in"), "--out", str(out), "--captioner", "miniature", "--json"]
    questions = ["--ground", phrase, "--ask", "What is it?", "--refer", box]
    shaping = ["--prefix", "photo,", "--precision", "fp32", "--features", str(features), "--check"]
    assert main([*command, *questions, *shaping]) == FAILED, "one picture cannot be read"
    good, bad, seen = sorted(rows(capsys.readouterr().out), key=lambda row: ("features" in row, "error" in row))
    assert good["caption"].startswith(f"photo, {phrase}")
    assert [answer["kind"] for answer in good["answers"]] == ["ask", "ground", "refer"]
    (found,) = good["answers"][1]["entities"]
    assert box_overlap(tuple(found["box"]), picture.boxes[0]) > 0.5
    assert good["match"]["fits"]
    assert bad["error"] == "not-a-picture"
    assert seen["shapes"]["latents"] == [1, 64, 128]
    assert features.is_file()
    assert (out / "a.txt").read_text() == good["caption"] + "\n"


def test_the_sheet_of_heat_maps(picture: world.Picture, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, npz = tmp_path / "heat" / "a.png", tmp_path / "a.npz"
    source = str(tmp_path / "in" / "a.png")
    assert main(["attention", source, "--out", str(out), "--npz", str(npz), "--captioner", "miniature"]) == DONE
    assert "of its attention in its box" in capsys.readouterr().out
    with Image.open(out) as shown:
        assert shown.format == "PNG"
    assert set(np.load(npz)) >= {"heat", "words", "boxes", "text_attention", "resampler_attention"}


@pytest.mark.usefixtures("picture")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--refer", "0.1,0.2"], (USAGE, "left, top, right, bottom")),
        (["--captioner", "kosmos-2"], (FAILED, "fastsd models get kosmos-2")),
    ],
)
def test_what_cannot_be_asked_is_told_before_anything_starts(
    tmp_path: Path, arguments: list[str], expected: tuple[int, str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["caption", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--captioner", "miniature"]
    assert main([*command, *arguments]) == expected[0]
    assert expected[1] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
