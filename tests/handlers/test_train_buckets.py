"""Buckets: shapes, a picture's window in them, the order of the steps, and a training of wide and tall pictures."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageStat
from safetensors import safe_open

from handlers.context import JobContext, JobResult
from handlers.crop.window import PixelBox
from handlers.models import miniature
from handlers.train import dataset, loop, randomness
from handlers.train.auto import Base, make_plan
from handlers.train.buckets import (
    Shape,
    bucket_counts,
    bucket_frame,
    bucket_shapes,
    bucket_window,
    is_filled,
    told_of,
)
from handlers.train.job import TrainHandler
from handlers.train.objective import Denoising, Material
from handlers.train.place import Place
from handlers.train.plan import Plan
from sessions import files
from sessions.spec import parse_spec
from tests import pictures
from tests.handlers.train_session import make_long_session, payload_of

MINIATURE = Base("miniature", "sd1", 64, miniature=True)
KINDS = st.sampled_from([(64, 8), (96, 8), (128, 8), (256, 64), (512, 64), (768, 64), (1024, 64)])


@st.composite
def windows(draw: st.DrawFn, least: int = 8) -> tuple[tuple[int, int], PixelBox]:
    """A picture's size, and a square in it: the largest along one side, or any."""
    size = draw(st.tuples(st.integers(least, 4000), st.integers(least, 4000)))
    side = draw(st.just(min(size)) | st.integers(least, min(size)))
    left, top = draw(st.integers(0, size[0] - side)), draw(st.integers(0, size[1] - side))
    return size, (left, top, left + side, top + side)


def swapped(box: PixelBox) -> PixelBox:
    return box[1], box[0], box[3], box[2]


@given(KINDS)
def test_shapes(kind: tuple[int, int]) -> None:
    resolution, step = kind
    shapes = bucket_shapes(resolution, step)
    assert (resolution, resolution) in shapes
    assert list(shapes) == sorted(set(shapes))
    assert {(height, width) for width, height in shapes} == set(shapes)
    for width, height in shapes:
        assert width % step == height % step == 0
        assert 0.9 * resolution**2 <= width * height <= resolution**2
        assert max(width, height) <= 2 * min(width, height)


def test_the_shapes_of_a_miniature_and_of_sd() -> None:
    assert bucket_shapes(64, 8) == ((48, 80), (56, 72), (64, 64), (72, 56), (80, 48))
    assert bucket_shapes(512, 64) == ((384, 640), (448, 576), (512, 512), (576, 448), (640, 384))
    assert bucket_shapes(64, 64) == ((64, 64),)
    with pytest.raises(ValueError, match="does not divide"):
        bucket_shapes(500, 64)


@given(windows(), KINDS, st.data())
def test_a_window_is_inside_has_the_aspect_and_keeps_the_square(
    window: tuple[tuple[int, int], PixelBox], kind: tuple[int, int], data: st.DataObject
) -> None:
    size, square = window
    shape = data.draw(st.sampled_from(bucket_shapes(*kind)))
    x0, y0, x1, y1 = got = bucket_window(size, square, shape)
    assert 0 <= x0 < x1 <= size[0]
    assert 0 <= y0 < y1 <= size[1]
    width, height = x1 - x0, y1 - y0
    if width > height:
        assert abs(height - width * shape[1] / shape[0]) <= 1
    else:
        assert abs(width - height * shape[0] / shape[1]) <= 1
    side = square[2] - square[0]
    for axis in (0, 1):
        overlap = min(got[axis + 2], square[axis + 2]) - max(got[axis], square[axis])
        assert overlap == min(side, got[axis + 2] - got[axis]), "one lies within the other"
        same_centre = abs(got[axis] + got[axis + 2] - square[axis] - square[axis + 2]) <= 1
        assert same_centre or got[axis] == 0 or got[axis + 2] == size[axis]
    if all(side * mine / min(shape) <= length for mine, length in zip(shape, size, strict=True)):
        assert min(width, height) == side, "the picture allows it: the square is whole"
    assert swapped(bucket_window((size[1], size[0]), swapped(square), shape[::-1])) == got


def test_a_square_outside_of_the_picture_is_none() -> None:
    for square in ((0, 0, 101, 101), (-1, 0, 9, 10), (5, 5, 5, 5)):
        with pytest.raises(ValueError, match="leaves the picture"):
            bucket_window((100, 200), square, (64, 64))


