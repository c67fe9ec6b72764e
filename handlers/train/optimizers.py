"""How parameters are updated: the optimizers of ``optimizer:``, and their state as tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any, Protocol

import torch

from handlers.train.memory import MOMENTS
from handlers.train.plan import Plan
from sessions.refusal import Refusal

LARGEST_NORM = 1.0
WEIGHT_DECAY = 1e-2
Tensors = dict[str, torch.Tensor]
Groups = Mapping[str, Mapping[str, Any]]
"""Name of what is trained → name → parameter; all names are distinct."""

_PACKAGES = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}
# Numbers that an optimizer keeps beside tensors are saved as tensors of these names, so that they come back as numbers.
_NUMBERS: dict[str, tuple[type, torch.dtype]] = {
    "int": (int, torch.int64),
    "float": (float, torch.float64),
    "bool": (bool, torch.bool),
}


class Updates(Protocol):
    """What changes the parameters in a step."""

    def set_rates(self, rates: Mapping[str, float]) -> None:
        """Name of what is trained → learning rate, from now on."""

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a part of the step's loss."""

    def apply(self) -> None:
        """Change the parameters by what the parts added up to; the gradients are gone afterwards."""

    def forget(self) -> None:
        """Drop the gradients of a step that will be done again.

        Raises:
            RuntimeError: parameters were changed already.
        """

    def tensors(self) -> Tensors:
        """What a checkpoint needs to go on."""

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """The inverse of ``tensors``."""


def usable_optimizers() -> frozenset[str]:
    """Those whose packages are installed."""
    return frozenset(name for name in MOMENTS if find_spec(_PACKAGES.get(name, "torch")) is not None)


def make_updates(plan: Plan, groups: Groups, device: str) -> Updates:
    """What a plan's optimizer does to these parameters.

    Args:
        plan: names the optimizer, the precision and how memory is saved.
        groups: the parameters.
        device: where they lie.

    Raises:
        Refusal: code ``spec``: its package is missing.
    """
    make = _maker(plan.optimizer)
    if plan.fused_backward:
        return InBackward(groups, make)
    scaler = torch.amp.GradScaler(device.partition(":")[0], enabled=plan.precision == "fp16")
    return Together(groups, make, scaler)


def _maker(name: str) -> Callable[[list[dict[str, Any]]], Any]:
    """Parameter groups → optimizer."""
    if name == "adamw":
        return lambda groups: torch.optim.AdamW(groups, lr=0.0, weight_decay=WEIGHT_DECAY, fused=True)
    if name == "adafactor":
        from transformers.optimization import Adafactor

        # Steps as long as AdamW's, so that the same learning rates hold (Shazeer & Stern 2018, without relative steps).
        return lambda groups: Adafactor(
            groups, lr=0.0, weight_decay=WEIGHT_DECAY, scale_parameter=False, relative_step=False
        )
    if name == "prodigy":
        _require(name)
        from prodigyopt import Prodigy

        # As its authors advise for diffusion models; one estimate a group, since UNet and text encoder differ.
        return lambda groups: Prodigy(
            groups, lr=1.0, weight_decay=WEIGHT_DECAY, safeguard_warmup=True, use_bias_correction=True
        )
    _require(name)
    from bitsandbytes.optim import AdamW8bit

    return lambda groups: AdamW8bit(groups, lr=0.0, weight_decay=WEIGHT_DECAY)


def _require(optimizer: str) -> None:
    package = _PACKAGES[optimizer]
    if find_spec(package) is None:
        raise Refusal(
            "spec",
            f"optimizer: {optimizer} needs the package {package}, which is not installed.",
            f"Install it (pip install {package}), or use optimizer: auto.",
        )


class Together:
    """An optimizer for each of the groups, after the whole backward pass; all gradients are clipped to a norm of 1.

    Args:
        groups: the parameters.
        make: parameter groups → optimizer.
        scaler: the loss scaling of float16; switched off for other precisions.
    """

    def __init__(
        self, groups: Groups, make: Callable[[list[dict[str, Any]]], Any], scaler: torch.amp.GradScaler
    ) -> None:
        self._parameters = {name: parameter for group in groups.values() for name, parameter in group.items()}
        # Prodigy finds one rate for all that it has, and UNet and text encoder need their own.
        self._optimizers = [make([{"params": list(group.values()), "part": part}]) for part, group in groups.items()]
        self._scaler = scaler

    def set_rates(self, rates: Mapping[str, float]) -> None:
        """As ``Updates.set_rates``."""
        for optimizer in self._optimizers:
            _set_rates(optimizer, rates)

    def backward(self, loss: torch.Tensor) -> None:
        """As ``Updates.backward``."""
        self._scaler.scale(loss).backward()

    def apply(self) -> None:
        """As ``Updates.apply``."""
        for optimizer in self._optimizers:
            self._scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(list(self._parameters.values()), LARGEST_NORM)
        # An overflow of one optimizer's gradients has gone into all by the clipping, and the scaler asks each alone.
        if not self._scaler.is_enabled() or bool(torch.isfinite(norm)):
            for optimizer in self._optimizers:
                self._scaler.step(optimizer)
        self._scaler.update()
        self.forget()

    def forget(self) -> None:
        """As ``Updates.forget``."""
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> Tensors:
        """The optimizer's state by the parameters' names, and the loss scaling."""
        found: Tensors = {}
        for optimizer in self._optimizers:
            found |= state_tensors(optimizer, self._parameters)
        scaling = self._scaler.state_dict()
        for key in ("scale", "_growth_tracker"):
            if key in scaling:
                found[f"scaler.{key}"] = torch.tensor(float(scaling[key]), dtype=torch.float64)
        return found

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """As ``Updates.restore``."""
        for optimizer in self._optimizers:
            restore_state(optimizer, self._parameters, tensors)
        if "scaler.scale" in tensors:
            tracker = int(tensors["scaler._growth_tracker"])
            known = self._scaler.state_dict()
            scale = float(tensors["scaler.scale"])
            self._scaler.load_state_dict({**known, "scale": scale, "_growth_tracker": tracker})


