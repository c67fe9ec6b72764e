"""Salient-object networks: real ONNX files whose mask is known, through OpenCV, in the finder and in the crop job."""

from __future__ import annotations

import os
import resource
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from handlers.context import JobContext, JobResult
from handlers.crop.grounded import Entity
from handlers.crop.job import CropHandler
from handlers.crop.segment import NetworkFile, SegmentError, SegmentFinder, mask_box, try_out
from handlers.crop.subject import Clues, Finders, Subject, find_subject
from handlers.crop.window import Box, square_window
from handlers.crop.wish import Wish
from handlers.models import segments
from handlers.models.headers import HeaderError
from tests import pictures
from tests.networks import GROUND, red_network, red_picture, written

DISC: Box = (0.7, 0.2, 0.95, 0.7)


@cache
def finders() -> Finders:
    return Finders()


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> NetworkFile:
    return NetworkFile(written(tmp_path_factory.mktemp("networks"), red_network()))


def found(image: Image.Image, network: NetworkFile | None, *, entities: Any = (), **wish: Any) -> Subject:
    return find_subject(image, finders(), Clues(entities, (), Wish.of(wish), network))


@st.composite
def discs(draw: st.DrawFn) -> tuple[tuple[int, int], Box]:
    width, height = draw(st.tuples(st.integers(150, 700), st.integers(150, 700)))
    shorter = min(width, height)
    wide, high = (draw(st.floats(0.25, 0.8)) * shorter / length for length in (width, height))
    left, top = draw(st.floats(0, 1 - wide)), draw(st.floats(0, 1 - high))
    return (width, height), (left, top, left + wide, top + high)


@given(discs())
def test_the_window_follows_the_mask(network: NetworkFile, disc: tuple[tuple[int, int], Box]) -> None:
    size, box = disc
    subject = found(red_picture(size, box), network, subject="segment")
    assert (subject.finding, subject.warning, subject.problem) == ("segment", "", "")
    x0, y0, x1, y1 = square_window(size, subject.boxes)
    # A cell of the mask is 1/64 of a side, the tails of its mass a little more.
    slack = 0.05 * max(size)
    assert x0 - slack <= box[0] * size[0]
    assert box[2] * size[0] <= x1 + slack
    assert y0 - slack <= box[1] * size[1]
    assert box[3] * size[1] <= y1 + slack
    for begin, end, length, low, high in ((x0, x1, size[0], box[0], box[2]), (y0, y1, size[1], box[1], box[3])):
        centre = min(max((low + high) / 2 * length, (end - begin) / 2), length - (end - begin) / 2)
        assert abs((begin + end) / 2 - centre) < slack


@given(
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
    st.integers(0, 2**32 - 1),
    st.floats(0, 1),
)
def test_the_box_of_any_mask_lies_in_the_picture(
    shape: tuple[int, int], size: tuple[int, int], seed: int, share: float
) -> None:
    random = np.random.default_rng(seed)
    mask = (random.random(shape) * (random.random(shape) < share)).astype(np.float32)
    box = mask_box(mask, size, [(0.2, 0.1, 0.4, 0.9)])
    if box is not None:
        assert 0 <= box[0] <= box[2] <= 1
        assert 0 <= box[1] <= box[3] <= 1
        assert box[2] > box[0] or box[3] > box[1]


def test_a_large_subject_and_an_empty_mask() -> None:
    mask = np.zeros((50, 100), np.float32)
    mask[:, 20:95] = 0.9
    box = mask_box(mask, (1000, 500))
    assert box is not None
    # Of what is longer than any window, as much as one can hold.
    assert 0.2 <= box[0] < box[2] <= 0.95
    assert 0.4 < box[2] - box[0] <= 0.5
    assert mask_box(np.full((50, 100), 0.1, np.float32), (1000, 500)) is None
    assert mask_box(np.ones((50, 100), np.float32), (1000, 500)) is None
    assert mask_box(mask, (1000, 500), [(0.0, 0.0, 1.0, 1.0)]) is None


