"""What a step is about: its pictures, their noise, and how wrong the prediction is.

What is random comes from ``handlers.train.randomness``, so that step N is the same step whether the process began at 0
or at N, and however many pictures go through the model at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from diffusers.training_utils import compute_snr
from torch.nn import functional

from handlers.train import randomness
from handlers.train.dataset import Frozen
from handlers.train.plan import Plan


class Objective(Protocol):
    """What a family's denoiser is trained to predict."""

    @property
    def worthless(self) -> float:
        """What a picture costs a denoiser that predicts nothing: the variance of its target."""

    def latents(self, mean: torch.Tensor, std: torch.Tensor, within: torch.Tensor) -> torch.Tensor:
        """Samples of the VAE's distributions, scaled as the denoiser knows them; all (pictures, channels, h, w)."""

    def timesteps(self, count: int, seed: int, stage: int, step: int, purpose: str) -> torch.Tensor:
        """``count`` noise levels of a step, (count,)."""

    def noisy(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The latents with that much noise."""

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the denoiser should predict."""

    def weights(self, timesteps: torch.Tensor, min_snr: float | None) -> torch.Tensor | None:
        """What a picture's loss counts at these levels, (pictures,); None where all count 1."""

    def predict(
        self, denoiser: Any, noisy: torch.Tensor, timesteps: torch.Tensor, condition: Mapping[str, Any]
    ) -> torch.Tensor:
        """The denoiser's answer, of the shape of ``noisy``."""


@dataclass(frozen=True)
class Denoising:
    """The objective of SD 1, SD 2 and SDXL.

    Predict the noise that was mixed into a latent (Ho et al. 2020), or the velocity (Salimans & Ho 2022).

    Attributes:
        scheduler: diffusers' DDPMScheduler of the base.
        scaling_factor: the VAE's.
    """

    scheduler: Any
    scaling_factor: float

    @property
    def worthless(self) -> float:
        """That of noise, and of velocity (``Objective.worthless``)."""
        return 1.0

    @property
    def _is_velocity(self) -> bool:
        return bool(self.scheduler.config.prediction_type == "v_prediction")

    def latents(self, mean: torch.Tensor, std: torch.Tensor, within: torch.Tensor) -> torch.Tensor:
        """Samples × scaling factor (``Objective.latents``)."""
        return (mean + std * within) * self.scaling_factor

    def timesteps(self, count: int, seed: int, stage: int, step: int, purpose: str) -> torch.Tensor:
        """Uniform whole numbers (``Objective.timesteps``)."""
        levels = self.scheduler.config.num_train_timesteps
        return randomness.timesteps(count, levels, seed, stage, step, purpose=purpose)

    def noisy(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """As the schedule says (``Objective.noisy``)."""
        mixed: torch.Tensor = self.scheduler.add_noise(latents, noise, timesteps)
        return mixed

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Noise or velocity (``Objective.target``)."""
        if not self._is_velocity:
            return noise
        velocity: torch.Tensor = self.scheduler.get_velocity(latents, noise, timesteps)
        return velocity

    def weights(self, timesteps: torch.Tensor, min_snr: float | None) -> torch.Tensor | None:
        """With γ: min(SNR, γ) / SNR, or / (SNR + 1) for velocity (Hang et al. 2023)."""
        if min_snr is None:
            return None
        snr: torch.Tensor = compute_snr(self.scheduler, timesteps)
        return snr.clamp(max=min_snr) / (snr + 1 if self._is_velocity else snr)

    def predict(
        self, denoiser: Any, noisy: torch.Tensor, timesteps: torch.Tensor, condition: Mapping[str, Any]
    ) -> torch.Tensor:
        """The UNet's answer (``Objective.predict``)."""
        answer: torch.Tensor = denoiser(noisy, timesteps, **condition).sample
        return answer


@dataclass(frozen=True)
class Material:
    """What both stages of a run train with.

    Attributes:
        plan: how.
        frozen: the pictures' latents: first those of the subject, then the class pictures.
        subjects: how many are of the subject.
        objective: what the denoiser shall predict.
        device: where to compute.
    """

    plan: Plan
    frozen: Frozen
    subjects: int
    objective: Objective
    device: str

    @cached_property
    def groups(self) -> list[list[int]]:
        """The subject's pictures by their shape: a step takes all of its own from one of these."""
        return self.frozen.groups(self.subjects)


@dataclass(frozen=True)
class Batch:
    """Pictures of one shape with their noise; P of them.

    Attributes:
        chosen: their indices.
        latents: (P, channels, height, width), on the CPU.
        noise: the same shape.
        timesteps: (P,).
        shares: (P,), what each picture's loss counts in the step; 1 / the batch size for those of the subject.
        of_class: (P,), whether it is a class picture.
    """

    chosen: list[int]
    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    shares: torch.Tensor
    of_class: torch.Tensor

    def parts(self, most: int) -> Iterator[Batch]:
        """The same pictures in batches of at most ``most``."""
        for first in range(0, len(self.chosen), most):
            part = slice(first, first + most)
            yield self.rows(part)

    def of_classes(self) -> Batch:
        """Its class pictures; there may be none."""
        return self.rows(self.of_class)

    def rows(self, which: slice | torch.Tensor) -> Batch:
        """Some of its pictures: a part, or those of a mask (P,)."""
        places = torch.arange(len(self.chosen))[which]
        return Batch(
            [self.chosen[place] for place in places.tolist()],
            *(each[which] for each in (self.latents, self.noise, self.timesteps, self.shares, self.of_class)),
        )


def batches_of_step(material: Material, stage: int, step: int) -> list[Batch]:
    """The pictures of a step: those of the subject, all of one shape, then class pictures, which are square.

    As many class pictures as of the subject add their mean loss × ``prior_weight`` (Ruiz et al. 2023).

    Args:
        material: the run's.
        stage: the stage's number.
        step: counted from 0 within the stage.
    """
    plan, frozen, place = material.plan, material.frozen, (stage, step)
    count, seed = plan.batch_size, plan.seed
    groups = material.groups
    group, earlier = randomness.group_of_step([len(group) for group in groups], seed, stage, step)
    order = randomness.pictures_of_step(len(groups[group]), count, seed, stage, earlier)
    chosen = [groups[group][index] for index in order]
    shares = [1.0 / count] * count
    timesteps = material.objective.timesteps(count, seed, stage, step, "timesteps")
    class_pictures = len(frozen.mean) - material.subjects
    if not class_pictures:
        return [_batch(material, place, chosen, timesteps, shares)]
    its_order = randomness.pictures_of_step(class_pictures, count, seed, stage, step, purpose="class")
    of_class = [material.subjects + index for index in its_order]
    its_timesteps = material.objective.timesteps(count, seed, stage, step, "class timesteps")
    its_shares = [plan.prior_weight / count] * count
    if frozen.mean[chosen[0]].shape == frozen.mean[of_class[0]].shape:
        together = torch.cat([timesteps, its_timesteps])
        return [_batch(material, place, [*chosen, *of_class], together, [*shares, *its_shares])]
    return [
        _batch(material, place, chosen, timesteps, shares),
        _batch(material, place, of_class, its_timesteps, its_shares),
    ]


def _batch(
    material: Material, place: tuple[int, int], chosen: list[int], timesteps: torch.Tensor, shares: Sequence[float]
) -> Batch:
    plan, (stage, step) = material.plan, place
    # Class pictures of another shape than the subject's have noise of their own.
    prefix = "" if chosen[0] < material.subjects else "class "
    mean, std = material.frozen.of(chosen)
    shape = tuple(mean.shape)
    within = randomness.noise(shape, plan.seed, stage, step, f"{prefix}latents")
    noise = randomness.noise(shape, plan.seed, stage, step, f"{prefix}noise")
    if plan.offset_noise:
        offset = randomness.noise((*shape[:2], 1, 1), plan.seed, stage, step, f"{prefix}offset")
        noise = noise + plan.offset_noise * offset
    latents = material.objective.latents(mean, std, within)
    of_class = torch.tensor([index >= material.subjects for index in chosen])
    return Batch(chosen, latents, noise, timesteps, torch.tensor(shares), of_class)


Answer = Callable[[Batch, torch.Tensor], torch.Tensor]
"""(class pictures, their latents with noise) → what they are kept to, of the latents' shape."""


def losses(
    material: Material, denoiser: Any, batch: Batch, condition: Mapping[str, Any], answer: Answer | None = None
) -> torch.Tensor:
    """The weighted loss of each picture of a batch, (P,), float32, with gradients.

    Args:
        material: the run's.
        denoiser: predicts.
        batch: the pictures.
        condition: what the denoiser is told of them.
        answer: the target of class pictures; None: as for all others.
    """
    objective, device = material.objective, material.device
    latents, noise, timesteps = (each.to(device) for each in (batch.latents, batch.noise, batch.timesteps))
    noisy = objective.noisy(latents, noise, timesteps)
    target = objective.target(latents, noise, timesteps)
    weights = objective.weights(timesteps, material.plan.min_snr)
    if answer and bool(batch.of_class.any()):
        of_class = batch.of_class.to(device)
        target = target.masked_scatter(
            of_class.view(-1, 1, 1, 1), answer(batch.of_classes(), noisy[of_class]).to(target)
        )
        # An answer has no noise in it, and the finest details are to be kept as well.
        weights = None if weights is None else weights.masked_fill(of_class, 1.0)
    predicted = objective.predict(denoiser, noisy, timesteps, condition)
    found = functional.mse_loss(predicted.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
    return found if weights is None else found * weights