@given(windows(), KINDS)
@example(((320, 320), (0, 0, 192, 192)), (256, 64))
def test_the_bucket_is_the_nearest_that_is_filled(
    window: tuple[tuple[int, int], PixelBox], kind: tuple[int, int]
) -> None:
    size, square = window
    shapes = bucket_shapes(*kind)
    frame = bucket_frame(size, square, shapes)
    assert frame.window == bucket_window(size, square, frame.shape)

    def distance(shape: Shape) -> float:
        return abs(math.log(size[0] / size[1]) - math.log(shape[0] / shape[1]))

    filled = [shape for shape in shapes if is_filled(type(frame)(bucket_window(size, square, shape), shape))]
    assert distance(frame.shape) <= min(map(distance, filled or shapes)) + 1e-9
    assert bool(filled) == is_filled(frame)
    if square[2] - square[0] >= kind[0]:
        assert is_filled(frame), "what is large enough for the square is never enlarged"
    if size[0] == size[1] and frame.shape[0] != frame.shape[1]:
        return  # a square picture lies as near to the wide bucket as to the tall one: the order of the shapes decides
    other = bucket_frame((size[1], size[0]), swapped(square), shapes)
    assert (other.shape, swapped(other.window)) == (frame.shape[::-1], frame.window)


@given(windows(least=64), st.integers(2, 4), st.sampled_from([(64, 8), (32, 8)]))
def test_a_bigger_copy_gives_the_same_window(
    window: tuple[tuple[int, int], PixelBox], times: int, kind: tuple[int, int]
) -> None:
    size, square = window
    shapes = bucket_shapes(*kind)
    small = bucket_frame(size, square, shapes)
    x0, y0, x1, y1 = square
    big = bucket_frame((size[0] * times, size[1] * times), (x0 * times, y0 * times, x1 * times, y1 * times), shapes)
    if small.shape != big.shape:
        # The copy fills a bucket that was nearer, and that the small picture would have had to be enlarged for.
        assert not is_filled(type(small)(bucket_window(size, square, big.shape), big.shape))
        return
    tolerance = 0.02 * min(size) + 1
    assert all(abs(b / times - s) <= tolerance for s, b in zip(small.window, big.window, strict=True))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_by_exif_the_window_and_the_pixels_are_the_same(tmp_path: Path, orientation: int) -> None:
    upright = Image.radial_gradient("L").resize((210, 120)).convert("RGB")
    upright.paste("red", (20, 10, 60, 40))
    path = tmp_path / "a.png"
    path.write_bytes(pictures.with_orientation(upright, orientation))
    entry = {"source": str(path), "box": [60, 0, 180, 120]}
    (found,) = dataset.with_buckets([entry], bucket_shapes(64, 8), lambda _: None)
    assert (found["picture"], found["bucket"], found["window"]) == ([210, 120], [80, 48], [10, 0, 210, 120])
    (image,) = dataset.render_pictures([found], 64, lambda _: None).images
    assert image.size == (80, 48)
    expected = upright.crop((10, 0, 210, 120)).resize((80, 48), Image.Resampling.LANCZOS)
    assert max(ImageStat.Stat(ImageChops.difference(image, expected)).mean) < 1.0


def test_crop_off_and_a_persons_box(tmp_path: Path) -> None:
    """The whole picture gives the largest window in its middle; a small square at the edge grows inwards."""
    path = tmp_path / "a.png"
    Image.new("RGB", (210, 120), "red").save(path)
    entries = [{"source": str(path), "box": box} for box in ([0, 0, 210, 120], [140, 50, 210, 120])]
    found = dataset.with_buckets(entries, bucket_shapes(64, 8), lambda _: None)
    assert [entry["bucket"] for entry in found] == [[80, 48], [80, 48]]
    assert [entry["window"] for entry in found] == [[5, 0, 205, 120], [93, 50, 210, 120]]


def test_what_cannot_be_read_is_left_out_and_named(tmp_path: Path) -> None:
    broken, gone, cut = tmp_path / "a.png", tmp_path / "b.png", tmp_path / "c.png"
    broken.write_bytes(b"no picture")
    Image.new("RGB", (70, 70)).save(cut)
    entries = [{"source": str(path), "box": [0, 0, 90, 90]} for path in (broken, gone, cut)]
    found = dataset.with_buckets(entries, bucket_shapes(64, 8), lambda _: None)
    assert found == entries
    left = dataset.render_pictures(found, 64, lambda _: None).left_out
    assert [Path(each["source"]).name for each in left] == ["a.png", "b.png", "c.png"]


SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=5)


@given(SIZES, st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_every_picture_comes_as_often_as_every_other(sizes: list[int], batch: int, seed: int) -> None:
    seen: Counter[tuple[int, int]] = Counter()
    turns: Counter[int] = Counter()
    for step in range(sum(sizes)):
        group, earlier = randomness.group_of_step(sizes, seed, 1, step)
        assert earlier == turns[group]
        turns[group] += 1
        seen.update((group, index) for index in randomness.pictures_of_step(sizes[group], batch, seed, 1, earlier))
    assert set(seen.values()) == {batch}
    assert len(seen) == sum(sizes)


@given(st.integers(1, 40), st.integers(0, 500))
def test_one_group_is_no_group(size: int, step: int) -> None:
    assert randomness.group_of_step([size], 7, 1, step) == (0, step)


def frozen_of(*shapes: Shape) -> dataset.Frozen:
    random = torch.Generator().manual_seed(1)
    mean = [torch.randn((4, height, width), generator=random) for width, height in shapes]
    return dataset.Frozen(mean, [values.abs() for values in mean])


@pytest.mark.parametrize("shapes", [[(8, 8)] * 3, [(8, 8), (10, 6), (8, 8), (6, 10), (10, 6)]])
def test_latents_of_several_shapes_come_back(tmp_path: Path, shapes: list[Shape]) -> None:
    frozen = frozen_of(*shapes)
    place = Place(tmp_path, tmp_path, None)
    digest = dataset.store(place, "r1", frozen)
    loaded = dataset.load(place, "r1", digest)
    assert loaded
    for before, after in ((frozen.mean, loaded.mean), (frozen.std, loaded.std)):
        assert len(before) == len(after) == len(shapes)
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    if len(set(shapes)) == 1:
        # As it was before there were buckets: a run that began then goes on.
        with safe_open(tmp_path / ".fastsd" / "frozen" / "r1" / "latents.safetensors", "pt") as file:
            assert sorted(file.keys()) == ["mean", "std"]
            assert torch.equal(file.get_tensor("mean"), torch.stack(list(frozen.mean)))


SCHEDULER = DDPMScheduler()


class Echo:
    """A network that predicts a quarter of what it sees, and remembers the shapes."""

    def __init__(self) -> None:
        self.sample = torch.zeros(0)
        self.seen: list[tuple[int, ...]] = []

    def __call__(self, noisy: torch.Tensor, _timesteps: Any) -> "Echo":
        self.seen.append(tuple(noisy.shape))
        self.sample = noisy / 4
        return self


def material_of(frozen: dataset.Frozen, subjects: int, text: str) -> tuple[loop.Stage, Material, Echo]:
    plan = make_plan(parse_spec(text), MINIATURE, [{"source": "a.png"}] * 3, "abcd1234", "fp32")
    echo = Echo()
    stage = loop.Stage(2, "UNet", 0, 8, {}, echo, {}, lambda _step, _chosen: {})
    return stage, Material(plan, frozen, subjects, Denoising(SCHEDULER, 0.18), "cpu"), echo


def loss_before_buckets(material: Material, step: int) -> torch.Tensor:
    """What a step of squares was computed as in one go, with the network above."""
    plan, scheduler = material.plan, SCHEDULER
    mean, std = torch.stack(list(material.frozen.mean)), torch.stack(list(material.frozen.std))
    chosen = randomness.pictures_of_step(material.subjects, plan.batch_size, plan.seed, 2, step)
    timesteps = randomness.timesteps(len(chosen), 1000, plan.seed, 2, step)
    rest = len(mean) - material.subjects
    if rest:
        of_class = randomness.pictures_of_step(rest, plan.batch_size, plan.seed, 2, step, purpose="class")
        chosen = [*chosen, *(material.subjects + index for index in of_class)]
        more = randomness.timesteps(len(of_class), 1000, plan.seed, 2, step, purpose="class timesteps")
        timesteps = torch.cat([timesteps, more])
    shape = tuple(mean[chosen].shape)
    within = randomness.noise(shape, plan.seed, 2, step, "latents")
    latents = (mean[chosen] + std[chosen] * within) * 0.18
    noise = randomness.noise(shape, plan.seed, 2, step)
    noise = noise + plan.offset_noise * randomness.noise((*shape[:2], 1, 1), plan.seed, 2, step, "offset")
    predicted = scheduler.add_noise(latents, noise, timesteps) / 4
    losses = (predicted - noise).square().mean(dim=(1, 2, 3))
    snr = compute_snr(scheduler, timesteps)
    losses = losses * snr.clamp(max=5) / snr
    loss = losses[: plan.batch_size].mean()
    return loss + plan.prior_weight * losses[plan.batch_size :].mean() if rest else loss


@pytest.mark.parametrize("subjects", [7, 4])
def test_squares_are_trained_as_before_there_were_buckets(subjects: int) -> None:
    text = "batch_size: 2\noffset_noise: 0.1\nmin_snr: 5\nclass: dog\nprior: {images: 4, weight: 0.5}\n"
    stage, material, echo = material_of(frozen_of(*[(8, 8)] * 7), subjects, text)
    for step in range(12):
        torch.testing.assert_close(loop.denoising_loss(stage, material, step), loss_before_buckets(material, step))
    assert set(echo.seen) == {(2 if subjects == 7 else 4, 4, 8, 8)}, "in one go"


def test_a_step_sees_one_shape_and_class_pictures_stay_square() -> None:
    text = "batch_size: 2\nbuckets: true\nclass: dog\nprior: {images: 2, weight: 0.5}\n"
    frozen = frozen_of((10, 6), (8, 8), (10, 6), (6, 10), (8, 8), (8, 8))
    stage, material, echo = material_of(frozen, 4, text)
    assert material.groups == [[0, 2], [1], [3]]
    for step in range(8):
        loop.denoising_loss(stage, material, step)
    squares = [shape for shape in echo.seen if shape == (4, 4, 8, 8)]
    pairs = [shape for shape in echo.seen if shape != (4, 4, 8, 8)]
    assert len(squares) == 2, "a square of the subject goes with those of the class"
    assert pairs[1::2] == [(2, 4, 8, 8)] * 6
    assert Counter(pairs[::2]) == {(2, 4, 6, 10): 4, (2, 4, 10, 6): 2}


def test_what_the_log_says() -> None:
    counts = bucket_counts([{"bucket": [80, 48]}, {"bucket": [48, 80]}, {"bucket": [80, 48]}, {"prior": True}])
    assert counts == [{"size": [48, 80], "pictures": 1}, {"size": [80, 48], "pictures": 2}]
    told = told_of(counts, 2)
    assert told[0] == "buckets: 1 of 48 × 80, 2 of 80 × 48"
    assert len(told) == 2
    assert "fewer pictures than a batch of 2, so that they repeat within it: 1 of 48 × 80;" in told[1]
    assert told_of(counts, 1) == told[:1]
    assert told_of([], 6) == []


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    miniature.ensure("miniature", folder)
    return folder


def train(session: Path, cache: Path, spec: str, **changes: Any) -> JobResult:
    context = JobContext(
        1, "train", payload_of(session, spec, **changes), "cpu", cache, lambda *_: None, lambda: False, lambda: False
    )
    return TrainHandler().run(context)


def test_a_miniature_trains_on_wide_and_tall_pictures(cache: Path, tmp_path: Path) -> None:
    session = make_long_session(tmp_path / "Sessions" / "dog")
    (session / "zwx (9).png").write_bytes(b"broken")
    spec = (
        "buckets: true\nbatch_size: 2\ntext_encoder: {steps: 3}\nunet: {steps: 5, learning_rate: 1e-3}\n"
        "sample_every: 0\nclass: shape\nprior: {images: 3}\n"
    )
    facts = train(session, cache, spec).facts
    counts = [{"size": [56, 72], "pictures": 2}, {"size": [64, 64], "pictures": 1}, {"size": [80, 48], "pictures": 2}]
    assert facts["buckets"] == counts
    assert (facts["pictures"], [left["source"] for left in facts["left_out"]]) == (5, ["zwx (9).png"])
    record = json.loads((session / "runs" / "r1" / "run.json").read_text())
    assert (record["buckets"], record["plan"]["buckets"]) == (counts, True)
    subjects = [entry for entry in record["inputs"] if not entry.get("prior")]
    assert [(entry["picture"], entry["bucket"]) for entry in subjects] == [
        ([160, 96], [80, 48]),
        ([200, 120], [80, 48]),
        ([84, 108], [56, 72]),
        ([90, 120], [56, 72]),
        ([100, 100], [64, 64]),
    ]
    assert subjects[0]["box"] == [32, 0, 128, 96]
    assert subjects[0]["window"] == [0, 0, 160, 96]
    assert not any("bucket" in entry for entry in record["inputs"] if entry.get("prior"))
    log = (session / "runs" / "r1" / "log.txt").read_text()
    assert "buckets: 2 of 56 × 72, 1 of 64 × 64, 2 of 80 × 48" in log
    assert "fewer pictures than a batch of 2, so that they repeat within it: 1 of 64 × 64;" in log
    rows = [json.loads(line) for line in (session / "runs" / "r1" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert all(0 < row["loss"] < 10 for row in rows)


def test_buckets_change_nothing_for_squares(cache: Path, tmp_path: Path) -> None:
    """Of square pictures a run with buckets makes the same bytes as one without."""
    made = []
    for name, extra in (("with", "buckets: true\n"), ("without", "")):
        session = make_long_session(tmp_path / name / "Sessions" / "dog")
        for path in session.glob("*.png"):
            with Image.open(path) as image:
                square = image.crop((0, 0, 84, 84))
            square.save(path)
        result = train(
            session,
            cache,
            extra + "batch_size: 2\ntext_encoder: {steps: 2}\nunet: {steps: 3, learning_rate: 1e-3}\nsample_every: 0\n",
        )
        finished = Path(result.facts["finished"])
        made.append({path.parent.name: files.sha256_of(path) for path in finished.rglob("*.safetensors")})
    assert len(made[0]) == 3
    assert made[0] == made[1]


def test_what_sdxl_is_told_of_sizes() -> None:
    """Heights before widths: the window's, no crop, the shape's; a miniature knows the shape alone."""
    inputs = [
        {"box": [350, 0, 1250, 900], "window": [50, 0, 1550, 900], "bucket": [1280, 768]},
        {"box": [0, 100, 900, 1000]},
    ]
    sdxl = make_plan(parse_spec("buckets: true\n"), Base("sdxl", "sdxl", 1024, miniature=False), [], "s", "fp32")
    assert dataset.sizes_told(inputs, sdxl).tolist() == [
        [900, 1500, 0, 0, 768, 1280],
        [900, 900, 0, 0, 1024, 1024],
    ]
    inputs[0]["bucket"] = [80, 48]
    small = make_plan(parse_spec("buckets: true\n"), MINIATURE, [], "s", "fp32")
    assert dataset.sizes_told(inputs, small).tolist() == [[48, 80, 0, 0, 48, 80], [64, 64, 0, 0, 64, 64]]


def test_the_miniature_of_sdxl_trains_an_adapter_in_buckets(cache: Path, tmp_path: Path) -> None:
    session = make_long_session(tmp_path / "Sessions" / "dog")
    spec = "base: miniature-sdxl\nbuckets: true\nmethod: lora\nbatch_size: 1\nunet: {steps: 5}\nsample_every: 0\n"
    facts = train(session, cache, spec, base="miniature-sdxl").facts
    assert [bucket["size"] for bucket in facts["buckets"]] == [[56, 72], [64, 64], [80, 48]]
    assert (Path(facts["finished"]) / "pytorch_lora_weights.safetensors").is_file()


def test_a_plan_from_before_buckets() -> None:
    plan = make_plan(parse_spec("buckets: true\n"), MINIATURE, [{"source": "a.png"}] * 3, "abcd1234", "fp32")
    assert plan.bucket_shapes == bucket_shapes(64, 8)
    value = json.loads(json.dumps(plan.to_json()))
    assert Plan.from_json(value) == plan
    del value["buckets"]
    assert not Plan.from_json(value).buckets
    sd = make_plan(parse_spec("buckets: true\n"), Base("sd15", "sd1", 512, miniature=False), [], "abcd1234", "fp32")
    assert sd.bucket_shapes == bucket_shapes(512, 64)
