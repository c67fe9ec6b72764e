"""The training loop. Read it from top to bottom.

The objective is the denoising loss of Ho et al. 2020: predict the noise that was mixed into a latent, or the velocity
of Salimans & Ho 2022. What is random comes from ``handlers.train.randomness``, so that step N is the same step
whether the process began at 0 or at N.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from diffusers.training_utils import compute_snr
from torch.nn import functional

from handlers.train import randomness
from handlers.train.auto import Plan
from handlers.train.dataset import Frozen
from handlers.train.trainable import Trainable
from sessions.refusal import Refusal

LARGEST_NORM = 1.0
Tensors = dict[str, torch.Tensor]


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
        unet: predicts; trained if it is among ``trained``.
        trained: name → what of which module gets gradients.
        condition: pictures' indices → the UNet's keyword arguments: what it is told of them.
    """

    number: int
    title: str
    first: int
    steps: int
    rates: Mapping[str, Rate]
    unet: Any
    trained: Mapping[str, Trainable]
    condition: Callable[[list[int]], Mapping[str, Any]]

    @property
    def rate(self) -> Rate:
        """The one that is shown: the UNet's where it is trained."""
        return self.rates.get("unet") or next(iter(self.rates.values()))

    def groups(self) -> dict[str, dict[str, Any]]:
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
        optimizer_state: gives the optimizer's tensors for a checkpoint.
    """

    stage: Stage
    step: int
    loss: float
    rate: float
    optimizer_state: Callable[[], Tensors]

    @property
    def total(self) -> int:
        """Steps done in the run."""
        return self.stage.first + self.step


@dataclass(frozen=True)
class Material:
    """What both stages of a run train with.

    Attributes:
        plan: how.
        frozen: the pictures' latents: first those of the subject, then the class pictures.
        subjects: how many are of the subject.
        noise_scheduler: diffusers' DDPMScheduler of the base.
        scaling_factor: the VAE's.
        device: where to compute.
    """

    plan: Plan
    frozen: Frozen
    subjects: int
    noise_scheduler: Any
    scaling_factor: float
    device: str

    @cached_property
    def groups(self) -> list[list[int]]:
        """The subject's pictures by their shape: a step takes all of its own from one of these."""
        return self.frozen.groups(self.subjects)


def train_stage(
    stage: Stage,
    material: Material,
    start: int,
    optimizer_state: Tensors | None,
    after_step: Callable[[Done], None],
) -> None:
    """Train one stage from step ``start`` to its end. Modules are changed in place.

    Args:
        stage: what to train.
        material: with what.
        start: steps of this stage that are done already.
        optimizer_state: what ``Done.optimizer_state`` gave at ``start``; None at 0.
        after_step: called after each step; may raise to stop.

    Raises:
        Refusal: code ``diverged``: the loss is no longer a number.
    """
    plan, device = material.plan, material.device
    groups = stage.groups()
    parameters = {name: parameter for group in groups.values() for name, parameter in group.items()}
    optimizer = torch.optim.AdamW(
        [{"params": list(group.values()), "part": part} for part, group in groups.items()],
        lr=stage.rate.value,
        weight_decay=1e-2,
        fused=True,
    )
    scaler = torch.amp.GradScaler(device.partition(":")[0], enabled=plan.precision == "fp16")
    if optimizer_state is not None:
        restore(optimizer, scaler, parameters, optimizer_state)
    for step in range(start, stage.steps):
        for group in optimizer.param_groups:
            group["lr"] = stage.rates[group["part"]].at(step, plan.schedule)
        torch.manual_seed(randomness.number(plan.seed, stage.number, step, "dropout"))
        with _autocast(plan, device):
            loss = denoising_loss(stage, material, step)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise _diverged(stage, step)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), LARGEST_NORM)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        rate = stage.rate.at(step, plan.schedule)
        after_step(Done(stage, step + 1, value, rate, lambda: optimizer_tensors(optimizer, scaler, parameters)))


def denoising_loss(stage: Stage, material: Material, step: int) -> torch.Tensor:
    """The loss of one step, a scalar in float32.

    With ``min_snr`` (γ) each picture's loss is weighted by min(SNR, γ) / SNR, or / (SNR + 1) for velocity (Hang et al.
    2023). As many class pictures add their mean loss × ``prior_weight`` (Ruiz et al. 2023).
    """
    plan = material.plan
    losses = torch.cat([_losses(stage, material, step, batch) for batch in _batches(stage, material, step)])
    loss: torch.Tensor = losses[: plan.batch_size].mean()
    return loss + plan.prior_weight * losses[plan.batch_size :].mean() if len(losses) > plan.batch_size else loss


