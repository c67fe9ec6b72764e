"""Everything that one can ask of a captioner, on the trained miniature: modes, questions, settings, fit, precision."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache as cached
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from handlers.caption.job import CaptionHandler
from handlers.caption.load import has_bitsandbytes, load
from handlers.caption.match import Matcher
from handlers.caption.model import Captioner
from handlers.caption.precision import Machine, Precision, choose, weight_bytes
from handlers.caption.prompts import BRIEF
from handlers.caption.speaking import Ask, Spoken
from handlers.context import JobContext, JobResult
from handlers.models import miniature
from handlers.models.miniature import world
from handlers.models.miniature.judge import box_overlap
from sessions.refusal import Refusal

GIB = 1 << 30
KOSMOS = 1_664_485_376


@pytest.fixture(scope="module")
def folder(cache: Path) -> Path:
    return miniature.ensure("miniature-captioner", cache)


@pytest.fixture(scope="module")
def captioner(folder: Path) -> Captioner:
    return Captioner.load(folder, "cpu")


@cached
def handler() -> CaptionHandler:
    return CaptionHandler()


def pictures(count: int, seed: int = 31, things: int | None = None) -> list[world.Picture]:
    return [
        world.draw(world.random_scene(np.random.default_rng((seed, number)), things or 1 + number % 3))
        for number in range(count)
    ]


@pytest.fixture
def captioned(tmp_path: Path, cache: Path) -> Callable[..., tuple[JobResult, dict[str, Any]]]:
    """Captions one drawn picture with a payload; gives the result and the sidecar."""

    def run(picture: world.Picture, **payload: Any) -> tuple[JobResult, dict[str, Any]]:
        picture.image.save(tmp_path / "a.png")
        outputs = {"text": "captions/a.txt", "sidecar": "captions/a.json", "preview": "previews/a.jpg"}
        paths = {key: str(tmp_path / name) for key, name in outputs.items()}
        whole = {"source": str(tmp_path / "a.png"), "captioner": "miniature", **paths, **payload}
        context = JobContext(1, "caption", whole, "cpu", cache, lambda *_: None, lambda: False, lambda: False)
        result = handler().run(context)
        return result, json.loads((tmp_path / "captions" / "a.json").read_text())

    return run


Run = Callable[..., tuple[JobResult, dict[str, Any]]]


def test_the_sidecar_holds_all_that_was_said_and_how(captioned: Run) -> None:
    (picture,) = pictures(1, seed=3)
    result, sidecar = captioned(picture)
    assert sidecar["caption"] == world.caption(picture.scene).removeprefix("An image of ").removesuffix(".")
    assert sidecar["raw"].startswith("<grounding>")
    assert sidecar["prompt"] == BRIEF
    assert (sidecar["model"], sidecar["precision"], sidecar["revision"]) == ("miniature-captioner", "fp32", None)
    (entity,) = sidecar["entities"]
    assert sidecar["caption"][slice(*entity["span"])] == entity["phrase"] == world.phrase(picture.scene.things[0])
    assert box_overlap(tuple(entity["box"]), picture.boxes[0]) > 0.7
    assert sidecar["match"]["fits"]
    assert sidecar["match"]["by"] == "fastsd"
    assert result.facts["match"] == sidecar["match"]


def test_the_line_is_shaped_by_the_settings(captioned: Run, tmp_path: Path) -> None:
    (picture,) = pictures(1, seed=3)
    thing = picture.scene.things[0]
    result, sidecar = captioned(picture, instance="zwx", prefix="photo,", suffix=", 4k", drop=["background"])
    backdrop = world.background_phrase(picture.scene).removesuffix(" background")
    assert result.facts["caption"] == f"photo, zwx {thing.shape} on {backdrop}, 4k".replace(f" {thing.shape}", "")
    named, _ = captioned(picture, instance="zwx", **{"class": thing.shape})
    assert named.facts["caption"].startswith(f"zwx {thing.shape} on ")
    styled, _ = captioned(picture, instance="zwx", concept="style")
    assert styled.facts["caption"].endswith(", in the style of zwx")
    assert (tmp_path / "captions" / "a.txt").read_text() == styled.facts["caption"] + "\n"
    assert sidecar["edits"]


def test_a_word_that_must_not_be_said_is_not_said(captioner: Captioner) -> None:
    drawn = pictures(6, things=1)
    words = [picture.scene.things[0].colour for picture in drawn]
    asks = [Ask(index, BRIEF, 64, (word,)) for index, word in enumerate(words)]
    said = dict(captioner.speak([picture.image for picture in drawn], asks))
    for index, word in enumerate(words):
        answer = said[index]
        assert isinstance(answer, Spoken)
        assert word not in answer.raw.split()
        assert drawn[index].scene.things[0].shape in answer.raw


def test_an_own_prompt_is_the_beginning_of_the_line_unless_it_is_an_instruction(captioned: Run) -> None:
    (picture,) = pictures(1, seed=3)
    result, sidecar = captioned(picture, prompt="An image of a")
    assert sidecar["prompt"] == "<grounding>An image of a"
    assert result.facts["caption"].startswith("a ")
    told, sidecar = captioned(picture, mode="detailed")
    assert sidecar["prompt"].endswith("in detail:")
    assert "Describe" not in told.facts["caption"]


def test_a_phrase_is_found_where_it_is(captioned: Run) -> None:
    overlaps = []
    for picture in pictures(12, seed=41, things=1):
        asked = [{"kind": "ground", "text": world.phrase(picture.scene.things[0])}]
        result, _ = captioned(picture, questions=asked)
        (answer,) = result.facts["answers"]
        assert answer["kind"] == "ground"
        assert {entity["phrase"] for entity in answer["entities"]} == {world.phrase(picture.scene.things[0])}
        overlaps.append(max(box_overlap(tuple(entity["box"]), picture.boxes[0]) for entity in answer["entities"]))
    assert np.mean(overlaps) > 0.7


def test_all_questions_about_a_picture_are_answered_in_one_go(captioned: Run) -> None:
    """The miniature was taught no questions; what counts here is that each gets its own answer, with valid boxes."""
    picture = pictures(3)[2]
    questions = [
        {"kind": "ask", "text": "What is on the left?"},
        {"kind": "refer", "box": list(picture.boxes[0])},
        {"kind": "ground", "text": world.phrase(picture.scene.things[0])},
    ]
    result, sidecar = captioned(picture, questions=questions)
    assert [answer["kind"] for answer in sidecar["answers"]] == ["ask", "refer", "ground"]
    assert sidecar["answers"] == result.facts["answers"]
    for answer in sidecar["answers"]:
        assert answer["raw"].startswith("<grounding>")
        assert "patch_index" not in answer["answer"]
        for entity in answer["entities"]:
            x0, y0, x1, y1 = entity["box"]
            assert 0 <= x0 < x1 <= 1
            assert 0 <= y0 < y1 <= 1
    alone, _ = captioned(picture)
    assert alone.facts["caption"] == result.facts["caption"]


def test_a_question_that_asks_nothing_is_refused(captioned: Run) -> None:
    with pytest.raises(Refusal, match="empty"):
        captioned(pictures(1)[0], questions=[{"kind": "ask", "text": "  "}])


def test_a_persons_line_that_does_not_fit_is_flagged_and_left_alone(captioned: Run, tmp_path: Path) -> None:
    (picture,) = pictures(1, seed=3)
    fits = f"{world.caption(picture.scene).removeprefix('An image of ')}"
    wrong = "a small cyan moon and a yellow ring on a striped black background."
    for line, expected in ((fits, True), (wrong, False)):
        (tmp_path / "captions").mkdir(exist_ok=True)
        (tmp_path / "captions" / "a.txt").write_text(line)
        result, sidecar = captioned(picture)
        assert result.facts["match"]["by"] == "person"
        assert result.facts["match"]["fits"] is expected
        assert any("does not seem to fit" in note for note in sidecar["notes"]) is not expected
        assert (tmp_path / "captions" / "a.txt").read_text() == line


def test_checking_can_be_left_out(captioned: Run) -> None:
    result, sidecar = captioned(pictures(1)[0], check=False)
    assert sidecar["match"] is None
    assert "match" not in result.facts


def test_the_right_caption_outranks_wrong_ones(captioner: Captioner) -> None:
    """200 trials: the true caption against those of three other pictures, and against one with another colour."""
    drawn = pictures(200, seed=97)
    matcher = Matcher(captioner)
    latents = torch.cat(
        [captioner.encode([picture.image for picture in drawn[at : at + 50]]) for at in range(0, 200, 50)]
    )
    texts = [world.caption(picture.scene).removeprefix("An image of") for picture in drawn]
    near = [recoloured(picture) for picture in drawn]

    def scores(of: Sequence[str]) -> np.ndarray:
        return np.array([match.score for match in matcher.scores(latents, of)])

    right = scores(texts)
    wrong = np.max([scores(texts[shift:] + texts[:shift]) for shift in (1, 2, 3)], axis=0)
    assert np.mean(right > wrong) >= 0.9
    assert np.mean(right > scores(near)) >= 0.9
    assert np.mean(right > 0) >= 0.95
    print("outranks", np.mean(right > wrong), "near misses", np.mean(right > scores(near)), "fits", np.mean(right > 0))


def recoloured(picture: world.Picture) -> str:
    """The caption of a picture with the first thing's colour exchanged."""
    colour = picture.scene.things[0].colour
    other = next(word for word in world.COLOURS if word not in (colour, picture.scene.background))
    return world.caption(picture.scene).removeprefix("An image of").replace(f" {colour} ", f" {other} ", 1)


