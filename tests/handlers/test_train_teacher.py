"""``prior: {target: base}``: class pictures are kept to what the base predicts for them."""

from typing import Any

import pytest
import torch
from torch.nn import functional

from handlers.models import miniature
from handlers.train import loop, objective, randomness, room
from handlers.train.auto import Base, make_plan
from handlers.train.base import BaseModel, find_base
from handlers.train.dataset import Frozen
from handlers.train.objective import Batch, Material
from handlers.train.plan import Plan
from handlers.train.teacher import Teacher, beneath, beside
from handlers.train.trainable import Adapter, Whole, adapted, layers_of
from sessions.spec import parse_spec

TEXT = "base: miniature\nbatch_size: 3\nprior: {images: 4, target: base}\nmin_snr: 1\n"
SUBJECTS = 3


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    cache = tmp_path_factory.mktemp("cache")
    miniature.ensure("miniature", cache)
    return find_base("miniature", None, cache)


def plan_of(text: str, facts: Base) -> Plan:
    return make_plan(parse_spec(text), facts, [{"source": "a.png"}] * SUBJECTS, "abcd1234", "fp32")


def material_of(base: BaseModel, text: str = TEXT) -> Material:
    frozen = Frozen(
        [randomness.noise((4, 8, 8), 7, 0, number, "pictures") for number in range(7)],
        [torch.full((4, 8, 8), 0.01)] * 7,
    )
    return Material(plan_of(text, base.facts), frozen, SUBJECTS, base.training.objective(base.load_pipeline()), "cpu")


def told(_step: int, chosen: list[int]) -> dict[str, Any]:
    rows = [randomness.noise((77, 128), 7, 0, index, "words") for index in chosen]
    return {"encoder_hidden_states": torch.stack(rows)}


def stage_of(denoiser: Any, trained: Whole | Adapter, teacher: Teacher | None) -> loop.Stage:
    return loop.Stage(2, "UNet", 0, 8, {}, denoiser, {"unet": trained}, told, teacher)


@pytest.mark.parametrize("method", ["dreambooth", "lora", "dora"])
def test_a_denoiser_that_forgot_nothing_is_moved_by_the_subject_alone(base: BaseModel, method: str) -> None:
    """Each class picture costs nothing yet, each of the subject what it costs without a teacher."""
    material = material_of(base, f"{TEXT}method: {method}\n")
    denoiser = base.load_denoiser().eval()
    trained: Whole | Adapter = Whole(denoiser)
    if method != "dreambooth":
        trained = adapted(
            denoiser, layers_of("unet", convolutions=True), rank=4, alpha=4, dora=method == "dora", seed=1
        )
    parameters = trained.parameters()
    kept = beneath(denoiser) if material.plan.is_adapter else beside(base, material.plan, "cpu")
    teacher = Teacher(*kept, told)
    (batch,) = objective.batches_of_step(material, 2, 0)
    assert batch.of_class.tolist() == [False] * 3 + [True] * 3
    condition = told(0, batch.chosen)
    plain = objective.losses(material, denoiser, batch, condition)
    found = objective.losses(
        material, denoiser, batch, condition, lambda part, noisy: teacher.answer(material.objective, 0, part, noisy)
    )
    torch.testing.assert_close(found[:3], plain[:3], rtol=0, atol=0)
    # A batch of three ends in other last bits than one of six, and DoRA divides by the lengths that it begins with.
    assert float(found[3:].detach().max()) < 1e-8
    assert float(plain[3:].detach().min()) > 1e-3
    found.sum().backward()
    assert all(parameter.requires_grad for parameter in parameters.values())
    assert any(parameter.grad is not None and bool(parameter.grad.any()) for parameter in parameters.values())


