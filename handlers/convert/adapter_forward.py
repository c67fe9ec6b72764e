"""The last proof of an adapter: the base computes with the written file what it computes with the trained one.

A LoRA is read by diffusers' own reader, whose table of names is another one than ours. That reader leaves a DoRA's
lengths out of that layout, so a DoRA is put into the base's weights as its paper has it, m · (W + BA) / |W + BA| in
each row (Liu et al. 2024, eq. 5), and what peft makes of the trained one is compared with that, layer by layer; then
the base is in memory twice. Where memory does not hold the base, a hollow one takes its place. Imports torch.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file

from handlers.convert.adapter import AdapterFacts
from handlers.convert.adapter_hollow import compare_hollow
from handlers.convert.forward import FAILURES, compare_outputs, output_of
from handlers.convert.lora import read_lora
from handlers.convert.lora_layout import halves_of
from handlers.convert.lora_names import Module, to_kohya
from handlers.convert.quiet import quiet_libraries
from handlers.convert.verify import Unproven
from handlers.free_memory import free_memory
from handlers.train.base import BaseModel

# Of the largest weight: products are added up in another order.
_TOLERANCE = 1e-5
_SOURCE, _WRITTEN = "source", "written"
Tensors = Mapping[str, torch.Tensor]


def compare_adapters(file: Path, source: Path, base: BaseModel, facts: AdapterFacts, device: str = "cpu") -> bool:
    """Compute with a written adapter and with its source on fixed inputs; a LoRA's tensors are compared as well.

    A base as large as Flux is computed with on the CPU, and only where there is memory for it.

    Args:
        file: as WebUIs read it.
        source: the trained tensors, as diffusers names them.
        base: what it was trained on.
        facts: of the adapter.
        device: where to compute.

    Returns:
        Whether the base computed; False: there is too little memory, and what could be compared without it was.

    Raises:
        Unproven: diffusers cannot read the file, or reads something else than the source, or an output differs.
    """
    quiet_libraries()
    is_large = base.training.draws_from_embeddings
    device = "cpu" if is_large else device
    written = load_file(file)
    down = halves_of(facts.pipeline.family)[0]
    kind = next(tensor.dtype for key, tensor in written.items() if key.endswith(f".{down}.weight"))
    trained = {key: tensor.to(kind) for key, tensor in load_file(source).items()}
    if is_large and _bytes_of(base, facts) > free_memory():
        if facts.method == "lora":
            compare_hollow(file, trained, base, facts)
        return False
    whole = _loaded(base)
    wanted = {}
    for part in facts.parts:
        module = getattr(whole, part)
        _adapt(
            module,
            {key.removeprefix(f"{part}."): tensor for key, tensor in trained.items() if _is_of(part, key)},
            facts,
        )
        wanted[part] = output_of(part, module, device)
    if facts.method == "dora":
        trained_whole, whole = whole, _loaded(base)
        _merge(whole, file, written, facts.pipeline.family)
        for part in facts.parts:
            _compare_layers(getattr(whole, part), getattr(trained_whole, part))
    else:
        _read(whole, file, facts.parts)
    for part, output in wanted.items():
        compare_outputs(part, output_of(part, getattr(whole, part), device), output)
    return True


def _bytes_of(base: BaseModel, facts: AdapterFacts) -> int:
    """Memory that it takes to compute with a base in float32, with a DoRA twice; its text encoders come and go."""
    counts = base.parameters()
    encoders = 2 * sum(counts[name] for name in base.training.encoders)
    return encoders + 4 * counts[base.training.denoiser] * (2 if facts.method == "dora" else 1)


def _is_of(part: str, key: str) -> bool:
    return key.startswith(f"{part}.")


def _loaded(base: BaseModel) -> Any:
    pipeline = base.load_pipeline()
    if base.training.draws_from_embeddings:
        for name in base.training.encoders:
            setattr(pipeline, name, None)  # an adapter does not change them, and the denoiser needs their room
    return base.training.assemble(pipeline, base.load_denoiser(), pipeline.scheduler)


def _adapt(module: Any, tensors: Tensors, facts: AdapterFacts) -> None:
    """Put the trained tensors into a module, as the trainer does."""
    ending = ".lora_A.weight"
    targets = [key.removesuffix(ending) for key in tensors if key.endswith(ending)]
    is_dora = facts.method == "dora"
    # Peft computes with any number and says int.
    alpha = cast("int", facts.alpha)
    config = LoraConfig(r=facts.rank, lora_alpha=alpha, target_modules=targets, use_dora=is_dora, bias="none")
    try:
        module.add_adapter(config, adapter_name=_SOURCE)
        set_peft_model_state_dict(module, dict(tensors), adapter_name=_SOURCE)
    except FAILURES as error:
        first = str(error).strip().splitlines()
        raise Unproven(f"{facts.base} is not what it was trained on: {first[0] if first else error!r}") from error
    _compare(get_peft_model_state_dict(module, adapter_name=_SOURCE), tensors)


def _read(whole: Any, file: Path, parts: tuple[str, ...]) -> None:
    """Have diffusers read the file, and compare what it made of it with the source, tensor by tensor."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # libraries tell of their own futures here
            whole.load_lora_weights(file.parent, weight_name=file.name, adapter_name=_WRITTEN, local_files_only=True)
    except FAILURES as error:
        first = str(error).strip().splitlines()
        raise Unproven(f"diffusers cannot load the LoRA: {first[0] if first else type(error).__name__}") from error
    for part in parts:
        module = getattr(whole, part)
        if _WRITTEN not in getattr(module, "peft_config", {}):
            raise Unproven(f"diffusers finds nothing for {part} in the LoRA")
        have, want = (get_peft_model_state_dict(module, adapter_name=name) for name in (_WRITTEN, _SOURCE))
        _compare(have, want)
        module.set_adapter(_WRITTEN)


def _compare(have: Tensors, want: Tensors) -> None:
    if have.keys() != want.keys():
        raise Unproven(f"the loaded LoRA and its source differ in {min(have.keys() ^ want.keys())}")
    for key, tensor in want.items():
        if not torch.equal(have[key].float(), tensor.float()):
            raise Unproven(f"{key} does not hold the values of its source")


def _merge(whole: Any, file: Path, tensors: Tensors, family: str) -> None:
    """Add a DoRA, a file and its tensors, to the weights of a pipeline."""
    for pair in read_lora(file, ("dora",)).pairs:
        name = to_kohya(pair.module, family)
        halves = (*(f"{half}.weight" for half in halves_of(family)), "dora_scale")
        down, up, scale = (tensors[f"{name}.{half}"].float() for half in halves)
        weight = _layer(whole, pair.module).weight
        changed = weight.data + pair.alpha / pair.rank * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        lengths = changed.flatten(1).norm(dim=1).reshape(scale.shape)
        weight.data = scale / lengths * changed


def _compare_layers(changed: Any, trained: Any) -> None:
    """Compare the weights of a module that a DoRA was added to with those that peft computes of the trained one."""
    for name, layer in trained.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        layer.merge(adapter_names=[_SOURCE])
        have, want = changed.get_submodule(name).weight.detach(), layer.get_base_layer().weight.detach()
        worst = float((have - want).abs().max())
        if not worst <= _TOLERANCE * float(want.abs().max()):
            raise Unproven(f"{name} becomes another layer than was trained (by {worst:.2g})")


def _layer(whole: Any, module: Module) -> Any:
    part = getattr(whole, module.part)
    paths = {path.removeprefix("text_model."): found for path, found in part.named_modules()}
    return paths[module.path]
