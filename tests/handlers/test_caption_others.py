"""BLIP-2 and Florence-2 in the caption job: their real classes and processors, tiny and untrained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from handlers.caption.boxes import Grounded
from handlers.caption.job import CaptionHandler
from handlers.caption.locations import BINS, box_of, grounded, written
from handlers.caption.model import Captioner
from handlers.caption.others import OtherCaptioner
from handlers.caption.prompts import Question
from handlers.caption.speaking import Spoken
from handlers.caption.voice import Voice, open_voice
from handlers.context import JobContext, JobResult, Waiting
from handlers.models import registry
from handlers.models.registry import MissingModel
from sessions.refusal import Refusal
from tests import pictures
from tests.handlers import other_captioners

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
NAMES = ("blip2", "florence2")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Models folder with one captioner of each kind."""
    folder = tmp_path_factory.mktemp("Models")
    other_captioners.blip2(folder / "blip2")
    other_captioners.florence2(folder / "florence2")
    return folder


@pytest.fixture(scope="module")
def voices(models: Path) -> dict[str, Voice]:
    return {name: open_voice(models / name, "cpu", "fp32") for name in NAMES}


@pytest.fixture
def job(tmp_path: Path, models: Path) -> Callable[..., JobContext]:
    def make(source: Path, captioner: str, **payload: Any) -> JobContext:
        outputs = {
            "text": str(tmp_path / "captions" / f"{source.stem}.txt"),
            "sidecar": str(tmp_path / "captions" / f"{source.stem}.json"),
            "preview": str(tmp_path / "previews" / f"{source.stem}.jpg"),
        }
        base = {"source": str(source), "captioner": captioner, "models": str(models), "precision": "fp32"}
        payload = {**base, **outputs, **payload}
        return JobContext(1, "caption", payload, "cpu", tmp_path, lambda *_: None, lambda: False, lambda: False)

    return make


def photographs() -> list[Image.Image]:
    return [Image.open(pictures.photograph(name)).convert("RGB") for name in PHOTOGRAPHS]


def said(voice: Voice, shown: list[Image.Image], mode: str = "brief", own: str | None = None) -> list[str]:
    asks = [voice.caption(index, mode, own, ()) for index in range(len(shown))]
    found = dict(voice.speak(shown, asks))
    spoken = [found[index] for index in range(len(shown))]
    return [answer.raw for answer in spoken if isinstance(answer, Spoken)]


@pytest.mark.parametrize(
    ("name", "mode", "own"),
    [
        ("blip2", "brief", None),
        ("blip2", "brief", "a photo of"),
        ("florence2", "brief", None),
        ("florence2", "detailed", None),
    ],
)
def test_a_batch_says_what_singles_say(voices: dict[str, Voice], name: str, mode: str, own: str | None) -> None:
    together = said(voices[name], photographs(), mode, own)
    alone = [said(voices[name], [picture], mode, own)[0] for picture in photographs()]
    assert together == alone
    assert len(set(together)) > 1  # it does look at the pictures


@pytest.mark.parametrize("name", NAMES)
def test_the_job_writes_line_sidecar_and_preview_and_a_bad_picture_costs_only_itself(
    job: Callable[..., JobContext], tmp_path: Path, name: str
) -> None:
    (tmp_path / "bad.jpg").write_bytes(pictures.truncated_jpeg())
    sources = [pictures.photograph("coffee.png"), tmp_path / "bad.jpg", pictures.photograph("rocket.jpg")]
    handler = CaptionHandler()
    first, bad, last = handler.run_batch([job(source, name, prefix="zwx,") for source in sources])
    assert isinstance(bad, Refusal)
    for outcome, source in ((first, sources[0]), (last, sources[2])):
        assert isinstance(outcome, JobResult), repr(outcome)
        text = (tmp_path / "captions" / f"{source.stem}.txt").read_text()
        assert text == f"{outcome.facts['caption']}\n"
        assert text.startswith("zwx, ")
        sidecar = json.loads((tmp_path / "captions" / f"{source.stem}.json").read_text())
        assert (sidecar["model"], sidecar["match"]) == (name, None)
        assert (tmp_path / "previews" / f"{source.stem}.jpg").is_file()
        if name == "blip2":
            assert sidecar["entities"] == []
        for entity in sidecar["entities"]:
            x0, y0, x1, y1 = entity["box"]
            assert 0 <= x0 < x1 <= 1
            assert 0 <= y0 < y1 <= 1


def test_a_persons_text_is_never_touched(job: Callable[..., JobContext], tmp_path: Path) -> None:
    text = tmp_path / "captions" / "coffee.txt"
    text.parent.mkdir()
    text.write_text("my own cup\n")
    CaptionHandler().run(job(pictures.photograph("coffee.png"), "blip2"))
    assert text.read_text() == "my own cup\n"


