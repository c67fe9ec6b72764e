"""The caption job with the real Kosmos-2 classes (the miniature's) on real photographs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Kosmos2ForConditionalGeneration, Kosmos2Processor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from handlers.caption.clean import NEUTRAL, Entity
from handlers.caption.draw import LONG_SIDE, preview
from handlers.caption.job import CaptionHandler
from handlers.caption.load import require_square
from handlers.caption.model import Captioner
from handlers.caption.prompts import BRIEF
from handlers.caption.speaking import Ask, Interrupted, Spoken
from handlers.context import BatchHandler, Cancelled, JobContext, JobResult, Stopping, Waiting
from handlers.models.miniature import captioner as miniature
from handlers.models.registry import MissingModel
from sessions import captions, files
from sessions.refusal import Refusal
from tests import pictures

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder, and in it ``random``: a captioner that talks at length and makes no sense."""
    folder = tmp_path_factory.mktemp("models")
    miniature.build(folder / "random")
    return folder


@pytest.fixture(scope="module")
def babbler(models: Path) -> Captioner:
    return Captioner.load(models / "random", "cpu")


@cache
def handler() -> CaptionHandler:
    return CaptionHandler()


@pytest.fixture
def job(tmp_path: Path, models: Path) -> Callable[..., JobContext]:
    """Makes contexts: of a source, its outputs in captions/ and previews/ of the test's folder."""

    def make(
        source: Path,
        is_cancelled: Callable[[], bool] = lambda: False,
        is_stopping: Callable[[], bool] = lambda: False,
        **payload: Any,
    ) -> JobContext:
        outputs = {
            "text": str(tmp_path / "captions" / f"{source.stem}.txt"),
            "sidecar": str(tmp_path / "captions" / f"{source.stem}.json"),
            "preview": str(tmp_path / "previews" / f"{source.stem}.jpg"),
        }
        base = {"source": str(source), "written": None, "captioner": "miniature", "models": None, "pixel_limit": 10**8}
        return JobContext(
            job=1,
            kind="caption",
            payload={**base, **outputs, **payload},
            device="cpu",
            cache=models,
            report=lambda *_: None,
            is_cancelled=is_cancelled,
            is_stopping=is_stopping,
        )

    return make


def own_picture(folder: Path) -> Path:
    """A photograph that lies where captions may lie beside it."""
    return Path(shutil.copy(pictures.photograph("coffee.png"), folder / "coffee.png"))


def done(outcome: JobResult | BaseException) -> JobResult:
    assert isinstance(outcome, JobResult), repr(outcome)
    return outcome


def test_a_batch_leaves_a_line_a_sidecar_and_a_preview_each(job: Callable[..., JobContext], tmp_path: Path) -> None:
    sources = [pictures.photograph(name) for name in PHOTOGRAPHS]
    outcomes = handler().run_batch([job(source) for source in sources])
    for source, outcome in zip(sources, outcomes, strict=True):
        result = done(outcome)
        text, sidecar = tmp_path / "captions" / f"{source.stem}.txt", tmp_path / "captions" / f"{source.stem}.json"
        content = text.read_bytes()
        assert content == captions.file_bytes(result.facts["caption"])
        record = json.loads(sidecar.read_text())
        assert record["raw"].startswith("<grounding>")
        assert record["caption"] == result.facts["caption"]
        assert record["prompt"] == BRIEF
        assert record["model"] == result.facts["captioner"] == "miniature-captioner"
        assert record["sha256"] == result.facts["sha256"] == files.sha256_of(source)
        assert record["text_sha256"] == result.facts["text_sha256"] == captions.sha256_of(content)
        assert record["entities"] == result.facts["entities"]
        assert result.facts["seconds"] > 0
        with Image.open(tmp_path / "previews" / f"{source.stem}.jpg") as shown:
            assert shown.format == "JPEG"
            assert max(shown.size) <= LONG_SIDE + 100  # the caption's lines stand below
        assert set(result.outputs) == {text, sidecar, tmp_path / "previews" / f"{source.stem}.jpg"}