@pytest.mark.parametrize("method", ["dreambooth", "lora"])
def test_what_was_learned_is_measured_against_the_base(base: BaseModel, method: str) -> None:
    material = material_of(base, f"{TEXT}method: {method}\n")
    denoiser, untouched = base.load_denoiser().eval(), base.load_denoiser().eval()
    trained: Whole | Adapter = Whole(denoiser)
    if method == "lora":
        trained = adapted(denoiser, layers_of("unet", convolutions=True), rank=4, alpha=4, dora=False, seed=1)
    parameters = trained.parameters()
    kept = beneath(denoiser) if material.plan.is_adapter else beside(base, material.plan, "cpu")
    with torch.no_grad():
        for number, parameter in enumerate(parameters.values()):
            parameter += 0.02 * randomness.noise(tuple(parameter.shape), 7, 0, number, "learned")
    step = 5
    stage = stage_of(denoiser, trained, Teacher(*kept, told))
    expected = torch.zeros(())
    (batch,) = objective.batches_of_step(material, 2, step)
    noisy = material.objective.noisy(batch.latents, batch.noise, batch.timesteps)
    condition = told(step, batch.chosen)
    with torch.no_grad():
        predicted = material.objective.predict(denoiser, noisy, batch.timesteps, condition)
        wanted = material.objective.predict(untouched, noisy, batch.timesteps, condition)
    wanted[:3] = batch.noise[:3]
    losses = functional.mse_loss(predicted, wanted, reduction="none").mean((1, 2, 3))
    weights = material.objective.weights(batch.timesteps, 1.0)
    assert weights is not None
    assert float(weights[3:].min()) < 1.0
    weights[3:] = 1.0
    expected = (losses * weights * batch.shares).sum()
    assert float(losses[3:].min()) > 1e-6
    torch.testing.assert_close(loop.denoising_loss(stage, material, step).detach(), expected, rtol=1e-4, atol=1e-7)


def test_parts_of_a_step_add_up_to_the_whole(base: BaseModel) -> None:
    """Also where a part has pictures of the subject and of the class, and where it has one kind alone."""
    material = material_of(base)
    denoiser = base.load_denoiser().eval()
    trained = Whole(denoiser)
    stage = stage_of(denoiser, trained, Teacher(*beside(base, material.plan, "cpu"), told))
    with torch.no_grad():
        for parameter in trained.parameters().values():
            parameter *= 1.01
        whole = loop.denoising_loss(stage, material, 3)
        for most in (1, 2, 4, 5):
            parts: list[Batch] = [
                part for batch in objective.batches_of_step(material, 2, 3) for part in batch.parts(most)
            ]
            assert max(len(part.chosen) for part in parts) == most
            summed = torch.stack([loop.loss_of(stage, material, 3, part) for part in parts]).sum()
            torch.testing.assert_close(summed, whole, rtol=1e-4, atol=1e-7)


def test_auto_asks_the_base_where_that_is_cheap(base: BaseModel) -> None:
    real = Base("sd15", "sd1", 512, miniature=False)
    flux = Base("flux-dev", "flux", 1024, miniature=False)
    prior = "class: dog\nprior: {images: 4}\n"
    for text, facts, dropout, target in (
        (f"base: miniature\n{prior}", base.facts, 0.35, "base"),
        ("base: miniature\n", base.facts, 0.0, "picture"),
        (f"base: sd15\n{prior}", real, 0.1, "picture"),
        (f"base: flux-dev\n{prior}", flux, 0.0, "picture"),
        ("base: sd15\nclass: dog\nprior: {images: 4, caption_dropout: 0.5, target: base}\n", real, 0.5, "base"),
        ("base: miniature\nprior: {images: 4, weight: 0}\n", base.facts, 0.0, "picture"),
    ):
        plan = plan_of(text, facts)
        assert (plan.prior_caption_dropout, plan.prior_target) == (dropout, target), text


def test_a_base_beside_the_whole_model_counts_in_memory_and_one_beneath_an_adapter_does_not(base: BaseModel) -> None:
    denoiser = base.parameters()["unet"]
    for method, more in (("dreambooth", denoiser), ("finetune", denoiser), ("lora", 0)):
        without, with_base = (
            room.load_of(
                plan_of(f"{TEXT.replace('target: base', f'target: {target}')}method: {method}\n", base.facts), base, 1
            )
            for target in ("picture", "base")
        )
        assert with_base.frozen - without.frozen == more


def test_a_run_of_before_goes_on_as_it_began() -> None:
    """run.json of a version that knew neither: class pictures keep their words, and are their own target."""
    plan = plan_of(TEXT, Base("miniature", "sd1", 64, miniature=True))
    written = plan.to_json()
    del written["prior_caption_dropout"], written["prior_target"]
    before = Plan.from_json(written)
    assert (before.prior_caption_dropout, before.has_teacher) == (0.0, False)
    assert plan.has_teacher
