"""Muon for matrices and convolutions, AdamW for the rest: on CPU it halves the steps that a small model needs.

Momentum, then the update's singular values are all brought near 1 by a quintic Newton-Schulz iteration (Keller Jordan,
"Muon: an optimizer for hidden layers in neural networks", 2024; the coefficients are his).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# Parts of names of what stands at a model's ends: no matrix there maps hidden to hidden.
_ENDS = ("embed", "conv_in", "conv_out", "lm_head", "latent_query", "read")


def orthogonal(update: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Matrices [..., rows, columns] with their singular values brought near 1."""
    a, b, c = _COEFFICIENTS
    tall = update.size(-2) > update.size(-1)
    x = update.mT if tall else update
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for parameters of two and more dimensions; convolutions count as [out, in × height × width]."""

    def __init__(
        self, parameters: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 1e-2
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """One step for every parameter with a gradient; those of one shape go together."""
        del closure
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[torch.nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(tuple(parameter.flatten(1).shape), []).append(parameter)
            for shape, parameters in by_shape.items():
                self._step_shape(shape, parameters, group)

    def _step_shape(self, shape: tuple[int, ...], parameters: list[torch.nn.Parameter], group: dict[str, Any]) -> None:
        gradients = [parameter.grad.flatten(1) for parameter in parameters]
        buffers = [self.state[p].setdefault("momentum", torch.zeros_like(p).flatten(1)) for p in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        ahead = [g.lerp(b, group["momentum"]) for g, b in zip(gradients, buffers, strict=True)]
        updates = orthogonal(torch.stack(ahead))
        scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
        for parameter, update in zip(parameters, updates, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update.view_as(parameter), alpha=-scale)


class Pair:
    """Several optimizers as one, as far as ``training.run`` needs."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """All groups, in order."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    def step(self) -> None:
        """One step of each."""
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """The states, in order."""
        return {"states": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of ``state_dict``."""
        for optimizer, saved in zip(self.optimizers, state["states"], strict=True):
            optimizer.load_state_dict(saved)


def optimizer_for(module: torch.nn.Module, muon_rate: float, adam_rate: float) -> Pair:
    """Muon for the weights of the hidden layers, AdamW for embeddings, biases, norms and the first and last layers."""
    matrices: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for name, parameter in module.named_parameters():
        hidden = parameter.ndim >= 2 and not any(word in name for word in _ENDS)
        (matrices if hidden else rest).append(parameter)
    return Pair(Muon(matrices, muon_rate), torch.optim.AdamW(rest, adam_rate, betas=(0.9, 0.98), weight_decay=1e-3))