class InBackward:
    """An optimizer for each parameter, which works as soon as its gradient is there and then drops it.

    All gradients at once never exist, which saves as much memory as the weights take. What must see all of them cannot
    be had: clipping to a norm, adding up several parts of a step, scaling the loss.

    Args:
        groups: the parameters.
        make: parameter groups → optimizer.
    """

    def __init__(self, groups: Groups, make: Callable[[list[dict[str, Any]]], Any]) -> None:
        self._optimizers = {
            name: (parameter, make([{"params": [parameter], "part": part}]))
            for part, group in groups.items()
            for name, parameter in group.items()
        }
        self._changed = 0
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._hook(optimizer))
            for parameter, optimizer in self._optimizers.values()
        ]

    def _hook(self, optimizer: Any) -> Callable[[torch.Tensor], None]:
        def update(_parameter: torch.Tensor) -> None:
            self._changed += 1
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return update

    def set_rates(self, rates: Mapping[str, float]) -> None:
        """As ``Updates.set_rates``."""
        for _parameter, optimizer in self._optimizers.values():
            _set_rates(optimizer, rates)

    def backward(self, loss: torch.Tensor) -> None:
        """As ``Updates.backward``; the parameters are changed on the way."""
        loss.backward()

    def apply(self) -> None:
        """Nothing is left to do."""
        self._changed = 0

    def forget(self) -> None:
        """As ``Updates.forget``."""
        if self._changed:
            raise RuntimeError("a part of the parameters was changed already")

    def tensors(self) -> Tensors:
        """As ``Updates.tensors``."""
        found: Tensors = {}
        for name, (parameter, optimizer) in self._optimizers.items():
            found |= state_tensors(optimizer, {name: parameter})
        return found

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """As ``Updates.restore``."""
        for name, (parameter, optimizer) in self._optimizers.items():
            restore_state(optimizer, {name: parameter}, tensors)


def _set_rates(optimizer: Any, rates: Mapping[str, float]) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rates[group["part"]]


def state_tensors(optimizer: Any, parameters: Mapping[str, Any]) -> Tensors:
    """Everything that an optimizer of torch knows: of its parameters by their names, and of its groups.

    Numbers become tensors, with their type in the name: ``unet.conv_in.weight.step#int``, ``group.unet.d#float``.
    """
    found: Tensors = {}
    seen: set[int] = set()
    for name, parameter in _own(optimizer, parameters).items():
        for key, value in optimizer.state[parameter].items():
            # bitsandbytes gives all parameters one and the same map, and a safetensors file may hold no tensor twice.
            is_shared = isinstance(value, torch.Tensor) and value.data_ptr() in seen
            found |= _saved(f"{name}.{key}", value.clone() if is_shared else value)
            if isinstance(value, torch.Tensor):
                seen.add(value.data_ptr())
    for group in optimizer.param_groups:
        for key, value in group.items():
            if key not in ("params", "part", "lr"):
                found |= _saved(f"group.{group['part']}.{key}", value)
    return found


def _saved(name: str, value: object) -> Tensors:
    if isinstance(value, torch.Tensor):
        return {name: value}
    for kind, (cls, dtype) in _NUMBERS.items():
        if type(value) is cls:
            return {f"{name}#{kind}": torch.tensor(value, dtype=dtype)}
    return {}


def _own(optimizer: Any, parameters: Mapping[str, Any]) -> dict[str, Any]:
    mine = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return {name: parameter for name, parameter in parameters.items() if id(parameter) in mine}


def restore_state(optimizer: Any, parameters: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """The inverse of ``state_tensors``."""
    names = _own(optimizer, parameters)
    groups = {group["part"]: group for group in optimizer.param_groups}
    for written, value in tensors.items():
        key, _, kind = written.partition("#")
        owner, _, what = key.rpartition(".")
        if owner in names:
            parameter = names[owner]
            optimizer.state[parameter][what] = _NUMBERS[kind][0](value.item()) if kind else _own_copy(value, parameter)
        elif key.startswith("group.") and (group := groups.get(owner.removeprefix("group."))) is not None:
            group[what] = _NUMBERS[kind][0](value.item()) if kind else value.to(copy=True)


def _own_copy(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A copy in memory of its own, as the optimizer's is: a view of a file would be aligned otherwise.

    In the parameter's own order of numbers (channels last, on a GPU): kernels go through both side by side.
    """
    if value.shape != parameter.shape:
        return value.to(parameter.device, copy=True).contiguous()
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