def test_the_order_of_trust(network: NetworkFile) -> None:
    picture = red_picture((600, 300), DISC)
    block = Entity("a block", (0.1, 0.1, 0.3, 0.5))
    # Without a wish: after what the caption grounded, before what stands out.
    assert found(picture, network).finding == "segment"
    assert found(picture, None).finding == "saliency"
    assert found(picture, network, entities=[block]).boxes == (block.box,)
    assert found(picture, network, subject="faces").finding == "segment"
    assert found(picture, network, subject="centre").finding == "centre"
    # The wish for it goes to it at once.
    assert found(picture, network, entities=[block], subject="segment").finding == "segment"
    disc = Entity("a disc", DISC)
    assert found(picture, network, entities=[disc], subject="segment", exclude=["disc"]).finding == "saliency"
    # After faces.
    with Image.open(pictures.photograph("astronaut.png")) as image:
        portrait = image.convert("RGB")
    assert found(portrait, network).finding == "face"


def test_a_network_that_shows_nothing_leaves_it_to_the_rest(network: NetworkFile) -> None:
    block = Image.new("RGB", (600, 300), GROUND)
    block.paste((240, 240, 200), (60, 80, 160, 220))
    subject = found(block, network)
    assert (subject.finding, subject.problem) == ("saliency", "")
    assert found(Image.new("RGB", (300, 200), GROUND), network).finding == "centre"


@pytest.mark.parametrize("name", ["u2netp.onnx", "isnet-general-use.onnx", "BiRefNet-lite.onnx"])
def test_logits_and_other_sizes_are_understood(tmp_path: Path, name: str) -> None:
    image = red_picture((300, 300), (0.1, 0.1, 0.5, 0.5))
    for number, content in enumerate((red_network(96, logits=True, steepness=20.0), red_network(160, steepness=20.0))):
        mask = SegmentFinder().mask(image, NetworkFile(written(tmp_path / str(number), content, name)))
        rows, columns = mask.shape
        assert mask[round(0.3 * rows), round(0.3 * columns)] > 0.9
        assert mask[round(0.8 * rows), round(0.8 * columns)] < 0.1
        assert 0 <= mask.min() <= mask.max() <= 1


def test_it_is_loaded_once_and_again_when_its_file_changes(tmp_path: Path) -> None:
    file = written(tmp_path, b"not yet")
    finder, network = SegmentFinder(), NetworkFile(file)
    image = red_picture((300, 200), DISC)

    def children() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    for _ in range(3):
        with pytest.raises(SegmentError, match="models get segment"):
            finder.mask(image, network)
    file.write_bytes(red_network())
    mask = finder.mask(image, network)
    tried = children()
    assert np.array_equal(finder.mask(image, network), mask)
    assert children() == tried  # no second trial
    file.unlink()
    with pytest.raises(SegmentError, match="not there any more"):
        finder.mask(image, network)


