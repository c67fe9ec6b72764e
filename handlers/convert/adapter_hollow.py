"""The proof of an adapter whose base is too large to be computed with here: diffusers reads the file into a hollow one.

A hollow base has the layers of the real one and none of its numbers, so it takes no memory. What diffusers' own reader
makes of the written file must be, layer by layer, the tensors and the strength of the trained adapter: then both add
the same to any base. Imports torch.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from peft.tuners.tuners_utils import BaseTunerLayer

from handlers.convert.adapter import AdapterFacts
from handlers.convert.forward import FAILURES
from handlers.convert.verify import Unproven
from handlers.train.base import BaseModel

_WRITTEN = "written"


def compare_hollow(file: Path, trained: dict[str, torch.Tensor], base: BaseModel, facts: AdapterFacts) -> None:
    """Compare what diffusers reads of a written LoRA of Flux with the trained one.

    Args:
        file: the written one.
        trained: the trained tensors, as diffusers names them, in the type that was written.
        base: what it was trained on.
        facts: of the adapter.

    Raises:
        Unproven: diffusers cannot read the file, or reads something else than the source.
    """
    part = facts.parts[0]
    transformer = _hollow(base.folder / part)
    none = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # libraries tell of their own futures here
            FluxPipeline(**none, transformer=transformer).load_lora_weights(
                file.parent, weight_name=file.name, adapter_name=_WRITTEN, local_files_only=True
            )
    except FAILURES as error:
        first = str(error).strip().splitlines()
        raise Unproven(f"diffusers cannot load the LoRA: {first[0] if first else type(error).__name__}") from error
    read: dict[str, torch.Tensor] = {}
    for name, layer in transformer.named_modules():
        if isinstance(layer, BaseTunerLayer):
            read |= _factors(f"{part}.{name}", layer, facts.alpha / facts.rank)
    if read.keys() != trained.keys():
        raise Unproven(f"the loaded LoRA and its source differ in {min(read.keys() ^ trained.keys())}")
    for key, want in trained.items():
        if read[key].is_meta or not torch.equal(read[key].float(), want.float()):
            raise Unproven(f"{key} does not hold the values of its source")


def _hollow(folder: Path) -> Any:
    """A transformer of real shapes, of which every parameter is one number that stands everywhere."""
    with torch.device("meta"):
        made = FluxTransformer2DModel.from_config(FluxTransformer2DModel.load_config(folder))
    for module in made.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(torch.zeros(1).expand(parameter.shape), requires_grad=False))
    return made


def _factors(name: str, layer: Any, strength: float) -> dict[str, torch.Tensor]:
    """The two factors of a layer, under diffusers' names.

    Raises:
        Unproven: they count something else than they were trained to.
    """
    have = float(layer.scaling[_WRITTEN])
    if have != strength:
        raise Unproven(f"the loaded LoRA counts {have:g} in {name}, not {strength:g}")
    return {f"{name}.{half}.weight": getattr(layer, half)[_WRITTEN].weight for half in ("lora_A", "lora_B")}
