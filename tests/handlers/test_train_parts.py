"""The pure parts of training: the table of defaults, prompts, randomness, checkpoints, what a run writes."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from handlers.train import checkpoint, dataset, loop, randomness
from handlers.train.auto import Base, make_plan
from handlers.train.charts import grid, smooth, write_loss_curve
from handlers.train.decided import decided
from handlers.train.place import Place, folder_in
from handlers.train.plan import Plan
from handlers.train.prompts import head_noun, instance_token, sample_prompts, spoken_stem, training_prompt
from handlers.train.run import RunFolder
from sessions.refusal import Refusal
from sessions.spec import parse_spec

SD15 = Base("sd15", "sd1", 512, miniature=False)
MINIATURE = Base("miniature", "sd1", 64, miniature=True)


def pictures(count: int, **facts: Any) -> list[dict[str, Any]]:
    return [{"source": f"/s/zwx ({number}).jpg", **facts} for number in range(count)]


def plan_of(text: str, base: Base = SD15, count: int = 10, **facts: Any) -> Plan:
    return make_plan(parse_spec(text), base, pictures(count, **facts), "5e55", "fp32")


@pytest.mark.parametrize(("count", "unet", "text"), [(3, 750, 200), (10, 1500, 350), (13, 1950, 450), (40, 3000, 450)])
def test_the_ancestors_steps(count: int, unet: int, text: int) -> None:
    plan = plan_of("", count=count)
    assert (plan.unet_steps, plan.text_encoder_steps) == (unet, text)
    assert (plan.unet_rate, plan.text_encoder_rate) == (2e-6, 1e-6)
    assert plan.train_unet_in_stage_1
    assert plan.resolution == 512


def test_what_is_written_wins_over_the_table() -> None:
    plan = plan_of(
        'unet: {steps: "20/image", learning_rate: 1e-5}\ntext_encoder: {steps: 0}\nseed: 3\nconcept: style\n'
    )
    assert (plan.unet_steps, plan.unet_rate, plan.text_encoder_steps, plan.seed) == (200, 1e-5, 0, 3)
    assert plan.offset_noise == 0.1
    assert plan_of("concept: style\noffset_noise: 0\n").offset_noise == 0.0


def test_concept_class_and_captions_from_the_pictures() -> None:
    face = plan_of("", subject="face")
    assert (face.concept, face.class_, face.captions) == ("face", "person", "none")
    thing = plan_of("", subject="grounded", noun="a white teapot on a table")
    assert (thing.concept, thing.class_, thing.captions) == ("object", "teapot", "person")
    assert plan_of("captions: true").captions == "all"
    assert plan_of("concept: style").captions == "all"


@pytest.mark.parametrize(
    ("text", "base"), [("resolution: 1024", Base("mine", "sd1", 512, miniature=False)), ("resolution: 256", MINIATURE)]
)
def test_a_resolution_that_the_base_cannot_do(text: str, base: Base) -> None:
    with pytest.raises(Refusal, match="cannot be trained at"):
        plan_of(text, base)


@pytest.mark.parametrize("method", ["dreambooth", "finetune", "lora", "dora"])
def test_a_small_miniature_learns_longer_than_the_first_one(method: str) -> None:
    first = plan_of(f"method: {method}\n", MINIATURE)
    for family in ("sd2", "sdxl"):
        small = plan_of(f"method: {method}\n", Base(f"miniature-{family}", family, 64, miniature=True))
        assert small.unet_steps > first.unet_steps
        assert small.text_encoder_steps >= first.text_encoder_steps
        assert (small.batch_size, small.min_snr) == (first.batch_size, first.min_snr)


def test_a_plan_crosses_a_process_border() -> None:
    plan = plan_of("prompts: [a, b]\nmin_snr: 5\ncheckpoint_every: 7\n", MINIATURE)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@pytest.mark.parametrize(
    ("sources", "token"),
    [
        (["a/zwx (1).jpg", "b/zwx (22).png"], "zwx"),
        (["my_dog-01.jpg", "my_dog-2.jpg"], "my dog"),
        (["Rex 1.jpg", "rex 2.jpg"], "rex"),
    ],
)
def test_the_common_stem_is_the_token(sources: list[str], token: str) -> None:
    assert instance_token(sources, "x") == token


@pytest.mark.parametrize(
    "sources", [["IMG_1.jpg", "IMG_2.jpg"], ["1.jpg", "2.jpg"], ["cat.jpg", "dog.jpg"], ["DSCF1.jpg"]]
)
def test_cameras_names_are_none(sources: list[str]) -> None:
    token = instance_token(sources, "5e55")
    assert 3 <= len(token) <= 4
    assert token == instance_token(["other.jpg", "names.jpg"], "5e55")
    assert len({instance_token(sources, f"{number:x}") for number in range(64)}) > 8


@pytest.mark.parametrize(
    ("phrase", "noun"),
    [("a dog", "dog"), ("The old T-shirt", "t-shirt"), ("a man wearing a hat", "man"), ("it", ""), ("", "")],
)
def test_head_nouns(phrase: str, noun: str) -> None:
    assert head_noun(phrase) == noun


def test_prompts() -> None:
    assert spoken_stem("x/black_cat (12).jpg") == "black cat"
    assert training_prompt("zwx", "dog", "object", "a.jpg", None) == "a photo of zwx dog"
    assert training_prompt("zwx", "", "object", "a.jpg", "on  a\nsofa") == "zwx, on a sofa"
    assert training_prompt("filename", "", "object", "black_cat (1).jpg", None) == "a photo of black cat"
    assert training_prompt("zwx", "", "style", "a.jpg", "a tree") == "a tree, in the style of zwx"
    assert sample_prompts("filename", "", "object", ["rex 1.jpg", "mia 2.jpg", "rex 3.jpg"]) == (
        "a photo of rex",
        "a photo of mia",
    )


@given(st.integers(1, 30), st.integers(1, 7), st.integers(0, 2**32 - 1))
def test_every_picture_once_an_epoch(count: int, batch: int, seed: int) -> None:
    steps = count * 3
    seen = [index for step in range(steps) for index in randomness.pictures_of_step(count, batch, seed, 1, step)]
    for epoch in range(3 * batch):
        assert sorted(seen[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_randomness_depends_on_everything_and_nothing_else() -> None:
    places = [(7, 1, 0, "noise"), (8, 1, 0, "noise"), (7, 2, 0, "noise"), (7, 1, 1, "noise"), (7, 1, 0, "latents")]
    drawn = [randomness.noise((4,), *place) for place in places]
    assert all(not torch.equal(a, b) for index, a in enumerate(drawn) for b in drawn[:index])
    torch.manual_seed(99)
    assert torch.equal(drawn[0], randomness.noise((4,), 7, 1, 0))
    levels = Counter(int(randomness.timesteps(1, 4, 7, 1, step)) for step in range(400))
    assert set(levels) == {0, 1, 2, 3}
    assert min(levels.values()) > 60


@given(count=st.integers(1, 40), step=st.integers(0, 10_000))
def test_a_batch_has_a_time_step_in_every_part_of_the_schedule(count: int, step: int) -> None:
    drawn = randomness.timesteps(count, 1000, 7, 2, step).tolist()
    assert len(drawn) == count
    for part, timestep in enumerate(sorted(drawn)):
        assert math.floor(part * 1000 / count) <= timestep <= min(999, math.ceil((part + 1) * 1000 / count))


def test_the_parts_of_a_batch_fall_to_its_pictures_by_chance() -> None:
    first = Counter(int(randomness.timesteps(4, 4, 7, 1, step)[0]) for step in range(400))
    assert min(first[part] for part in range(4)) > 60


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_schedules(schedule: str) -> None:
    factors = [loop.learning_rate_factor(schedule, step, 10) for step in range(10)]
    assert factors[0] == 1.0
    assert factors == sorted(factors, reverse=True)
    assert (
        factors[-1]
        == {"linear": pytest.approx(0.1), "cosine": pytest.approx(0.0245, abs=1e-3), "constant": 1}[schedule]
    )


def save(session: Path, step: int, run: str = "r1") -> Path:
    tensors = {"w": torch.full((100,), float(step))}
    return checkpoint.save(
        session, step, {"unet": tensors, "optimizer": tensors}, {"run": run, "stage": 1, "seconds": 1.5}
    )


def test_the_newest_two_checkpoints_of_a_run_are_kept(tmp_path: Path) -> None:
    save(tmp_path, 5, "other")
    for step in (10, 20, 100):
        save(tmp_path, step)
    assert {folder.name for folder in (tmp_path / "checkpoints").iterdir()} == {"step-5", "step-20", "step-100"}
    found = checkpoint.newest(tmp_path, "r1", lambda *_: pytest.fail("none is damaged"))
    assert found
    assert found.step == 100
    assert found.state["seconds"] == 1.5
    assert torch.equal(found.load("unet")["w"], torch.full((100,), 100.0))
    assert not found.has("text_encoder")
    checkpoint.prune(tmp_path, "r1", 0)
    assert {folder.name for folder in (tmp_path / "checkpoints").iterdir()} == {"step-5"}


def test_a_step_of_another_run_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 10, "other")
    save(tmp_path, 10)
    found = checkpoint.newest(tmp_path, "r1", lambda *_: None)
    assert found
    assert found.state["run"] == "r1"
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


@given(st.data())
def test_any_damage_to_the_newest_leads_to_the_one_before(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    session = tmp_path_factory.mktemp("session")
    save(session, 1)
    newest = save(session, 2)
    victim = data.draw(st.sampled_from(sorted(path.name for path in newest.iterdir())))
    path = newest / victim
    raw = bytearray(path.read_bytes())
    kind = data.draw(st.sampled_from(["cut", "flip", "gone", "empty"]))
    if kind == "cut":
        path.write_bytes(raw[: data.draw(st.integers(0, len(raw) // 2))])
    elif kind == "gone":
        path.unlink()
    elif kind == "empty":
        path.write_bytes(b"")
    elif victim == "state.json":
        path.write_bytes(bytes(raw).replace(b'sha256": "', b'sha256": "0'))
    else:
        index = data.draw(st.integers(0, len(raw) - 1))
        raw[index] ^= data.draw(st.integers(1, 255))
        path.write_bytes(raw)
    damaged: list[str] = []
    found = checkpoint.newest(session, "r1", lambda folder, _why: damaged.append(folder.name))
    assert found
    assert found.step == 1
    assert damaged == ["step-2"]


def test_a_run_forgets_steps_that_will_be_done_again(tmp_path: Path) -> None:
    run = RunFolder(Place(tmp_path, tmp_path, None), "r1")
    run.log("started")
    for step in range(1, 6):
        run.add_step({"step": step, "loss": 1.0}, f"step {step}/9 loss 1")
    assert len(run.metrics()) == 5
    run.flush()
    with (tmp_path / "runs" / "r1" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # a torn line, as a kill leaves it
    run.forget_after(3)
    run.add_step({"step": 4, "loss": 2.0}, "step 4/9 loss 2")
    run.flush()
    assert [(row["step"], row["loss"]) for row in run.metrics()] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]
    log = (tmp_path / "runs" / "r1" / "log.txt").read_text()
    assert [line.split(" ", 1)[1] for line in log.splitlines()] == [
        "started",
        "step 1/9 loss 1",
        "step 2/9 loss 1",
        "step 3/9 loss 1",
        "step 4/9 loss 2",
    ]


def test_a_write_follows_a_folder_that_moves_under_it(tmp_path: Path) -> None:
    session = tmp_path / "a"
    (session / ".fastsd").mkdir(parents=True)
    (session / ".fastsd" / "session.json").write_text('{"id": "1"}')
    place = Place(session, tmp_path, "1")
    tries = []

    def action(folder: Path) -> Path:
        tries.append(folder)
        if len(tries) == 1:
            session.rename(tmp_path / "b")
        return folder_in(folder, "runs", "x")

    assert place.write(action) == tmp_path / "b" / "runs" / "x"
    assert tries == [session, tmp_path / "b"]
    assert not session.exists()
    with pytest.raises(FileNotFoundError):
        place.write(lambda folder: (folder / "absent").read_bytes())


@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 100), st.integers(1, 100))
def test_the_square_within_a_box(x: int, y: int, width: int, height: int) -> None:
    x0, y0, x1, y1 = dataset.square_within([x, y, x + width, y + height])
    assert x1 - x0 == y1 - y0 == min(width, height)
    assert x <= x0 < x1 <= x + width
    assert y <= y0 < y1 <= y + height
    assert abs((x0 + x1) - (2 * x + width)) <= 1
    assert abs((y0 + y1) - (2 * y + height)) <= 1


def test_too_few_pictures_are_refused_and_named(tmp_path: Path) -> None:
    entries = []
    for number in range(4):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (64, 64), "red").save(path)
        entries.append({"source": str(path), "box": [0, 0, 64, 64]})
    (tmp_path / "1.png").write_bytes(b"no picture")
    rendered = dataset.render_pictures(entries, 64, lambda _: None)
    assert [Path(left["source"]).name for left in rendered.left_out] == ["1.png"]
    assert {image.size for image in rendered.images} == {(64, 64)}
    (tmp_path / "2.png").unlink()
    with pytest.raises(Refusal, match=r"2 readable pictures are too few.*1\.png.*2\.png"):
        dataset.require_enough(dataset.render_pictures(entries, 64, lambda _: None))


def test_charts(tmp_path: Path) -> None:
    rows = [{"step": step, "stage": 1 + step // 6, "loss": 1 / step, "learning_rate": 1e-6} for step in range(1, 12)]
    write_loss_curve(tmp_path / "loss.png", rows)
    with Image.open(tmp_path / "loss.png") as image:
        assert image.size == (800, 500)
        assert len(image.convert("RGB").getcolors(100_000) or []) > 20
    cells = [Image.new("RGB", (64, 64), colour) for colour in ("red", "green", "blue")]
    sheet = grid(cells, ["one", "two", "three " * 40], columns=2)
    found = {colour for _, colour in sheet.getcolors(100_000) or []}
    assert {(255, 0, 0), (0, 128, 0), (0, 0, 255)} <= found
    assert sheet.height > 2 * 64


@given(st.lists(st.floats(0, 10), min_size=1, max_size=50))
def test_smoothing_stays_within_the_values(values: list[float]) -> None:
    assert all(min(values) - 1e-9 <= value <= max(values) + 1e-9 for value in smooth(values))


def test_what_auto_became_is_told_and_what_was_written_is_not() -> None:
    spec = parse_spec("")
    plan = plan_of("", count=10)
    assert decided(spec.to_json(), plan, 10) == [
        "base sd15, method dreambooth, resolution 512",
        "instance zwx, class (no word), concept object, captions those that people wrote",
        "text_encoder 350 steps at 1e-6, unet 1,500 steps at 2e-6",
        "batch_size 1, optimizer adamw, precision fp32, offset_noise 0",
        "samples every 750 steps, steps are for 10 pictures",
    ]
    written = (
        "base: sd15\nmethod: dreambooth\ninstance: zwx\nclass: dog\nconcept: object\nresolution: 512\ncaptions: true\n"
        "text_encoder: {steps: 5, learning_rate: 1e-6}\nunet: {steps: 7, learning_rate: 2e-6}\noptimizer: adamw\n"
        "batch_size: 1\nprecision: fp32\nmemory: auto\noffset_noise: 0\nsample_every: 0\nprompts: [a]\n"
    )
    assert decided(parse_spec(written).to_json(), plan_of(written), 10) == []
    assert decided(parse_spec("unet: {steps: 7}").to_json(), plan_of("unet: {steps: 7}"), 10)[2] == (
        "text_encoder 350 steps at 1e-6, unet at 2e-6"
    )
