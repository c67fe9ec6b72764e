"""Memory ran out: something is given up, and the same step is done again."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch

from handlers.train.memory import Means
from handlers.train.offload import Offloaded, to_cpu
from handlers.train.optimizers import Updates
from sessions.refusal import Refusal


class Fitting:
    """How the steps of a stage fit into memory.

    Args:
        means: what the run begins with.
        denoiser: diffusers' model.
        encoders: transformers' text encoders that take part.
        device: where to compute.
        may_offload: whether the base is frozen, so that it can be moved out of the way.
        told: told in a line what was given up.
    """

    def __init__(
        self,
        means: Means,
        denoiser: Any,
        encoders: Sequence[Any],
        device: str,
        *,
        may_offload: bool,
        told: Callable[[str], None],
    ) -> None:
        self.means = means
        self._denoiser = denoiser
        self._encoders = encoders
        self._device = device
        self._may_offload = may_offload
        self._told = told
        self._offloaded: Offloaded | None = None
        self._apply()

    def _apply(self) -> None:
        if self.means.checkpointing and not self._denoiser.is_gradient_checkpointing:
            self._denoiser.enable_gradient_checkpointing()
            for encoder in self._encoders:
                encoder.activation_checkpointing_enable()
        if self.means.offload and self._offloaded is None:
            self._offloaded = to_cpu(self._denoiser, self._device)

    def give_up(self, updates: Updates, where: str) -> None:
        """Take the next step down, so that the step can be done again.

        Args:
            updates: drop what the step added up so far.
            where: for the line: "step 7".

        Raises:
            Refusal: code ``memory``: nothing is left, or the step had changed parameters.
        """
        less = self.means.less(may_offload=self._may_offload)
        if less is None or self.means.fused_backward:
            raise self.refusal(where)
        updates.forget()
        gc.collect()
        if self._device.startswith("cuda"):
            torch.cuda.empty_cache()
        self.means = less
        self._apply()
        self._told(f"memory ran out in {where}: goes on with {less.told()}")

    def refusal(self, where: str) -> Refusal:
        """What people are told where memory ran out and nothing helps.

        Args:
            where: "step 7".
        """
        return Refusal(
            "memory",
            f"Memory ran out in {where}, with {self.means.told()}: nothing is left to be given up.",
            "Close other programs that use the GPU, or write a smaller resolution or method: lora into train.yaml.",
        )
