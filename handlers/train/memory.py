"""How a run fits into memory: what is chosen before it, and what is given up when memory runs out. Pure; no torch.

The estimates add up weights, gradients and the optimizer's moments, which are known, and activations, which are rough:
what they promise too much is taken back step by step while the run goes on (``Means.less``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

Optimizer = Literal["adamw", "adamw8bit", "adafactor", "prodigy"]

# Bytes that an optimizer keeps for each trained number.
MOMENTS: dict[str, float] = {"adamw": 8.0, "adamw8bit": 2.1, "adafactor": 0.1, "prodigy": 16.0}
# Bytes of activations of a picture of 512 × 512 pixels: all of them, or those between blocks and of the largest block.
_ACTIVATIONS: dict[str, tuple[float, float]] = {
    "sd1": (3.0e9, 0.8e9),
    "sd2": (3.0e9, 0.8e9),
    "sdxl": (3.5e9, 0.8e9),
    "flux": (7.0e9, 0.9e9),
}
_CONTEXT = 0.8e9  # CUDA's own, and cuDNN's workspaces
_USABLE = 0.92  # of a card: the rest is lost between allocations
# Bytes of a number in nf4, with a scale for 64 of them that is quantised as well.
_QUANTISED = 0.52
GB = 1e9


def bytes_named(preset: str) -> int:
    """Bytes of ``memory: 12GB``; 0 for auto."""
    return int(preset.removesuffix("GB")) << 30 if preset != "auto" else 0


@dataclass(frozen=True)
class Means:
    """How a step fits into memory.

    Attributes:
        at_once: pictures that go through the denoiser together; a larger batch adds up its gradients.
        checkpointing: activations are computed again in the backward pass instead of being kept.
        quantised: an adapter's base is held in 4 bits; decided before the first step.
        offload: an adapter's base lies in the CPU's memory, and comes block by block.
        optimizer: which one.
        fused_backward: each parameter is updated as soon as its gradient is there.
    """

    at_once: int
    checkpointing: bool = False
    quantised: bool = False
    offload: bool = False
    optimizer: Optimizer = "adamw"
    fused_backward: bool = False

    def less(self, *, may_offload: bool) -> Means | None:
        """What takes less memory and gives the same results up to rounding; None where nothing is left to give up.

        Args:
            may_offload: whether there is a frozen base to be moved out of the way.
        """
        if not self.checkpointing:
            return replace(self, checkpointing=True)
        if self.at_once > 1:
            return replace(self, at_once=-(-self.at_once // 2))
        return replace(self, offload=True) if may_offload and not self.offload else None

    def told(self) -> str:
        """For people: "adamw, 2 pictures at once, gradient checkpointing"."""
        words = [self.optimizer, f"{self.at_once} picture{'' if self.at_once == 1 else 's'} at once"]
        words += ["gradient checkpointing"] if self.checkpointing else []
        words += ["base in 4 bits"] if self.quantised else []
        words += ["fused backward pass"] if self.fused_backward else []
        words += ["base in the CPU's memory"] if self.offload else []
        return ", ".join(words)


@dataclass(frozen=True)
class Load:
    """What a run asks of memory.

    Attributes:
        family: sd1, sd2, sdxl or flux.
        trained: numbers that are trained at once, in the stage that has most.
        frozen: numbers that lie beside them.
        denoiser: numbers of the denoiser.
        resolution: pixels of a side.
        pictures: that a step takes, class pictures included.
        half: whether it computes in half precision.
        adapter: whether only an adapter is trained.
        average: whether a moving average is kept.
        quantises: whether the frozen base can be held in 4 bits.
        devices: that share the pictures of a step.
        scales_loss: whether the loss is scaled, as float16 needs it: only all gradients together tell by how much.
    """

    family: str
    trained: int
    frozen: int
    denoiser: int
    resolution: int
    pictures: int
    half: bool
    adapter: bool
    average: bool = False
    quantises: bool = False
    devices: int = 1
    scales_loss: bool = False

    def bytes_of(self, means: Means) -> float:
        """About how much memory a step takes."""
        whole = 2.0 if self.half else 4.0
        a_number = _QUANTISED if means.quantised else whole
        # Trained weights are kept in float32; in half precision, autocast adds a copy.
        weights = self.trained * (4.0 + (2.0 if self.half and not self.adapter else 0.0))
        gradients = 0.0 if means.fused_backward else self.trained * 4.0
        moments = self.trained * MOMENTS[means.optimizer]
        average = self.trained * 4.0 if self.average else 0.0
        frozen = self.frozen * a_number
        if means.offload:
            frozen -= 0.9 * min(self.denoiser, self.frozen) * a_number
        kept, less = _ACTIVATIONS.get(self.family, _ACTIVATIONS["sdxl"])
        area = (self.resolution / 512) ** 2
        of_a_picture = (less if means.checkpointing else kept) * area * (1.0 if self.half else 2.0)
        return weights + gradients + moments + average + frozen + of_a_picture * means.at_once + _CONTEXT


def choose(load: Load, wanted: Optimizer | None, available: frozenset[str], memory: float) -> Means | None:
    """The fastest means that fit; None where none do.

    Args:
        load: the run's.
        wanted: the optimizer that train.yaml names; None: any.
        available: optimizers whose packages are here.
        memory: bytes of the card.
    """
    for means in _candidates(load, wanted, available):
        if load.bytes_of(means) <= memory * _USABLE:
            return means
    return None


def least(load: Load, wanted: Optimizer | None, available: frozenset[str]) -> float:
    """Bytes of the smallest card that the run fits on."""
    return min(load.bytes_of(means) for means in _candidates(load, wanted, available)) / _USABLE


def _candidates(load: Load, wanted: Optimizer | None, available: frozenset[str]) -> Iterator[Means]:
    """From the fastest to the smallest."""
    order: tuple[Optimizer, ...] = ("adamw",) if load.adapter else ("adamw", "adamw8bit", "adafactor")
    for optimizer in (wanted,) if wanted else order:
        if optimizer not in available:
            continue
        first = Means(-(-load.pictures // load.devices), optimizer=optimizer)
        means: Means | None = first
        # 4 bits cost a little exactness, and save more time than a base that comes and goes.
        while means and not (load.quantises and means.offload):
            yield means
            means = means.less(may_offload=load.adapter)
        means = replace(first, quantised=True) if load.quantises else None
        while means:
            yield means
            means = means.less(may_offload=load.adapter)
    # Fused: no clipping to a norm, and nothing is added up; of all, Adafactor alone limits its steps itself.
    if load.pictures == 1 and not (load.adapter or load.scales_loss) and wanted in (None, "adafactor"):
        yield Means(1, checkpointing=True, optimizer="adafactor", fused_backward=True)
