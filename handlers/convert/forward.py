"""The last proof: diffusers' own reader opens the file, and every component computes what the folder's computes.

diffusers' key map is another implementation than ours, so a wrong table shows here. One component at a time is in
memory, twice. Imports torch.
"""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch

from handlers.convert.families import Family
from handlers.convert.quiet import quiet_libraries
from handlers.convert.source import tensors_of
from handlers.convert.verify import Unproven

_TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Weights are compared exactly; the outputs of equal weights may differ by the order of additions only.
_TOLERANCE = 1e-4
_PIPELINES = {
    "sd1": "StableDiffusionPipeline",
    "sd2": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sdxl-refiner": "StableDiffusionXLImg2ImgPipeline",
    "flux": "FluxPipeline",
}
# What diffusers and peft raise where a file is not what they expect.
FAILURES = (ValueError, KeyError, RuntimeError, OSError, NotImplementedError, AttributeError, TypeError)


def compare_forward(
    file: Path,
    folder: Path,
    family: Family,
    device: str = "cpu",
    *,
    dtype: torch.dtype | None = None,
    names: Collection[str] | None = None,
) -> None:
    """Load both models component by component, compare their weights exactly and their outputs on fixed inputs.

    Args:
        file: the single file.
        folder: the Diffusers folder that it was made of, or that was made of it.
        family: its family.
        device: where to compute.
        dtype: the type of the one that was written; None: the file was.
        names: the components to compare; None: all.

    Raises:
        Unproven: diffusers cannot load the file, a weight differs, or an output does.
    """
    quiet_libraries()
    every = [part.name for part in family.components]
    wanted = [name for name in every if names is None or name in names]
    for name, ours, theirs in _components(file, folder, family, wanted, dtype or _dtype_of(file, family)):
        _compare_weights(name, ours, theirs)
        _compare_outputs(name, ours, theirs, device)


def _dtype_of(file: Path, family: Family) -> torch.dtype:
    """The type of the weights that draw."""
    for name, located in tensors_of(file).items():
        if family.drawing.match_single(name) and located.tensor.dtype in _TORCH:
            return _TORCH[located.tensor.dtype]
    raise Unproven(f"the file holds no {family.drawing.name}")


def _components(
    file: Path, folder: Path, family: Family, wanted: Collection[str], dtype: torch.dtype
) -> Iterator[tuple[str, Any, Any]]:
    settings: dict[str, Any] = {"config": str(folder), "local_files_only": True, "torch_dtype": dtype}
    index = json.loads((folder / "model_index.json").read_bytes())

    def theirs(name: str) -> Any:
        return _class(index, name).from_pretrained(folder / name, local_files_only=True, torch_dtype=dtype)

    names = [part.name for part in family.components]
    absent: dict[str, Any] = {}
    for name in names:
        if name.startswith("text_encoder"):
            continue
        absent[name] = None
        if name in wanted:
            yield name, _load(_class(index, name).from_single_file, file, subfolder=name, **settings), theirs(name)
    if family.name == "sdxl-refiner":
        absent |= {"text_encoder": None, "tokenizer": None}
    if family.name.startswith("sd") and not family.name.startswith("sdxl"):
        absent["safety_checker"] = None
    pipeline = _load(getattr(diffusers, _PIPELINES[family.name]).from_single_file, file, **absent, **settings)
    for name in wanted:
        if name.startswith("text_encoder"):
            yield name, getattr(pipeline, name), theirs(name)


def _class(index: dict[str, Any], name: str) -> Any:
    library, kind = index[name]
    return getattr(importlib.import_module(library), kind)


def _load(load: Any, file: Path, **settings: Any) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # libraries tell of their own futures here
            return load(str(file), **settings)
    except FAILURES as error:
        first = str(error).strip().splitlines()
        raise Unproven(f"diffusers cannot load the file: {first[0] if first else type(error).__name__}") from error


def _compare_weights(name: str, ours: Any, theirs: Any) -> None:
    have, want = ours.state_dict(), theirs.state_dict()
    if set(have) != set(want):
        odd = min(set(have) ^ set(want))
        raise Unproven(f"{name}: the loaded model and the source differ in {odd}")
    for key, tensor in want.items():
        if have[key].is_meta or not torch.equal(have[key], tensor.to(have[key].dtype)):
            raise Unproven(f"{name}/{key} does not hold the values of its source")


def _compare_outputs(name: str, ours: Any, theirs: Any, device: str) -> None:
    compare_outputs(name, output_of(name, ours, device), output_of(name, theirs, device))


def output_of(name: str, model: Any, device: str) -> torch.Tensor:
    """What a component computes of fixed inputs, in float32; the model is moved and cast in place.

    Args:
        name: of the component.
        model: it.
        device: where to compute.
    """
    # Half precision has no CPU kernels for some layers; the weights are equal already.
    ready = model.eval().to(device=device, dtype=torch.float32)
    with torch.no_grad():
        return _run(ready, _placed(_inputs(name, ready.config), device))


def compare_outputs(name: str, have: torch.Tensor, want: torch.Tensor) -> None:
    """Compare what a written component computes with what its source does.

    Raises:
        Unproven: they differ by more than the order of additions, or are no numbers.
    """
    if not bool(torch.isfinite(want).all()):
        raise Unproven(f"{name} computes values that are no numbers")
    worst = float((have - want).abs().max())
    if worst > _TOLERANCE * max(1.0, float(want.abs().max())):
        raise Unproven(f"{name} computes something else than its source (by {worst:.2g})")


def _placed(inputs: dict[str, Any], device: str) -> dict[str, Any]:
    return {
        key: _placed(value, device) if isinstance(value, dict) else value.to(device) for key, value in inputs.items()
    }


def _inputs(name: str, config: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    if name == "unet":
        inputs: dict[str, Any] = {
            "sample": random(1, config.in_channels, 16, 16),
            "timestep": torch.tensor([501]),
            "encoder_hidden_states": random(1, 7, config.cross_attention_dim),
        }
        if config.addition_embed_type == "text_time":
            numbers = 5 if config.projection_class_embeddings_input_dim == 2560 else 6
            pooled = config.projection_class_embeddings_input_dim - numbers * config.addition_time_embed_dim
            added = {"text_embeds": random(1, pooled), "time_ids": 64 * torch.ones(1, numbers)}
            inputs["added_cond_kwargs"] = added
        return inputs
    if name == "transformer":
        inputs = {
            "hidden_states": random(1, 16, config.in_channels),
            "encoder_hidden_states": random(1, 7, config.joint_attention_dim),
            "pooled_projections": random(1, config.pooled_projection_dim),
            "timestep": torch.tensor([0.5]),
            "img_ids": random(16, 3),
            "txt_ids": torch.zeros(7, 3),
        }
        return {**inputs, "guidance": torch.tensor([3.5])} if config.guidance_embeds else inputs
    if name == "vae":
        return {"sample": random(1, 3, 64, 64)}
    return {"input_ids": torch.randint(0, config.vocab_size, (1, 16), generator=generator)}


def _run(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    output = model(**inputs)
    for field in ("text_embeds", "last_hidden_state"):
        if getattr(output, field, None) is not None:
            return getattr(output, field)
    return output.sample