@dataclass(frozen=True)
class _Batch:
    """Pictures of one shape, which go through the UNet together.

    Attributes:
        chosen: their indices.
        timesteps: one each.
        prefix: what their random numbers are for, in a word.
    """

    chosen: list[int]
    timesteps: torch.Tensor
    prefix: str = ""


def _batches(stage: Stage, material: Material, step: int) -> list[_Batch]:
    """The pictures of a step: those of the subject, all of one shape, then class pictures, which are square."""
    plan, frozen = material.plan, material.frozen
    seed, number = plan.seed, stage.number
    levels = material.noise_scheduler.config.num_train_timesteps
    groups = material.groups
    group, earlier = randomness.group_of_step([len(group) for group in groups], seed, number, step)
    order = randomness.pictures_of_step(len(groups[group]), plan.batch_size, seed, number, earlier)
    chosen = [groups[group][index] for index in order]
    timesteps = randomness.timesteps(len(chosen), levels, seed, number, step)
    class_pictures = len(frozen.mean) - material.subjects
    if not class_pictures:
        return [_Batch(chosen, timesteps)]
    its_order = randomness.pictures_of_step(class_pictures, plan.batch_size, seed, number, step, purpose="class")
    of_class = [material.subjects + index for index in its_order]
    its_timesteps = randomness.timesteps(len(of_class), levels, seed, number, step, purpose="class timesteps")
    if frozen.mean[chosen[0]].shape == frozen.mean[of_class[0]].shape:
        return [_Batch([*chosen, *of_class], torch.cat([timesteps, its_timesteps]))]
    return [_Batch(chosen, timesteps), _Batch(of_class, its_timesteps, "class ")]


def _losses(stage: Stage, material: Material, step: int, batch: _Batch) -> torch.Tensor:
    """The weighted loss of each picture of a batch."""
    plan, scheduler, device = material.plan, material.noise_scheduler, material.device
    seed, number = plan.seed, stage.number
    mean, std = material.frozen.of(batch.chosen)
    shape = tuple(mean.shape)
    within = randomness.noise(shape, seed, number, step, f"{batch.prefix}latents")
    latents = ((mean + std * within) * material.scaling_factor).to(device)
    noise = randomness.noise(shape, seed, number, step, f"{batch.prefix}noise")
    if plan.offset_noise:
        offset = randomness.noise((*shape[:2], 1, 1), seed, number, step, f"{batch.prefix}offset")
        noise = noise + plan.offset_noise * offset
    noise = noise.to(device)
    timesteps = batch.timesteps.to(device)
    noisy_latents = scheduler.add_noise(latents, noise, timesteps)
    predicted = stage.unet(noisy_latents, timesteps, **stage.condition(batch.chosen)).sample.float()
    is_velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timesteps) if is_velocity else noise
    losses: torch.Tensor = functional.mse_loss(predicted, target.float(), reduction="none").mean(dim=(1, 2, 3))
    if plan.min_snr is not None:
        snr = compute_snr(scheduler, timesteps)
        losses = losses * snr.clamp(max=plan.min_snr) / (snr + 1 if is_velocity else snr)
    return losses


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


def _diverged(stage: Stage, step: int) -> Refusal:
    section = "text_encoder" if stage.number == 1 else "unet"
    return Refusal(
        "diverged",
        f"The training diverged: the loss of step {stage.first + step + 1} ({stage.title}) is not a number.",
        f"Write a smaller {section}.learning_rate than {stage.rate.value:g} into train.yaml, or precision: fp32.",
    )


def optimizer_tensors(optimizer: Any, scaler: Any, parameters: Mapping[str, Any]) -> Tensors:
    """Everything that the optimizer knows, by the parameters' names, and the loss scaling."""
    tensors = {
        f"{name}.{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }
    scaling = scaler.state_dict()
    for key in ("scale", "_growth_tracker"):
        if key in scaling:
            tensors[f"scaler.{key}"] = torch.tensor(float(scaling[key]), dtype=torch.float64)
    return tensors


def restore(optimizer: Any, scaler: Any, parameters: Mapping[str, Any], tensors: Tensors) -> None:
    """The inverse of ``optimizer_tensors``."""
    for name, parameter in parameters.items():
        keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{key}" in tensors]
        # Copies of their own: views of one file would not be aligned as the optimizer's own memory is.
        optimizer.state[parameter] = {
            key: tensors[f"{name}.{key}"].to(parameter.device, copy=True).contiguous() for key in keys
        }
    if "scaler.scale" in tensors:
        tracker = int(tensors["scaler._growth_tracker"])
        known = scaler.state_dict()
        scaler.load_state_dict({**known, "scale": float(tensors["scaler.scale"]), "_growth_tracker": tracker})
