"""The last proof: diffusers' own reader opens the file, and every component computes what the source computes.

diffusers' key map is another implementation than ours, so a wrong table shows here. One component at a time is in
memory, twice. Imports torch.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel

from handlers.convert.header import read_header
from handlers.convert.quiet import quiet_libraries
from handlers.convert.verify import Unproven

_TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Weights are compared exactly; the outputs of equal weights may differ by the order of additions only.
_TOLERANCE = 1e-4


def compare_forward(file: Path, source: Path, device: str = "cpu") -> None:
    """Load both models component by component, compare their weights exactly and their outputs on fixed inputs.

    Args:
        file: the single file.
        source: the Diffusers folder that it was made of.
        device: where to compute.

    Raises:
        Unproven: diffusers cannot load the file, a weight differs, or an output does.
    """
    quiet_libraries()
    dtype = _dtype_of(file)
    for name, ours, theirs in _components(file, source, dtype):
        _compare_weights(name, ours, theirs)
        _compare_outputs(name, ours, theirs, device)


def _dtype_of(file: Path) -> torch.dtype:
    """The type of the UNet's weights in the file."""
    for name, tensor in read_header(file).tensors.items():
        if name.startswith("model.diffusion_model.") and tensor.dtype in _TORCH:
            return _TORCH[tensor.dtype]
    raise Unproven("the file holds no UNet")


def _components(file: Path, source: Path, dtype: torch.dtype) -> Iterator[tuple[str, Any, Any]]:
    settings: dict[str, Any] = {"config": str(source), "local_files_only": True, "dtype": dtype}
    folder: dict[str, Any] = {"local_files_only": True, "dtype": dtype}

    def single(load: Any, **more: Any) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # libraries tell of their own futures here
                return load(str(file), **settings, **more)
        except (ValueError, KeyError, RuntimeError, OSError, NotImplementedError, AttributeError) as error:
            first = str(error).strip().splitlines()
            raise Unproven(f"diffusers cannot load the file: {first[0] if first else type(error).__name__}") from error

    ours = single(UNet2DConditionModel.from_single_file, subfolder="unet")
    yield "unet", ours, UNet2DConditionModel.from_pretrained(source, subfolder="unet", **folder)
    ours = single(AutoencoderKL.from_single_file, subfolder="vae")
    yield "vae", ours, AutoencoderKL.from_pretrained(source, subfolder="vae", **folder)
    pipeline = single(StableDiffusionPipeline.from_single_file, unet=None, vae=None, safety_checker=None)
    ours = pipeline.text_encoder
    yield (
        "text_encoder",
        ours,
        CLIPTextModel.from_pretrained(source, subfolder="text_encoder", local_files_only=True, dtype=dtype),
    )


def _compare_weights(name: str, ours: Any, theirs: Any) -> None:
    have, want = ours.state_dict(), theirs.state_dict()
    if set(have) != set(want):
        odd = min(set(have) ^ set(want))
        raise Unproven(f"{name}: the loaded model and the source differ in {odd}")
    for key, tensor in want.items():
        if have[key].is_meta or not torch.equal(have[key], tensor.to(have[key].dtype)):
            raise Unproven(f"{name}/{key} does not hold the values of its source")


def _compare_outputs(name: str, ours: Any, theirs: Any, device: str) -> None:
    inputs = _inputs(name, theirs.config)
    outputs = []
    for model in (ours, theirs):
        # Half precision has no CPU kernels for some layers; the weights are equal already.
        ready = model.eval().to(device=device, dtype=torch.float32)
        with torch.no_grad():
            outputs.append(_run(name, ready, {key: value.to(device) for key, value in inputs.items()}))
    have, want = outputs
    if not bool(torch.isfinite(want).all()):
        raise Unproven(f"{name} computes values that are no numbers")
    worst = float((have - want).abs().max())
    if worst > _TOLERANCE * max(1.0, float(want.abs().max())):
        raise Unproven(f"{name} computes something else than its source (by {worst:.2g})")


def _inputs(name: str, config: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    if name == "unet":
        return {
            "sample": torch.randn(1, config.in_channels, 16, 16, generator=generator),
            "timestep": torch.tensor([501]),
            "encoder_hidden_states": torch.randn(1, 7, config.cross_attention_dim, generator=generator),
        }
    if name == "vae":
        return {"sample": torch.randn(1, 3, 64, 64, generator=generator)}
    return {"input_ids": torch.randint(0, config.vocab_size, (1, 16), generator=generator)}


def _run(name: str, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    output = model(**inputs)
    return output.last_hidden_state if name == "text_encoder" else output.sample
