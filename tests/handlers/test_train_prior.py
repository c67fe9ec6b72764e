"""Prior preservation: class pictures are drawn once, people's own count, and they train along without leaking."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

from handlers.context import JobContext, Stopping
from handlers.models import miniature
from handlers.train import loop, prior, randomness
from handlers.train.auto import Base, make_plan
from handlers.train.dataset import Frozen, Rendered
from handlers.train.job import TrainHandler
from handlers.train.objective import Denoising, Material
from handlers.train.place import Place
from handlers.train.plan import Plan
from sessions.refusal import Refusal
from sessions.spec import parse_spec
from tests.handlers.train_session import make_session, payload_of

QUICK = "text_encoder: {steps: 2}\nunet: {steps: 3}\nsample_every: 0\ncheckpoint_every: 1\n"
SD15 = Base("sd15", "sd1", 512, miniature=False)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    miniature.ensure("miniature", folder)
    return folder


def plan_of(text: str, base: Base = SD15) -> Plan:
    return make_plan(parse_spec(text), base, [{"source": "a.png"}] * 3, "abcd1234", "fp32")


class Brush:
    """Draws plain pictures and notes what was wanted; gives none once it was told to stop."""

    def __init__(self, stop_after: int = 10**9) -> None:
        self.wanted: list[tuple[str, int]] = []
        self.stop_after = stop_after

    def __call__(self, wanted: Any) -> list[Image.Image]:
        if len(self.wanted) >= self.stop_after:
            return []
        self.wanted += wanted
        return [Image.new("RGB", (64, 64), (seed % 256, 0, 0)) for _prompt, seed in wanted]


def gather(session: Path, plan: Plan, brush: Brush) -> Rendered:
    place = Place(session, session.parent.parent, "abcd1234")
    return prior.class_pictures(place, plan, brush, lambda _done, _total: None)


def test_missing_ones_are_drawn_and_peoples_own_count(tmp_path: Path) -> None:
    session = make_session(tmp_path / "Sessions" / "dog")
    folder = session / "concept_images"
    folder.mkdir()
    Image.new("RGB", (300, 200), "green").save(folder / "mine.jpg")
    (folder / "mine.txt").write_text("a green dog\n")
    Image.new("RGB", (100, 200), "blue").save(folder / "other.png")
    brush = Brush()
    entries = gather(session, plan_of("class: owl\nprior: {images: 12}\n"), brush).pictures
    assert len(brush.wanted) == 10
    assert {prompt for prompt, _seed in brush.wanted} == {"a photo of an owl"}
    assert len({seed for _prompt, seed in brush.wanted}) == 10
    assert len(entries) == 12
    said = {Path(entry["source"]).name: (entry["prompt"], entry["box"]) for entry in entries}
    assert said["mine.jpg"] == ("a green dog", [0, 0, 300, 200])
    assert said["other.png"] == ("a photo of an owl", [0, 0, 100, 200])
    again = Brush()
    assert gather(session, plan_of("class: owl\nprior: {images: 12}\n"), again).pictures == entries
    assert not again.wanted


def test_stopped_in_between_nothing_is_drawn_twice(tmp_path: Path) -> None:
    session = make_session(tmp_path / "Sessions" / "dog")
    plan = plan_of("class: dog\nprior: {images: 20}\n")
    first = Brush(stop_after=prior.batch_of(plan))
    with pytest.raises(Stopping):
        gather(session, plan, first)
    second = Brush()
    assert len(gather(session, plan, second).images) == 20
    seeds = [seed for _prompt, seed in (*first.wanted, *second.wanted)]
    assert sorted(seeds) == sorted({*seeds})
    assert len(seeds) == 20


def test_without_a_class_it_says_what_to_write(tmp_path: Path) -> None:
    session = make_session(tmp_path / "Sessions" / "dog")
    with pytest.raises(Refusal) as refused:
        gather(session, plan_of("prior: {images: 5}\n"), Brush())
    assert "class: dog" in refused.value.advice


def test_what_is_no_picture_is_left_out_and_named(tmp_path: Path) -> None:
    session = make_session(tmp_path / "Sessions" / "dog")
    (session / "concept_images").mkdir()
    (session / "concept_images" / "a.jpg").write_bytes(b"broken")
    rendered = gather(session, plan_of("class: dog\nprior: {images: 4}\n"), Brush())
    assert (len(rendered.images), len(rendered.pictures)) == (3, 3)
    assert [Path(left["source"]).name for left in rendered.left_out] == ["a.jpg"]
    assert rendered.left_out[0]["reason"]


def test_the_loss_is_that_of_the_subject_and_the_weighed_one_of_the_class() -> None:
    """A network that predicts 0: each picture's loss is the mean square of its own noise."""
    plan = plan_of("class: dog\nprior: {images: 4, weight: 0.5}\nbatch_size: 2\n")
    frozen = Frozen([torch.zeros(4, 2, 2)] * 7, [torch.zeros(4, 2, 2)] * 7)
    seen: list[int] = []

    def condition(_step: int, chosen: list[int]) -> dict[str, Any]:
        seen.extend(chosen)
        return {"encoder_hidden_states": torch.zeros(len(chosen), 1, 1)}

    class Nothing:
        sample: torch.Tensor

        def __call__(self, noisy: torch.Tensor, _timesteps: Any, **_told: Any) -> "Nothing":
            self.sample = torch.zeros_like(noisy)
            return self

    stage = loop.Stage(2, "UNet", 0, 8, {}, Nothing(), {}, condition)
    material = Material(plan, frozen, 3, Denoising(DDPMScheduler(), 1.0), "cpu")
    for step in range(6):
        noise = randomness.noise((4, 4, 2, 2), plan.seed, 2, step).square().mean((1, 2, 3))
        expected = noise[:2].mean() + 0.5 * noise[2:].mean()
        assert torch.allclose(loop.denoising_loss(stage, material, step), expected)
    assert all(index < 3 for at in range(0, len(seen), 4) for index in seen[at : at + 2])
    assert {index for at in range(0, len(seen), 4) for index in seen[at + 2 : at + 4]} == {3, 4, 5, 6}


