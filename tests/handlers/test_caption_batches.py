"""Batches as large as memory allows: nothing is lost, nothing comes out twice, and a batch says what singles say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from handlers.caption.batches import GROW_AFTER, Pace, batch_size, in_batches, picture_bytes
from handlers.caption.boxes import parse
from handlers.caption.job import CaptionHandler
from handlers.caption.model import Captioner
from handlers.caption.prompts import BRIEF, DETAILED, Question
from handlers.caption.speaking import Ask, Spoken
from handlers.caption.voice import KosmosVoice
from handlers.context import JobContext, JobResult
from handlers.free_memory import UNKNOWN, free_memory
from handlers.models import miniature
from handlers.models.miniature import world
from handlers.models.miniature.judge import box_overlap
from handlers.out_of_memory import is_out_of_memory

GIB = 1 << 30
# Kosmos-2 itself, with room for 64 latents, a prompt and a detailed answer.
REAL = {"layers": 24, "width": 2048, "feed_forward": 8192, "vocabulary": 65037, "tokens": 320}


@pytest.fixture(scope="module")
def folder(cache: Path) -> Path:
    return miniature.ensure("miniature-captioner", cache)


@pytest.fixture(scope="module")
def captioner(folder: Path) -> Captioner:
    return Captioner.load(folder, "cpu")


@pytest.fixture(scope="module")
def drawn() -> list[world.Picture]:
    return [world.draw(world.random_scene(np.random.default_rng((77, n)), 1 + n % 3)) for n in range(24)]


def answers(captioner: Captioner, images: Sequence[Image.Image], asks: Sequence[Ask]) -> list[Spoken]:
    found = dict(captioner.speak(images, asks))
    assert sorted(found) == list(range(len(asks)))
    spoken = [found[index] for index in range(len(asks))]
    return [answer for answer in spoken if isinstance(answer, Spoken)]


def test_a_batch_says_exactly_what_singles_say(captioner: Captioner, drawn: list[world.Picture]) -> None:
    images = [picture.image for picture in drawn]
    together = answers(captioner, images, [Ask(index, BRIEF) for index in range(len(images))])
    alone = [answers(captioner, [image], [Ask(0, BRIEF)])[0] for image in images]
    assert [said.raw for said in together] == [said.raw for said in alone]
    assert [parse(said.raw) for said in together] == [parse(said.raw) for said in alone]
    assert len({said.raw for said in together}) > 20


def test_captions_and_boxes_are_right_on_fresh_pictures(captioner: Captioner, drawn: list[world.Picture]) -> None:
    said = answers(captioner, [picture.image for picture in drawn], [Ask(index, BRIEF) for index in range(len(drawn))])
    right, overlaps = 0, []
    for picture, answer in zip(drawn, said, strict=True):
        utterance = parse(answer.raw)
        right += " ".join(utterance.text.replace(" ,", ",").split()) == world.caption(picture.scene)
        overlaps += [
            box_overlap(found.boxes[0], box) for found, box in zip(utterance.grounded, picture.boxes, strict=False)
        ]
    assert right >= 0.95 * len(drawn)
    assert np.mean(overlaps) > 0.8


def test_prompts_of_several_lengths_about_one_picture_never_share_a_batch(
    captioner: Captioner, drawn: list[world.Picture], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [picture.image for picture in drawn[:4]]
    prompts = [BRIEF, DETAILED, Question("ground", "a red circle").prompt()]
    asks = [Ask(index, prompt, 24) for index in range(4) for prompt in prompts]
    shapes: list[tuple[int, int]] = []
    masks: list[bool] = []
    looks: list[int] = []
    generate, look = captioner.model.generate, captioner.look

    def watched(**given_: Any) -> torch.Tensor:
        shapes.append(tuple(given_["input_ids"].shape))
        masks.append(bool(given_["attention_mask"].all()))
        assert captioner.processor.tokenizer.pad_token_id not in given_["input_ids"]
        return generate(**given_)

    def counted(pixels: torch.Tensor) -> Any:
        looks.append(len(pixels))
        return look(pixels)

    monkeypatch.setattr(captioner.model, "generate", watched)
    monkeypatch.setattr(captioner, "look", counted)
    together = answers(captioner, images, asks)
    assert [rows for rows, _ in shapes] == [4, 4, 4]
    assert len({length for _, length in shapes}) == 3
    assert all(masks), "no padding, ever"
    assert sum(looks) == 4, "each picture is looked at once for all its prompts"
    monkeypatch.undo()
    alone = [answers(captioner, [images[ask.picture]], [Ask(0, ask.prompt, 24)])[0].raw for ask in asks]
    assert [said.raw for said in together] == alone


def test_prompts_of_several_lengths_are_refused_together(captioner: Captioner, drawn: list[world.Picture]) -> None:
    images = captioner.encode([picture.image for picture in drawn[:2]])
    with pytest.raises(ValueError, match="lengths"):
        captioner.generate(images, [Ask(0, BRIEF), Ask(1, DETAILED)])


@pytest.mark.parametrize(
    "error", [MemoryError("no room"), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")]
)
def test_a_forced_out_of_memory_halves_the_batch_and_loses_no_picture(
    folder: Path, drawn: list[world.Picture], error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    captioner = Captioner.load(folder, "cpu")
    images = [picture.image for picture in drawn[:11]]
    asks = [Ask(index, BRIEF) for index in range(11)]
    expected = [said.raw for said in answers(captioner, images, asks)]
    generate = captioner.model.generate
    tried: list[int] = []

    def cramped(**given_: Any) -> torch.Tensor:
        tried.append(len(given_["input_ids"]))
        if tried[-1] > 3:
            raise error
        return generate(**given_)

    monkeypatch.setattr(captioner.model, "generate", cramped)
    assert [said.raw for said in answers(captioner, images, asks)] == expected
    assert tried == [8, 4, 2, 2, 2, 2, 2, 1]
    assert captioner.pace.ceiling == 2
    # The ceiling is remembered.
    tried.clear()
    answers(captioner, images, asks)
    assert tried[0] == 2


def test_a_picture_that_is_too_much_alone_costs_only_itself(
    folder: Path, drawn: list[world.Picture], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = CaptionHandler()
    contexts = []
    for index in range(4):
        drawn[index].image.save(tmp_path / f"{index}.png")
        payload = {
            "source": str(tmp_path / f"{index}.png"),
            "text": str(tmp_path / "captions" / f"{index}.txt"),
            "sidecar": str(tmp_path / "captions" / f"{index}.json"),
            "preview": str(tmp_path / "previews" / f"{index}.jpg"),
            "captioner": "miniature",
        }
        contexts.append(
            JobContext(index, "caption", payload, "cpu", cache, lambda *_: None, lambda: False, lambda: False)
        )
    (tmp_path / "1.png").write_bytes(b"no picture at all")
    voice = handler._loaded(folder, "cpu", "auto")
    assert isinstance(voice, KosmosVoice)
    loaded = voice.captioner
    pixels = loaded.pixels

    def huge(pictures: Sequence[Image.Image]) -> torch.Tensor:
        found = pixels(pictures)
        if any(torch.equal(row, pixels([drawn[2].image])[0]) for row in found):
            raise MemoryError
        return found

    monkeypatch.setattr(loaded, "pixels", huge)
    first, unreadable, large, last = handler.run_batch(contexts)
    assert isinstance(first, JobResult)
    assert isinstance(last, JobResult)
    assert type(unreadable).__name__ == "Refusal"
    assert isinstance(large, MemoryError)
    assert sorted(path.name for path in (tmp_path / "captions").glob("*.txt")) == ["0.txt", "3.txt"]


@given(st.integers(0, 200), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_every_item_comes_out_once_whatever_fits(items: int, most: int, room: int, fitting: int) -> None:
    pace = Pace(most)
    sizes: list[int] = []

    def work(batch: Sequence[int]) -> list[int]:
        if len(batch) > room:
            raise MemoryError
        sizes.append(len(batch))
        return [-item for item in batch]

    found = list(in_batches(list(range(items)), work, pace, lambda: fitting))
    assert found == [(item, -item) for item in range(items)]
    assert all(size <= min(room, most, fitting) for size in sizes)


def test_the_ceiling_grows_slowly_and_never_above_the_most() -> None:
    pace = Pace(8)
    pace.ran_out(8)
    assert pace.ceiling == 4
    for _ in range(GROW_AFTER):
        assert pace.size(100) == 4
        pace.went(4)
    assert pace.size(100) == 5
    for _ in range(GROW_AFTER * 10):
        pace.went(3)  # batches below the ceiling prove nothing
    assert pace.size(100) == 5
    for _ in range(GROW_AFTER * 10):
        pace.went(pace.ceiling)
    assert pace.ceiling == 8
    assert pace.size(0) == 1


def test_errors_that_are_no_want_of_memory_come_through() -> None:
    def work(_: Sequence[int]) -> list[int]:
        message = "shapes do not match"
        raise RuntimeError(message)

    with pytest.raises(RuntimeError, match="shapes"):
        list(in_batches([1], work, Pace(4), lambda: 4))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value), "torch's allocator on the CPU"


def test_the_size_of_a_batch_follows_from_free_memory() -> None:
    fp16, fp32 = picture_bytes(**REAL, element=2), picture_bytes(**REAL, element=4)
    # 196,608 bytes of keys and values a token in fp16, and some for the rest.
    assert 320 * 196_608 < fp16 < 1.6 * 320 * 196_608
    assert batch_size(24 * GIB, GIB, fp16, 32) == 32
    assert 1 < batch_size(2 * GIB, GIB // 4, fp32, 8) <= 8
    assert batch_size(0, GIB, fp16, 32) == 1
    sizes = [batch_size(free * GIB // 8, GIB // 4, fp16, 32) for free in range(64)]
    assert sizes == sorted(sizes)


def make(root: Path, **contents: str) -> Path:
    for name, content in contents.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="ascii")
    return root


def test_free_memory_is_what_the_system_and_the_control_groups_leave(tmp_path: Path) -> None:
    meminfo = "MemTotal: 32000000 kB\nMemAvailable:   8388608 kB\n"
    plain = make(tmp_path / "plain", proc__meminfo=meminfo)
    assert free_memory(plain) == 8 * GIB
    assert free_memory(tmp_path / "nothing") == UNKNOWN
    second = make(
        tmp_path / "second",
        proc__meminfo=meminfo,
        proc__self__cgroup="0::/user/app\n",
        sys__fs__cgroup__user__app__memory_dot_max="max\n",
        sys__fs__cgroup__user__memory_dot_max=f"{3 * GIB}\n",
        sys__fs__cgroup__user__memory_dot_current=f"{2 * GIB}\n",
        sys__fs__cgroup__user__memory_dot_stat=f"anon 5\ninactive_file {GIB}\n",
    )
    assert free_memory(second) == 2 * GIB, "the group above counts, and its cache does not"
    first = make(
        tmp_path / "first",
        proc__meminfo=meminfo,
        proc__self__cgroup="4:cpu,cpuacct:/x\n3:memory:/docker/abc\n",
        sys__fs__cgroup__memory__memory_dot_limit_in_bytes=f"{4 * GIB}\n",
        sys__fs__cgroup__memory__memory_dot_usage_in_bytes=f"{GIB}\n",
    )
    assert free_memory(first) == 3 * GIB, "in a container only the top is there"
    unlimited = make(
        tmp_path / "unlimited",
        proc__meminfo=meminfo,
        proc__self__cgroup="3:memory:/\n",
        sys__fs__cgroup__memory__memory_dot_limit_in_bytes="9223372036854771712\n",
    )
    assert free_memory(unlimited) == 8 * GIB


def test_this_machine_has_memory() -> None:
    assert 0 < free_memory() < 1 << 50