# Precision


@pytest.mark.parametrize(("precision", "same"), [("bf16", 0.9), ("fp16", 0.95), ("int8", 0.9)])
def test_other_precisions_say_nearly_the_same(
    folder: Path, captioner: Captioner, precision: Precision, same: float
) -> None:
    drawn = pictures(40, seed=55)
    images, asks = [picture.image for picture in drawn], [Ask(index, BRIEF) for index in range(40)]
    other = Captioner.load(folder, "cpu", precision)
    assert other.precision == precision
    exact, found = dict(captioner.speak(images, asks)), dict(other.speak(images, asks))
    alike = [words(exact[index]) == words(found[index]) for index in range(40)]
    print(precision, "captions alike", np.mean(alike))
    assert np.mean(alike) >= same


def words(said: Spoken | BaseException) -> str:
    assert isinstance(said, Spoken)
    from handlers.caption.boxes import parse

    return parse(said.raw).text


def test_auto_picks_the_fastest_that_fits() -> None:
    assert choose(1_700_000, Machine("cpu", 0)) == "fp32", "a miniature gains nothing"
    assert choose(KOSMOS, Machine("cpu", 16 * GIB)) == "int8"
    assert choose(KOSMOS, Machine("cpu", 6 * GIB)) == "bf16", "int8 is made of fp32, which does not fit"
    assert choose(KOSMOS, Machine("cuda", 24 * GIB)) == "bf16"
    assert choose(KOSMOS, Machine("cuda", 8 * GIB, bfloat16=False)) == "fp16"
    assert choose(KOSMOS, Machine("cuda", 4 * GIB, bfloat16=False, bitsandbytes=True)) == "int8"
    assert choose(KOSMOS, Machine("cuda", 2 * GIB, bfloat16=False, bitsandbytes=True)) == "4bit"
    assert choose(KOSMOS, Machine("cuda", 2 * GIB, bfloat16=False)) == "fp16"
    assert weight_bytes(KOSMOS, "fp16") == pytest.approx(3.33e9, rel=0.01)


def test_a_precision_that_cannot_be_had_is_refused_plainly(folder: Path) -> None:
    with pytest.raises(Refusal, match="GPU"):
        load(folder, "cpu", "4bit")
    with pytest.raises(Refusal, match="precision"):
        load(folder, "cpu", "fp8")
    if not has_bitsandbytes():
        with pytest.raises(Refusal, match="pip install bitsandbytes"):
            load(folder, "cuda:0", "int8")
