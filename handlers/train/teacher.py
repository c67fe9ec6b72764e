"""The base as a teacher of its own pictures: ``prior: {target: base}``.

A class picture with noise in it shows what shall be kept, but the noise is what a step sees most of. What the base
predicts for the same noisy picture is the same thing without that noise: a denoiser that has forgotten nothing is not
moved at all (learning without forgetting, Li & Hoiem 2016).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from handlers.train.base import BaseModel
from handlers.train.fresh import DTYPES
from handlers.train.objective import Batch, Objective
from handlers.train.plan import Plan


@dataclass(frozen=True)
class Teacher:
    """What class pictures are kept to.

    Attributes:
        denoiser: the base's; for an adapter the very one that is trained.
        as_before: a context in which it predicts what the base predicts.
        condition: (step from 0, pictures' indices) → the denoiser's keyword arguments, by the base's text encoders.
    """

    denoiser: Any
    as_before: Callable[[], AbstractContextManager[None]]
    condition: Callable[[int, list[int]], Mapping[str, Any]]

    def answer(self, objective: Objective, step: int, batch: Batch, noisy: torch.Tensor) -> torch.Tensor:
        """What the base predicts for a batch, of the shape of ``noisy`` and where that lies; without gradients.

        Args:
            objective: of the family.
            step: counted from 0 within the stage.
            batch: the pictures.
            noisy: their latents with noise.
        """
        with torch.no_grad(), self.as_before():
            timesteps = batch.timesteps.to(noisy.device)
            return objective.predict(self.denoiser, noisy, timesteps, self.condition(step, batch.chosen))


def beside(base: BaseModel, plan: Plan, device: str) -> tuple[Any, Callable[[], AbstractContextManager[None]]]:
    """A denoiser of the base beside the one that is trained, as coarse as it is computed with."""
    denoiser = base.load_denoiser(DTYPES[plan.precision]).requires_grad_(requires_grad=False).eval().to(device)
    return denoiser, nullcontext


def beneath(denoiser: Any) -> tuple[Any, Callable[[], AbstractContextManager[None]]]:
    """The base beneath an adapter: the denoiser, while its adapter is switched off."""

    @contextmanager
    def without_adapter() -> Iterator[None]:
        denoiser.disable_adapters()
        try:
            yield
        finally:
            denoiser.enable_adapters()

    return denoiser, without_adapter