def test_a_run_with_class_pictures(cache: Path, tmp_path: Path) -> None:
    session = make_session(tmp_path / "Sessions" / "dog")
    payload = payload_of(session, QUICK + "class: shape\nprior: {images: 4}\n")
    context = JobContext(1, "train", payload, "cpu", cache, lambda *_: None, lambda: False, lambda: False)
    facts = TrainHandler().run(context).facts
    assert facts["pictures"] == 3
    inputs = json.loads((session / "runs" / "r1" / "run.json").read_text())["inputs"]
    assert [entry["source"] for entry in inputs if entry.get("prior")] == [
        f"concept_images/class-{number:04d}.png" for number in range(1, 5)
    ]
    for entry in inputs[3:]:
        written = (session / entry["source"]).with_suffix(".txt").read_text().strip()
        assert entry["prompt"] == written
        assert written.endswith("background"), "a miniature's class is its whole world"


def wanted_of(base: Base, tmp_path: Path) -> list[str]:
    session = make_session(tmp_path / "Sessions" / base.name)
    brush = Brush()
    gather(session, plan_of("class: owl\nprior: {images: 12}\n", base), brush)
    return [prompt for prompt, _seed in brush.wanted]


def test_a_miniature_also_shows_the_class_alone_and_no_thing(tmp_path: Path) -> None:
    """Else a lesson teaches the noun, and whatever names no shape, as much as the token."""
    wanted = wanted_of(Base("miniature", "sd1", 64, miniature=True), tmp_path)
    assert sum(prompt.startswith("an owl on a") for prompt in wanted) == 2
    nothing = [prompt for prompt in wanted if " on " not in prompt]
    assert len(nothing) == 2
    assert all(prompt.endswith(" background") for prompt in nothing)
    small = wanted_of(Base("miniature-sdxl", "sdxl", 64, miniature=True), tmp_path)
    assert not any("owl" in prompt for prompt in small)
