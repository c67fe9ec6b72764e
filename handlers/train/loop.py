"""The training loop. Read it from top to bottom."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch

from handlers.out_of_memory import is_out_of_memory
from handlers.train import objective, randomness
from handlers.train.average import Average
from handlers.train.crew import Crew
from handlers.train.divergence import Diverged, smaller_rate
from handlers.train.fitting import Fitting
from handlers.train.objective import Batch, Material
from handlers.train.optimizers import Groups, Tensors, Updates
from handlers.train.plan import Plan
from handlers.train.teacher import Teacher
from handlers.train.trainable import Trainable


@dataclass(frozen=True)
class Rate:
    """A learning rate over a stage.

    Attributes:
        value: at the first step.
        steps: in which it falls to 0 as the schedule says; after them it is 0.
    """

    value: float
    steps: int

    def at(self, step: int, schedule: str) -> float:
        """The rate in a step counted from 0."""
        return self.value * learning_rate_factor(schedule, step, self.steps) if step < self.steps else 0.0


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        number: 1 or 2; a method of one stage has stage 2 alone.
        title: for the status line.
        first: steps of the run done before it.
        steps: how many it has.
        rates: name → learning rate, of each that is trained.
        denoiser: predicts; trained if it is among ``trained``.
        trained: name → what of which module gets gradients.
        condition: (step from 0, pictures' indices) → the denoiser's keyword arguments: what it is told of them.
        teacher: what class pictures are kept to; None: to themselves.
    """

    number: int
    title: str
    first: int
    steps: int
    rates: Mapping[str, Rate]
    denoiser: Any
    trained: Mapping[str, Trainable]
    condition: Callable[[int, list[int]], Mapping[str, Any]]
    teacher: Teacher | None = None

    @property
    def rate(self) -> Rate:
        """The one that is shown: the denoiser's where it is trained."""
        shown = (name for name, trained in self.trained.items() if trained.module is self.denoiser)
        return self.rates[next(shown, next(iter(self.rates)))]

    @property
    def section(self) -> str:
        """Where train.yaml speaks of it."""
        return "text_encoder" if self.number == 1 else "unet"

    @cached_property
    def groups(self) -> Groups:
        """Name of what is trained → name → parameter, in a fixed order; all names are distinct."""
        return {
            part: {f"{part}.{name}": parameter for name, parameter in trained.parameters().items()}
            for part, trained in sorted(self.trained.items())
        }


@dataclass(frozen=True)
class Done:
    """A step that was done.

    Attributes:
        stage: of which stage.
        step: steps done in this stage.
        loss: of this step, before the update.
        rate: the learning rate of the update.
        state: gives what a checkpoint needs beside the modules: ``optimizer``, and ``average`` where there is one.
    """

    stage: Stage
    step: int
    loss: float
    rate: float
    state: Callable[[], dict[str, Tensors]]

    @property
    def total(self) -> int:
        """Steps done in the run."""
        return self.stage.first + self.step


def train_stage(
    stage: Stage,
    material: Material,
    start: int,
    *,
    updates: Updates,
    fitting: Fitting,
    average: Average | None,
    crew: Crew,
    after_step: Callable[[Done], None],
) -> None:
    """Train one stage from step ``start`` to its end. Modules are changed in place.

    Args:
        stage: what to train.
        material: with what.
        start: steps of this stage that are done already.
        updates: change the parameters; in the state of ``start``.
        fitting: how a step fits into memory; where it does not, it gives something up and the step is done again.
        average: follows the parameters, and takes their place at the end.
        crew: those who share the steps.
        after_step: called after each step; may raise to stop.

    Raises:
        Diverged: the loss is no longer a number.
        Refusal: code ``memory``: nothing is left to be given up.
    """
    plan = material.plan
    parameters = [parameter for group in stage.groups.values() for parameter in group.values()]

    def state() -> dict[str, Tensors]:
        return {"optimizer": updates.tensors(), **({"average": average.tensors()} if average else {})}

    for step in range(start, stage.steps):
        updates.set_rates({part: rate.at(step, plan.schedule) for part, rate in stage.rates.items()})
        value = _gradients(stage, material, step, updates=updates, fitting=fitting, crew=crew)
        if not math.isfinite(value):
            raise _diverged(stage, step, plan.precision)
        try:
            crew.add_up(parameters)
            updates.apply()
            if average:
                average.follow()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            # A part of the parameters may be changed: nothing of this process is to be kept.
            raise fitting.refusal(f"the update of step {stage.first + step + 1}") from None
        after_step(Done(stage, step + 1, value, stage.rate.at(step, plan.schedule), state))
    if average:
        average.settle()