@pytest.mark.parametrize("name", NAMES)
def test_out_of_memory_halves_the_batch_and_loses_nothing(
    voices: dict[str, Voice], models: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    voice = open_voice(models / name, "cpu", "fp32")
    assert isinstance(voice, OtherCaptioner)
    answer = voice.answer

    def narrow(images: Any, asks: Any, halted: Any) -> Any:
        if len(asks) > 2:
            raise MemoryError
        return answer(images, asks, halted)

    monkeypatch.setattr(voice, "answer", narrow)
    assert said(voice, photographs()) == said(voices[name], photographs())
    assert voice.pace.ceiling == 2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", ["bf16", "fp16", "int8"])
def test_every_precision_speaks(models: Path, name: str, precision: str) -> None:
    voice = open_voice(models / name, "cpu", precision)
    assert voice.precision == precision
    assert len(said(voice, photographs()[:2])) == 2


@pytest.mark.parametrize(
    ("name", "payload", "told"),
    [
        ("blip2", {"mode": "detailed"}, "cannot write detailed captions"),
        ("blip2", {"check": True}, "cannot score"),
        ("florence2", {"prompt": "A photo of"}, "cannot go on from a prompt"),
        ("florence2", {"check": True}, "cannot score"),
    ],
)
def test_settings_that_a_captioner_lacks_wait_and_say_what_it_can(
    job: Callable[..., JobContext], name: str, payload: dict[str, Any], told: str
) -> None:
    # The settings are at fault, not the picture: no error file beside it, and cropping goes on.
    with pytest.raises(Waiting, match=told) as found:
        CaptionHandler().run(job(pictures.photograph("coffee.png"), name, **payload))
    assert "it can write brief" in found.value.reason
    assert "kosmos-2" in found.value.reason


@pytest.mark.parametrize(
    ("name", "question"),
    [
        ("blip2", Question("ground", "the cup")),
        ("blip2", Question("refer", "", (0.1, 0.1, 0.5, 0.5))),
        ("florence2", Question("ask", "what is it?")),
    ],
)
def test_questions_that_a_captioner_lacks_are_refused(
    job: Callable[..., JobContext], name: str, question: Question
) -> None:
    with pytest.raises(Refusal, match="cannot") as found:
        CaptionHandler().run(job(pictures.photograph("coffee.png"), name, questions=[question.to_json()]))
    assert found.value.code == "question"
    assert "It can write" in found.value.advice


def test_questions_are_answered(job: Callable[..., JobContext]) -> None:
    photograph = pictures.photograph("coffee.png")
    asked = Question("ask", "what is it?").to_json()
    (answer,) = CaptionHandler().run(job(photograph, "blip2", questions=[asked])).facts["answers"]
    assert answer["prompt"] == "Question: what is it? Answer:"
    asks = [Question("ground", "the <loc_1> cup").to_json(), Question("refer", "", (0.0, 0.25, 0.5, 1.0)).to_json()]
    ground, refer = CaptionHandler().run(job(photograph, "florence2", questions=asks)).facts["answers"]
    assert ground["prompt"] == "<CAPTION_TO_PHRASE_GROUNDING>the cup"
    assert refer["prompt"] == "<REGION_TO_DESCRIPTION><loc_0><loc_250><loc_500><loc_999>"
    assert (ground["answer"], refer["entities"]) == ("", [])


def test_forbidden_words_are_not_said(voices: dict[str, Voice]) -> None:
    voice = voices["blip2"]
    raw = said(voice, photographs()[:1])[0]
    assert " paragraph" in raw
    found = dict(voice.speak(photographs()[:1], [voice.caption(0, "brief", None, ("paragraph",))]))[0]
    assert isinstance(found, Spoken)
    assert " paragraph" not in found.raw


def test_what_florence_says_becomes_a_caption_with_boxes(voices: dict[str, Voice]) -> None:
    voice = voices["florence2"]
    ask = voice.caption(0, "brief", None, ())
    answer = "A cup on a table."
    raw = f"{answer}A cup<loc_100><loc_200><loc_499><loc_799>a table<loc_0><loc_600><loc_999><loc_999>"
    utterance = voice.utterance(ask, Spoken(raw, answer, 0.0))
    assert utterance.text == answer
    assert [item.phrase for item in utterance.grounded] == ["A cup", "a table"]
    assert utterance.grounded[0].boxes == ((0.1005, 0.2005, 0.4995, 0.7995),)


def test_unusable_places_are_dropped_and_counted() -> None:
    raw = "</s><s>a dog<loc_9><loc_9><loc_1><loc_1><loc_0><loc_0><loc_5><loc_5><loc_7>it<loc_0><loc_0><loc_5><loc_5>"
    # From the centre of a thousandth to the centre of another.
    assert grounded(raw, {"it"}) == ((Grounded("a dog", ((0.0005, 0.0005, 0.0055, 0.0055),)),), 2)
    assert grounded("<loc_0><loc_0><loc_5><loc_5>") == ((), 1)
    assert grounded("Bäume<loc_0><loc_0><loc_5><loc_1000>") == ((), 1)


@given(st.lists(st.integers(0, BINS - 1), min_size=4, max_size=4))
def test_a_box_that_was_read_is_written_as_it_was(bins: list[int]) -> None:
    box = box_of(bins)
    if box is not None:
        assert written(box) == "".join(f"<loc_{place}>" for place in bins)


@given(st.text())
def test_any_text_can_be_taken_apart(raw: str) -> None:
    found, dropped = grounded(raw)
    assert dropped >= 0
    assert all(item.boxes and item.phrase for item in found)


@pytest.mark.parametrize("name", ["blip-2", "florence-2"])
def test_missing_weights_name_the_command(job: Callable[..., JobContext], name: str) -> None:
    with pytest.raises(MissingModel, match=f"fastsd models get {name}"):
        CaptionHandler().run(job(pictures.photograph("coffee.png"), name))


@pytest.mark.parametrize("name", NAMES)
def test_what_looks_inside_kosmos_says_so(models: Path, name: str) -> None:
    found = registry.check(name, "captioner", models, models)
    assert (found.family, found.present) == (name, True)
    with pytest.raises(Refusal, match="needs Kosmos-2"):
        Captioner.load(found.path, "cpu")


def test_a_damaged_folder_says_what_fetches_it(models: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((models / "blip2" / "config.json").read_bytes())
    with pytest.raises(Waiting, match="fastsd models get blip-2"):
        open_voice(tmp_path, "cpu", "fp32")
