"""A frozen base in 4 bits (Dettmers et al. 2023, "QLoRA": nf4, with its scales quantised as well), by bitsandbytes.

Only the linear layers of the repeated blocks, which are nearly all of a transformer; norms, embeddings and the last
layer stay as they are. An adapter on it is trained in float32 as ever, and stands on the whole base afterwards.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from sessions.refusal import Refusal

# Peft looks for this mark before it takes a layer of bitsandbytes for what it is.
_MARK = "is_loaded_in_4bit"


def can_quantise() -> bool:
    """Whether bitsandbytes is here."""
    return find_spec("bitsandbytes") is not None


def quantise(module: Any, device: str) -> Any:
    """Put the linear layers of a model's repeated blocks into 4 bits, one by one, on ``device``; returns the model.

    Args:
        module: a denoiser of diffusers on the CPU, in the type that it is to be computed with; changed in place.
        device: where to compute, and where the layers stay.

    Raises:
        Refusal: code ``memory``: bitsandbytes is missing.
    """
    if not can_quantise():
        raise Refusal(
            "memory",
            "A base in 4 bits needs the package bitsandbytes, which is not installed.",
            "Install it (pip install bitsandbytes), and save train.yaml again.",
        )
    names = set(module._repeated_blocks)  # noqa: SLF001 - diffusers' own name of them
    for block in [each for each in module.modules() if type(each).__name__ in names]:
        for name, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear):
                parent, _, last = name.rpartition(".")
                setattr(block.get_submodule(parent), last, _in_4_bits(layer, device))
    setattr(module, _MARK, True)
    return module


def _in_4_bits(layer: nn.Linear, device: str) -> Any:
    from bitsandbytes.nn import Linear4bit, Params4bit

    with torch.device("meta"):
        made = Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=layer.weight.dtype,
            quant_type="nf4",
        )
    # Else a CPU packs the weights another way once it draws a sample, and no gradient passes through those.
    made.support_avx512bf16_for_cpu = False
    # It is quantised as it arrives.
    made.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True).to(
        device
    )
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.data.to(device), requires_grad=False)
    return made