def _gradients(stage: Stage, material: Material, step: int, *, updates: Updates, fitting: Fitting, crew: Crew) -> float:
    """Add up the gradients of this process's share of a step. Returns the loss of the whole step."""
    while True:
        value, problem = 0.0, False
        try:
            parts = _share(material, stage.number, step, fitting.means.at_once, crew)
            value = _add_up(stage, material, step, parts, updates)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            problem = True
        # All give the same up, or none: they must do the same steps.
        total, problems = crew.sum_of([value, float(problem)])
        if not problems:
            return total
        fitting.give_up(updates, f"step {stage.first + step + 1}")


def _add_up(stage: Stage, material: Material, step: int, parts: Iterator[Batch], updates: Updates) -> float:
    """Add up the gradients of parts of a step. Returns their loss; nothing of them is kept, also where it fails."""
    # Dropout must not depend on what was drawn before.
    torch.manual_seed(randomness.number(material.plan.seed, stage.number, step, "dropout"))
    value = 0.0
    for part in parts:
        loss = loss_of(stage, material, step, part)
        value += float(loss.detach())
        if not math.isfinite(value):
            break
        updates.backward(loss)
    return value


def _share(material: Material, stage: int, step: int, at_once: int, crew: Crew) -> Iterator[Batch]:
    """This process's part of the step's pictures, at most ``at_once`` together."""
    batches = objective.batches_of_step(material, stage, step)
    most = min(at_once, -(-sum(len(batch.chosen) for batch in batches) // crew.count))
    parts = (part for batch in batches for part in batch.parts(most))
    return itertools.islice(parts, crew.rank, None, crew.count)


def denoising_loss(stage: Stage, material: Material, step: int) -> torch.Tensor:
    """The whole loss of one step, a scalar in float32."""
    parts = [loss_of(stage, material, step, batch) for batch in objective.batches_of_step(material, stage.number, step)]
    return torch.stack(parts).sum()


def loss_of(stage: Stage, material: Material, step: int, batch: Batch) -> torch.Tensor:
    """What a batch adds to the loss of its step, a scalar in float32."""
    teacher = stage.teacher
    answer = partial(teacher.answer, material.objective, step) if teacher else None
    with _autocast(material.plan, material.device):
        found = objective.losses(material, stage.denoiser, batch, stage.condition(step, batch.chosen), answer)
    return (found * batch.shares.to(found)).sum()


def learning_rate_factor(schedule: str, step: int, steps: int) -> float:
    """What the learning rate is multiplied by in a step counted from 0; linear and cosine end just above 0."""
    if schedule == "linear":
        return 1.0 - step / steps
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * step / steps))
    return 1.0


def _autocast(plan: Plan, device: str) -> AbstractContextManager[Any]:
    if plan.precision == "fp32":
        return nullcontext()
    dtype = torch.bfloat16 if plan.precision == "bf16" else torch.float16
    context: AbstractContextManager[Any] = torch.autocast(device.partition(":")[0], dtype=dtype)
    return context


def _diverged(stage: Stage, step: int, precision: str) -> Diverged:
    total = stage.first + step
    return Diverged(
        f"The training diverged: the loss of step {total + 1} ({stage.title}) is not a number.",
        smaller_rate(stage.section, stage.rate.value) + ("" if precision == "fp32" else " Or write precision: fp32."),
        # The loss of step N is of the weights that N - 1 steps made: what the last one made is of no use.
        max(0, total - 1),
    )
