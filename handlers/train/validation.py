"""The loss of pictures that are not trained on (``validation:``), at the same noise each time, so that it compares.

It is weighted as the training's own. It changes nothing: no gradients, no random numbers of the training, every module
in the mode that it was in.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from handlers.train import loop, randomness
from handlers.train.loop import Stage
from handlers.train.objective import Batch, Material

# (picture, noise level) pairs of one measurement, about: what 5 training steps cost.
_PAIRS = 16
_TIMES_A_RUN = 20


def is_due(total: int, all_steps: int) -> bool:
    """Whether the loss is measured after so many steps of a run: 20 times in all, whoever was killed in between."""
    return total % max(1, all_steps // _TIMES_A_RUN) == 0


class Validation:
    """Pictures that were held out.

    Args:
        material: of the run, with all its pictures.
        held_out: indices of those that are held out.
    """

    def __init__(self, material: Material, held_out: range) -> None:
        self._material = material
        self._batches = _batches(material, held_out)

    def measure_of(self, result: Callable[[], AbstractContextManager[None]]) -> Callable[[Stage], float]:
        """Measures a stage as its result would be: inside of ``result``, which puts a moving average in place."""

        def measure(stage: Stage) -> float:
            with result():
                return self.measure(stage)

        return measure

    def measure(self, stage: Stage) -> float:
        """The mean loss over all pairs, as the modules of the stage are now."""
        modules = {id(module): module for module in (stage.denoiser, *(each.module for each in stage.trained.values()))}
        modes = [(module, module.training) for module in modules.values()]
        for module, _mode in modes:
            module.eval()
        try:
            with torch.no_grad():
                return sum(float(loop.loss_of(stage, self._material, 0, batch)) for batch in self._batches)
        finally:
            for module, mode in modes:
                module.train(mode)


def _batches(material: Material, held_out: range) -> list[Batch]:
    """One picture each, with noise and a noise level that depend on the seed alone."""
    seed, objective = material.plan.seed, material.objective
    pairs = [index for index in held_out for _ in range(-(-_PAIRS // len(held_out)))]
    timesteps = objective.timesteps(len(pairs), seed, 0, 0, "validation timesteps")
    batches = []
    for number, index in enumerate(pairs):
        mean, std = material.frozen.of([index])
        shape = tuple(mean.shape)
        within = randomness.noise(shape, seed, 0, number, "validation latents")
        noise = randomness.noise(shape, seed, 0, number, "validation noise")
        latents = objective.latents(mean, std, within)
        share = torch.tensor([1.0 / len(pairs)])
        batches.append(Batch([index], latents, noise, timesteps[number : number + 1], share, torch.tensor([False])))
    return batches
