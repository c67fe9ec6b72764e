"""What of a module is trained: all of it, or an adapter in it (Hu et al. 2021, "LoRA"; Liu et al. 2024, "DoRA")."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from peft import LoraConfig, get_peft_model_state_dict

from handlers.train.plan import Plan
from sessions.refusal import Refusal

# Every linear layer of the transformer blocks, and the projections around them: what kohya's trainer adapts as well, so
# that the file is one that every WebUI reads.
UNET_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
# The residual blocks between them: where a UNet draws outlines. LyCORIS calls an adapter with these a LoCon.
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "time_emb_proj")
# Every linear layer of Flux's blocks but those that only scale and shift.
TRANSFORMER_LAYERS = (
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out"),
)
ENCODER_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def layers_of(part: str, *, convolutions: bool) -> tuple[str, ...]:
    """Endings of the names of the layers that an adapter changes in a component.

    Args:
        part: a denoiser, or a text encoder.
        convolutions: whether a UNet's are among them.
    """
    if part == "unet":
        return (*UNET_LAYERS, *CONVOLUTIONS) if convolutions else UNET_LAYERS
    return TRANSFORMER_LAYERS if part == "transformer" else ENCODER_LAYERS


def adapted_layers(plan: Plan, parts: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Name of each component → endings of the names of the layers that the plan's adapter changes in it."""
    return {part: layers_of(part, convolutions=plan.lora_convolutions) for part in parts}


def is_adapted(layer: str, layers: tuple[str, ...]) -> bool:
    """Whether an adapter of these layers changes one."""
    return layer.endswith(tuple(f".{ending}" for ending in layers))


class Trainable(Protocol):
    """A module of which something is trained."""

    @property
    def module(self) -> Any:
        """The module; other parameters of it are frozen."""

    def parameters(self) -> dict[str, Any]:
        """Name → parameter of what is trained, in a fixed order; they get gradients from now on."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must hold of it."""

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """The inverse of ``tensors``."""


@dataclass(frozen=True)
class Whole:
    """All of a module."""

    module: Any

    def parameters(self) -> dict[str, Any]:
        """All parameters."""
        self.module.requires_grad_(requires_grad=True)
        return dict(self.module.named_parameters())

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state dict."""
        return dict(self.module.state_dict())

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Load a state dict."""
        self.module.load_state_dict(dict(tensors))


@dataclass(frozen=True)
class Adapter:
    """The adapter that ``adapted`` put into a module."""

    module: Any

    def parameters(self) -> dict[str, Any]:
        """The adapter's parameters, in float32: an update is too small for half precision."""
        found = {name: parameter for name, parameter in self.module.named_parameters() if "lora_" in name}
        for parameter in found.values():
            parameter.requires_grad_(requires_grad=True)
            parameter.data = parameter.data.float()
        return found

    def tensors(self) -> dict[str, torch.Tensor]:
        """Peft's names: ``<module>.lora_A.weight``, ``lora_B.weight``, ``lora_magnitude_vector``."""
        return dict(get_peft_model_state_dict(self.module))

    def config(self) -> dict[str, Any]:
        """Peft's configuration; sets in order, so that a run writes the same bytes however often it is killed."""
        values: dict[str, Any] = self.module.peft_config["default"].to_dict()
        values["base_model_name_or_path"] = None  # a path of this machine is nobody's business
        return {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}

    def begin(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Begin where another adapter of these layers ended.

        Args:
            tensors: its tensors; a DoRA's lengths may have more dimensions.

        Raises:
            Refusal: code ``spec``: they are of other layers, or of another rank.
        """
        mine = self.tensors()
        fits = mine.keys() == tensors.keys() and all(mine[key].numel() == tensors[key].numel() for key in mine)
        if not fits:
            raise Refusal(
                "spec",
                "The adapter that this run shall go on from has other layers than this base.",
                "Leave continue out.",
            )
        self.load({key: tensors[key].view_as(value) for key, value in mine.items()})

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy such tensors into the adapter.

        Copied, not put in their place as peft does: a view of a file is aligned otherwise than memory of its own, and
        sums of another alignment end in other bits.

        Raises:
            KeyError: one is missing.
        """
        with torch.no_grad():
            for key, value in self.tensors().items():
                value.copy_(tensors[key])


def adapted(module: Any, layers: tuple[str, ...], *, rank: int, alpha: float, dora: bool, seed: int) -> Adapter:
    """Put a fresh adapter into the layers of a module; it changes nothing until it is trained.

    Args:
        module: a UNet of diffusers or a text encoder of transformers; everything in it is frozen.
        layers: endings of the names of layers that lie within others.
        rank: of the two factors.
        alpha: the adapter counts alpha / rank.
        dora: whether the weights' magnitudes are trained as well.
        seed: of the first factor; the second one is zero.
    """
    module.requires_grad_(requires_grad=False)
    # Peft computes with any number and says int.
    scale = cast("int", alpha)
    chosen = list(layers)
    if any(name in layers for name, _ in module.named_children()):
        # Flux's last layer is called as one of each block is: then all are called by their whole names.
        endings = tuple(f".{layer}" for layer in layers)
        chosen = [name for name, _ in module.named_modules() if name.endswith(endings)]
    config = LoraConfig(r=rank, lora_alpha=scale, target_modules=chosen, use_dora=dora, bias="none")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module.add_adapter(config)
    return Adapter(module)
