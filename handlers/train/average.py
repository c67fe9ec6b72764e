"""The moving average of what is trained (``ema: true``): steadier than the last step (Polyak & Juditsky 1992)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import EMAModel

from handlers.train.optimizers import Groups, Tensors

# The average of a short run must not be of its beginning: at step n it looks back about n / 10 steps, at most 10,000.
DECAY = 0.9999


class Average:
    """The average of a stage's parameters.

    Args:
        groups: the parameters, as they are at the stage's first step.
    """

    def __init__(self, groups: Groups) -> None:
        self._parameters: dict[str, Any] = {name: each for group in groups.values() for name, each in group.items()}
        self._model = EMAModel(self._list(), decay=DECAY)

    def _list(self) -> list[Any]:
        return list(self._parameters.values())

    def follow(self) -> None:
        """A step was done."""
        self._model.step(self._list())

    def settle(self) -> None:
        """Put the average into the parameters, for good."""
        self._model.copy_to(self._list())

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The parameters are the average for a while."""
        before = [parameter.detach().clone() for parameter in self._list()]
        self.settle()
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self._list(), before, strict=True):
                    parameter.copy_(value)

    def tensors(self) -> Tensors:
        """What a checkpoint needs of it."""
        shadows = dict(zip(self._parameters, self._model.shadow_params, strict=True))
        return {**shadows, "steps": torch.tensor(self._model.optimization_step)}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """The inverse of ``tensors``."""
        self._model.optimization_step = int(tensors["steps"])
        for name, shadow in zip(self._parameters, self._model.shadow_params, strict=True):
            shadow.copy_(tensors[name])
