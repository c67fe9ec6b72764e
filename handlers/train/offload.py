"""An adapter's base in the CPU's memory: each block comes to the GPU when it is needed, forward and backward.

Diffusers' group offloading ends with the forward pass: its weights are gone when gradients need them. Here a block
stays from the moment its gradient arrives until it has passed on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Offloaded:
    """A module whose repeated blocks have given their frozen parameters away; one of them at a time is whole.

    Args:
        module: a denoiser of diffusers; its ``_repeated_blocks`` names the classes of blocks.
        park: parameter's tensor → what is kept of it instead, away from the GPU.
        fetch: the inverse of ``park``.
    """

    def __init__(
        self,
        module: Any,
        park: Callable[[torch.Tensor], torch.Tensor],
        fetch: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        names = set(getattr(module, "_repeated_blocks", None) or ())
        self.blocks = [_Block(block, park, fetch, self) for block in module.modules() if type(block).__name__ in names]
        # The block that gradients passed through last stays whole until the next forward pass.
        module.register_forward_pre_hook(lambda *_: self.backward_reaches(None))
        self._in_backward: _Block | None = None

    def backward_reaches(self, block: _Block | None) -> None:
        """Gradients arrive at a block: the one before it has passed them on. None: the backward pass is over."""
        if self._in_backward is not None and self._in_backward is not block:
            self._in_backward.leave()
        self._in_backward = block

    def is_in_backward(self, block: _Block) -> bool:
        """Whether gradients are on their way through a block."""
        return self._in_backward is block


def to_cpu(module: Any, device: str) -> Offloaded:
    """Blocks in the CPU's memory, of which copies come to ``device``."""

    def park(tensor: torch.Tensor) -> torch.Tensor:
        parked = tensor.to("cpu")
        if not device.startswith("cuda"):
            return parked
        try:
            return parked.pin_memory()
        except RuntimeError:
            return parked  # there is a limit to what may be pinned; it only comes more slowly

    return Offloaded(module, park, lambda parked: parked.to(device, non_blocking=True))


class _Block:
    """One block: its frozen parameters are there while it computes, and empty otherwise.

    Attributes:
        is_here: whether they are.
    """

    def __init__(
        self,
        block: Any,
        park: Callable[[torch.Tensor], torch.Tensor],
        fetch: Callable[[torch.Tensor], torch.Tensor],
        owner: Offloaded,
    ) -> None:
        # Frozen ones never change: what was parked once stays true, and nothing is ever copied back.
        self._parked = [(each, park(each.data)) for each in block.parameters() if not each.requires_grad]
        self._fetch = fetch
        self._owner = owner
        self.is_here = True
        self.leave()
        block.register_forward_pre_hook(lambda *_: self._come())
        block.register_forward_hook(lambda _block, _inputs, outputs: self._leave_after_forward(outputs))

    def _come(self) -> None:
        if not self.is_here:
            for parameter, parked in self._parked:
                parameter.data = self._fetch(parked)
            self.is_here = True

    def leave(self) -> None:
        """The parameters are empty from now on."""
        if self.is_here:
            for parameter, parked in self._parked:
                parameter.data = torch.empty(0, dtype=parked.dtype, device=parameter.device)
            self.is_here = False

    def _leave_after_forward(self, outputs: Any) -> Any:
        # Gradient checkpointing runs the forward pass again within the backward pass, which needs the weights next.
        if not self._owner.is_in_backward(self):
            self.leave()
        tensors = (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)
        marked = _Border.apply(self._begin_backward, *tensors)
        return marked[0] if isinstance(outputs, torch.Tensor) else marked

    def _begin_backward(self) -> None:
        self._owner.backward_reaches(self)
        self._come()


class _Border(torch.autograd.Function):
    """Where a block ends: tells when all gradients of its outputs have arrived, before any goes into it.

    Torch's own hooks of modules warn where no input needs a gradient, as in the first block above a frozen layer.
    """

    @staticmethod
    def forward(ctx: Any, arrived: Callable[[], None], *outputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.arrived = arrived
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.arrived()
        return (None, *gradients)