def test_a_bad_picture_costs_only_itself(job: Callable[..., JobContext], tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(pictures.truncated_jpeg())
    (tmp_path / "page.jpg").write_bytes(pictures.HTML)
    sources = [
        pictures.photograph("coffee.png"),
        tmp_path / "bad.jpg",
        tmp_path / "page.jpg",
        tmp_path / "gone.jpg",
        pictures.fifo(tmp_path / "pipe.jpg"),
        pictures.photograph("rocket.jpg"),
    ]
    first, bad, page, gone, pipe, last = handler().run_batch([job(source) for source in sources])
    assert (isinstance(bad, Refusal), isinstance(page, Refusal), isinstance(pipe, Refusal)) == (True, True, True)
    assert [problem.code for problem in (bad, page, pipe) if isinstance(problem, Refusal)] == [
        "corrupt",
        "not-a-picture",
        "not-a-file",
    ]
    assert isinstance(gone, FileNotFoundError)
    assert sorted(path.name for path in (tmp_path / "captions").iterdir()) == [
        "coffee.json",
        "coffee.txt",
        "rocket.json",
        "rocket.txt",
    ]
    # The good ones say what they say alone.
    for outcome, source in ((first, sources[0]), (last, sources[-1])):
        alone = handler().run(job(source))
        assert done(outcome).facts["caption"] == alone.facts["caption"]


def images() -> list[Image.Image]:
    opened = [Image.open(pictures.photograph(name)) for name in PHOTOGRAPHS]
    return [image.convert("RGB") for image in opened]


def words(captioner: Captioner, shown: Sequence[Image.Image], prompts: Sequence[str]) -> list[str]:
    said = dict(captioner.speak(shown, [Ask(index, prompt) for index, prompt in enumerate(prompts)]))
    spoken = [said[index] for index in range(len(prompts))]
    return [answer.raw for answer in spoken if isinstance(answer, Spoken)]


def test_a_batch_says_what_singles_say_even_with_prompts_of_several_lengths(babbler: Captioner) -> None:
    shown = images()
    prompts = [BRIEF, "<grounding>Describe this image in detail:", BRIEF, "<grounding>A"]
    together = words(babbler, shown, prompts)
    alone = [words(babbler, [image], [prompt])[0] for image, prompt in zip(shown, prompts, strict=True)]
    assert together == alone
    assert len(set(together)) > 1


def test_every_generation_option_is_given_not_taken_from_a_configuration(babbler: Captioner) -> None:
    expected = words(babbler, images(), [BRIEF] * 4)
    inner = babbler.model.text_model.generation_config
    before = inner.to_dict()
    try:
        inner.update(do_sample=True, max_new_tokens=2, num_beams=2, repetition_penalty=3.0, no_repeat_ngram_size=1)
        assert words(babbler, images(), [BRIEF] * 4) == expected
    finally:
        inner.update(**before)
    # Longer than the library's default of 20, and no long run of tokens twice.
    tokens = babbler.processor.tokenizer(expected[0], add_special_tokens=False).input_ids
    assert len(tokens) > 40
    runs = [tuple(tokens[start : start + 12]) for start in range(len(tokens) - 11)]
    assert len(runs) == len(set(runs))


def test_the_picture_is_what_the_model_looks_at(babbler: Captioner) -> None:
    inputs = [
        babbler.processor(text=[BRIEF], images=[image], return_tensors="pt")["pixel_values"] for image in images()
    ]
    assert {tuple(values.shape) for values in inputs} == {(1, 3, miniature.RESOLUTION, miniature.RESOLUTION)}
    # The whole of a wide picture, ends included: stretched, not cut.
    wide = Image.new("RGB", (640, 160), "black")
    wide.paste("white", (0, 0, 40, 160))
    values = babbler.processor(text=[BRIEF], images=[wide], return_tensors="pt")["pixel_values"][0, 0]
    assert values[:, 0].mean() > values[:, -1].mean() + 1


def test_a_processor_that_cuts_pictures_is_refused(babbler: Captioner, models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cutting"
    shutil.copytree(models / "random", folder)
    processor = Kosmos2Processor.from_pretrained(folder)
    processor.image_processor.size = {"shortest_edge": miniature.RESOLUTION}
    processor.save_pretrained(folder)
    with pytest.raises(Waiting, match="does not stretch"):
        Captioner.load(folder, "cpu")
    with pytest.raises(Waiting, match="224"):
        require_square(babbler.processor, 224)


def test_the_processor_as_the_hub_has_it_is_accepted() -> None:
    published = {
        "crop_size": {"height": 224, "width": 224},
        "do_center_crop": True,
        "size": {"shortest_edge": 224},
        "use_square_size": True,
    }
    tools = CLIPImageProcessorPil.from_dict(published)
    require_square(Kosmos2Processor(tools, miniature.processor().tokenizer), 224)
    plain = Kosmos2Processor(
        CLIPImageProcessorPil.from_dict({**published, "use_square_size": False}), miniature.processor().tokenizer
    )
    with pytest.raises(Waiting, match="does not stretch"):
        require_square(plain, 224)


def test_a_damaged_captioner_waits_with_advice(models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(models / "random", folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(Waiting, match="fastsd models get"):
        Captioner.load(folder, "cpu")


def test_a_missing_captioner_waits_and_an_unknown_one_is_refused(
    job: Callable[..., JobContext], tmp_path: Path
) -> None:
    source = pictures.photograph("coffee.png")
    contexts = [
        job(source, captioner="kosmos-2"),
        job(pictures.photograph("rocket.jpg")),
        job(source, captioner="no-such-model"),
    ]
    missing, fine, unknown = handler().run_batch(contexts)
    assert isinstance(missing, MissingModel)
    assert "fastsd models get kosmos-2" in missing.reason
    assert isinstance(unknown, Refusal)
    done(fine)
    assert not (tmp_path / "captions" / "coffee.txt").exists()


def test_a_model_that_says_nothing_gives_a_neutral_line_and_says_so(
    models: Path, job: Callable[..., JobContext], tmp_path: Path
) -> None:
    folder = tmp_path / "Models" / "silent"
    shutil.copytree(models / "random", folder)
    model = Kosmos2ForConditionalGeneration.from_pretrained(folder)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()  # every token is as likely as any: the first, which is no word, wins
    model.save_pretrained(folder)
    result = CaptionHandler().run(job(pictures.photograph("coffee.png"), captioner="silent", models=str(folder.parent)))
    assert (tmp_path / "captions" / "coffee.txt").read_text() == f"{NEUTRAL}\n"
    assert result.facts["caption"] == NEUTRAL
    record = json.loads((tmp_path / "captions" / "coffee.json").read_text())
    assert any("nothing usable" in note for note in record["notes"])


def test_a_persons_line_in_captions_is_never_touched(job: Callable[..., JobContext], tmp_path: Path) -> None:
    text = tmp_path / "captions" / "coffee.txt"
    text.parent.mkdir()
    text.write_bytes(b"my own cup\r\n")
    before = text.stat()
    for written in (None, captions.sha256_of(b"something else\n")):
        result = handler().run(job(pictures.photograph("coffee.png"), written=written))
        assert result.facts["text_sha256"] is None
        assert text not in result.outputs
        assert text.read_bytes() == b"my own cup\r\n"
        assert text.stat().st_ino == before.st_ino
    assert (tmp_path / "captions" / "coffee.json").is_file()


def test_a_persons_line_beside_the_picture_stands_alone(job: Callable[..., JobContext], tmp_path: Path) -> None:
    source = own_picture(tmp_path)
    (tmp_path / "coffee.txt").write_bytes(b"my own cup\n")
    result = handler().run(job(source))
    assert result.facts["text_sha256"] is None
    assert sorted(path.name for path in (tmp_path / "captions").iterdir()) == ["coffee.json"]
    assert (tmp_path / "coffee.txt").read_bytes() == b"my own cup\n"
    # An empty file says nothing.
    (tmp_path / "coffee.txt").write_bytes(b"\n")
    assert handler().run(job(source)).facts["text_sha256"]


def test_without_a_place_for_a_text_none_is_written_and_ours_stays_known(
    job: Callable[..., JobContext], tmp_path: Path
) -> None:
    source = own_picture(tmp_path)
    assert handler().run(job(source, text=None)).facts["text_sha256"] is None
    text = tmp_path / "captions" / "coffee.txt"
    assert not text.exists()
    ours = handler().run(job(source)).facts["text_sha256"]
    before = text.stat()
    result = handler().run(job(source, text=None, written=ours))
    assert result.facts["text_sha256"] == ours
    assert text.stat().st_ino == before.st_ino


def test_pipes_and_folders_called_like_captions_block_nothing(job: Callable[..., JobContext], tmp_path: Path) -> None:
    source = own_picture(tmp_path)
    pictures.fifo(tmp_path / "coffee.txt")
    (tmp_path / "captions" / "coffee.txt").mkdir(parents=True)
    result = handler().run(job(source))
    assert result.facts["text_sha256"] is None
    assert (tmp_path / "captions" / "coffee.txt").is_dir()


def test_our_own_line_is_replaced_and_an_edit_of_it_is_not(job: Callable[..., JobContext], tmp_path: Path) -> None:
    text = tmp_path / "captions" / "coffee.txt"
    text.parent.mkdir()
    text.write_bytes(b"an older line of ours\n")
    context = job(pictures.photograph("coffee.png"), written=captions.sha256_of(b"an older line of ours\n"))
    result = handler().run(context)
    assert text.read_bytes() == captions.file_bytes(result.facts["caption"])
    text.write_bytes(text.read_bytes() + b"and a cup\n")
    again = handler().run(job(pictures.photograph("coffee.png"), written=result.facts["text_sha256"]))
    assert again.facts["text_sha256"] is None
    assert text.read_bytes().endswith(b"and a cup\n")


def test_a_death_before_the_record_is_kept_does_not_make_our_line_a_persons(
    job: Callable[..., JobContext], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = pictures.photograph("coffee.png")
    first = handler().run(job(source))
    # Nobody recorded it: `written` is still None.
    assert handler().run(job(source)).facts["text_sha256"] == first.facts["text_sha256"]

    # Now the line that lies there is another one of ours, and we die between the sidecar and the line.
    text = tmp_path / "captions" / "coffee.txt"
    text.write_bytes(b"an older line of ours\n")
    older = captions.sha256_of(b"an older line of ours\n")

    def dies(final: Path, content: bytes) -> None:
        if final.suffix == ".txt":
            raise OSError(28, "No space left on device")
        final.parent.mkdir(parents=True, exist_ok=True)
        final.write_bytes(content)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_bytes", dies)
        with pytest.raises(OSError, match="space"):
            handler().run(job(source, written=older))
    assert text.read_bytes() == b"an older line of ours\n"
    assert handler().run(job(source)).facts["text_sha256"] == first.facts["text_sha256"]
    assert captions.sha256_of(text.read_bytes()) == first.facts["text_sha256"]


def test_stopping_gives_every_job_back_and_cancelling_only_one(job: Callable[..., JobContext], tmp_path: Path) -> None:
    sources = [pictures.photograph(name) for name in PHOTOGRAPHS[:3]]
    asked = iter([False] * 3)
    outcomes = handler().run_batch([job(source, is_stopping=lambda: next(asked, True)) for source in sources])
    assert all(isinstance(outcome, Stopping) for outcome in outcomes)
    assert not (tmp_path / "captions").exists()
    mixed = [job(sources[0]), job(sources[1], is_cancelled=lambda: True), job(sources[2])]
    first, second, third = handler().run_batch(mixed)
    assert isinstance(second, Cancelled)
    done(first)
    done(third)
    assert not (tmp_path / "captions" / f"{sources[1].stem}.json").exists()


def test_generation_stops_at_the_next_token(babbler: Captioner) -> None:
    asked = 0

    def halted() -> bool:
        nonlocal asked
        asked += 1
        return asked >= 3

    with pytest.raises(Interrupted):
        list(babbler.speak(images(), [Ask(index, BRIEF) for index in range(4)], halted))
    assert asked == 4  # at three tokens, and once at the end


def test_the_preview_shows_boxes_where_they_are(tmp_path: Path) -> None:
    shown = preview(
        Image.new("RGB", (3000, 2000), "gray"),
        [Entity("a dog", (0, 5), (0.25, 0.25, 0.75, 0.75)), Entity("a cat", None, (0.0, 0.0, 0.1, 1.0))],
        "a dog and a cat " * 30,
    )
    assert shown.width == LONG_SIDE
    assert shown.height > 683  # the picture, and the caption below it
    pixels = np.asarray(shown).astype(int)
    gray = np.array([128, 128, 128])
    for x, y in ((256, 340), (767, 340), (512, 171), (512, 511), (1, 340)):
        assert np.abs(pixels[y, x] - gray).max() > 60, (x, y)
    for x, y in ((512, 340), (180, 340), (900, 340), (512, 600)):
        assert np.abs(pixels[y, x] - gray).max() < 10, (x, y)
    assert (pixels[690:, :] == 0).any()  # ink


def test_labels_do_not_cover_each_other() -> None:
    """Four phrases whose boxes begin at one corner give four patches, each in its own colour."""
    names = ["one", "two", "three", "four"]
    entities = [Entity(name, None, (0.1, 0.3, 0.5 + index / 10, 0.9)) for index, name in enumerate(names)]
    shown = np.asarray(preview(Image.new("RGB", (800, 600), "gray"), entities, "x")).astype(int)
    column = shown[:600, 81]  # left of the ink
    for colour in ((0xE6, 0x9F, 0x00), (0x56, 0xB4, 0xE9), (0x00, 0x9E, 0x73), (0xF0, 0xE4, 0x42)):
        assert (np.abs(column - colour).max(axis=1) == 0).sum() >= 12, colour


def test_it_is_a_batch_handler() -> None:
    assert isinstance(handler(), BatchHandler)