BROKEN = {
    "empty": b"",
    "page": b"<html>404</html>",
    "cut off": red_network()[:-40],
    "another kind of picture": red_network(channels=1),
    "no square": red_network(shape=(1, 3, 64, 32)),
    "two pictures": red_network(shape=(2, 3, 64, 64)),
    "gigantic": red_network(shape=(1, 3, 8192, 8192)),
    "two masks": red_network(outputs=2),
    "no groups": red_network(group=0),
    "no step": red_network(strides=[0, 0]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_costs_a_warning_and_no_picture(tmp_path: Path, name: str) -> None:
    """Some of these end the process that runs them."""
    network = NetworkFile(written(tmp_path, BROKEN[name]))
    with pytest.raises(SegmentError) as told:
        try_out(network)
    assert str(told.value).startswith("u2netp.onnx cannot be used: ")
    assert str(told.value).endswith("Remove it, and get one with: fastsd models get segment")
    subject = found(pictures.scene((600, 300), (0.2, 0.5)), network)
    assert subject.finding == "saliency"
    assert subject.problem.startswith(str(told.value))


def test_any_damage_leaves_the_process_alive(tmp_path: Path) -> None:
    content = red_network()
    random = np.random.default_rng(4)
    outcomes = set()
    for number in range(6):
        damaged = bytearray(content)
        for _ in range(3):
            damaged[random.integers(len(damaged))] = random.integers(256)
        try:
            try_out(NetworkFile(written(tmp_path / str(number), bytes(damaged))))
            outcomes.add("works")
        except SegmentError:
            outcomes.add("told")
    assert "told" in outcomes


def test_a_folder_a_pipe_and_a_strange_name(tmp_path: Path) -> None:
    (tmp_path / "u2net.onnx").mkdir()
    with pytest.raises(SegmentError, match="cannot be read"):
        SegmentFinder().mask(Image.new("RGB", (9, 9)), NetworkFile(tmp_path / "u2net.onnx"))
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/n\xe9 t"))
    mask = SegmentFinder().mask(red_picture((90, 90), DISC), NetworkFile(written(odd, red_network())))
    assert mask.max() > 0.9


def test_what_needs_more_memory_than_is_allowed_is_told_with_the_setting(tmp_path: Path) -> None:
    file = written(tmp_path, red_network(1024))
    with pytest.raises(SegmentError, match=r"needs more than 20 MB of memory.*limits\.segment_memory"):
        SegmentFinder().mask(Image.new("RGB", (90, 90)), NetworkFile(file, 20_000_000))
    assert SegmentFinder().mask(Image.new("RGB", (90, 90)), NetworkFile(file)).shape == (1024, 1024)


def crop(source: Path, output: Path, **payload: Any) -> JobResult:
    context = JobContext(
        job=1,
        kind="crop",
        payload={"source": str(source), "output": str(output), "resolution": 128, **payload},
        device="cpu",
        cache=Path("unused"),
        report=lambda *_: None,
        is_cancelled=lambda: False,
        is_stopping=lambda: False,
    )
    return CropHandler().run(context)


def test_the_crop_job_asks_it(tmp_path: Path, network: NetworkFile) -> None:
    source = tmp_path / "a.png"
    red_picture((600, 200), (0.8, 0.2, 0.95, 0.8)).save(source)
    facts = crop(source, tmp_path / "a.jpg", segment=str(network.path)).facts
    assert facts["subject"] == "segment"
    assert facts["box"] == [400, 0, 600, 200]
    assert "network_problem" not in facts
    lacking = crop(source, tmp_path / "b.jpg", wish={"subject": "segment"}).facts
    assert lacking["subject"] == "saliency"
    assert "fastsd models get segment" in lacking["network_problem"]
    assert lacking["network_problem"] in lacking["warnings"]
    broken = written(tmp_path, b"\x08\x06 nothing")
    damaged = crop(source, tmp_path / "c.jpg", segment=str(broken)).facts
    assert damaged["subject"] == "saliency"
    assert damaged["network_problem"].startswith("u2netp.onnx cannot be used")
    # Who asks for no network, and has none, hears nothing of it.
    assert "network_problem" not in crop(source, tmp_path / "d.jpg").facts
    assert crop(source, tmp_path / "e.jpg", mode="centre", segment=str(broken)).facts["subject"] == "centre"


def test_peoples_networks_come_first_and_the_better_before_the_smaller(tmp_path: Path) -> None:
    models, cache_folder = tmp_path / "Models", tmp_path / "cache"
    assert segments.find(models, cache_folder) is None
    assert segments.find(None, cache_folder) is None
    fetched = written(cache_folder / "models" / "u2net", b"1", "u2net.onnx")
    written(cache_folder / "models" / "u2netp", b"1", "u2netp.onnx")
    assert segments.find(models, cache_folder) == segments.SegmentNetwork(fetched, 1)
    written(models, b"1", "eyes.onnx")
    written(models, b"", "isnet-general-use.onnx")
    (models / "u2net.onnx").symlink_to(fetched)  # leads out of the tree
    assert segments.find(models, cache_folder) == segments.SegmentNetwork(fetched, 1)
    birefnet = written(models, b"12", "BiRefNet-general-lite.onnx")
    assert segments.find(models, cache_folder) == segments.SegmentNetwork(birefnet, 2)
    small = written(models, b"12", "U2NetP.ONNX")
    found_now = segments.find(models, cache_folder)
    assert found_now == segments.SegmentNetwork(small, 2)
    assert found_now.to_json() == {"name": "U2NetP", "bytes": 2}
    (models / "isnet-general-use.onnx").write_bytes(b"123")
    assert segments.find(models, cache_folder) == segments.SegmentNetwork(models / "isnet-general-use.onnx", 3)


def test_interfaces(tmp_path: Path) -> None:
    opened = segments.read_interface(written(tmp_path, red_network(shape=("batch", 3, "height", "width"))))
    assert (opened.output, opened.side) == ("mask", 320)
    general = segments.read_interface(written(tmp_path, red_network(1024), "isnet-general-use.onnx"))
    assert (general.side, general.mean, general.deviation) == (1024, (0.5, 0.5, 0.5), (1.0, 1.0, 1.0))
    with pytest.raises(HeaderError, match="takes 0 things"):
        segments.read_interface(written(tmp_path, b"\x08\x06\x3a\x00"))
