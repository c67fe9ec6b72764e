"""The base of a training: a Diffusers folder or one file, loaded in float32, never from the network."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from handlers.context import Waiting
from handlers.convert import sd1
from handlers.convert.header import read_header
from handlers.convert.source import locate
from handlers.models import catalogue, registry
from handlers.models.registry import Model
from handlers.train.auto import Base
from sessions.refusal import Refusal

_TOKENS = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
_SD1_PARAMETERS = {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class BaseModel:
    """A base that can be loaded.

    Attributes:
        model: what the registry says of it.
        config: the Diffusers folder that its configuration and tokenizer come from; its own where it is a folder.
    """

    model: Model
    config: Path

    @property
    def facts(self) -> Base:
        """What the table of defaults needs."""
        miniature = self.model.origin == catalogue.BUILT_IN
        return Base(self.model.name, self.model.family, self.model.resolution or 512, miniature)

    def load_pipeline(self) -> Any:
        """All but the UNet: a pipeline with VAE, text encoder, tokenizer and scheduler, in float32 on the CPU."""
        common: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True, "safety_checker": None}
        if self.model.path.is_dir():
            pipeline = StableDiffusionPipeline.from_pretrained(
                self.model.path, unet=None, feature_extractor=None, requires_safety_checker=False, **common
            )
        else:
            pipeline = StableDiffusionPipeline.from_single_file(
                str(self.model.path), config=str(self.config), unet=None, **common
            )
        # transformers keeps the type of the file where diffusers converts.
        return pipeline.to(dtype=torch.float32)

    def load_unet(self) -> Any:
        """A fresh UNet of the base, in float32 on the CPU."""
        common: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True, "subfolder": "unet"}
        if self.model.path.is_dir():
            return UNet2DConditionModel.from_pretrained(self.model.path, **common)
        return UNet2DConditionModel.from_single_file(str(self.model.path), config=str(self.config), **common)

    def parameters(self) -> dict[str, int]:
        """How many numbers each component holds, told from headers; SD 1's own counts for files that have none."""
        if self.model.path.is_file():
            if self.model.path.suffix != ".safetensors":
                return dict(_SD1_PARAMETERS)
            tensors = read_header(self.model.path).tensors
            return {
                part.name: sum(prod(tensor.shape) for name, tensor in tensors.items() if name.startswith(part.prefix))
                for part in sd1.COMPONENTS
            }
        try:
            found = {part.name: locate(self.model.path, part.name) for part in sd1.COMPONENTS}
        except Refusal:
            return dict(_SD1_PARAMETERS)
        return {name: sum(prod(part.tensor.shape) for part in parts.values()) for name, parts in found.items()}

    def finished_dtype(self) -> torch.dtype:
        """The type that the finished weights get: half precision for real bases, a miniature keeps its own."""
        if not self.facts.miniature:
            return torch.float16
        kinds = {located.tensor.dtype for located in locate(self.model.path, "unet").values()}
        return _DTYPES.get(min(kinds), torch.float32)


def find_base(name: str, models: Path | None, cache: Path) -> BaseModel:
    """Find a base that the trainer can use.

    Args:
        name: from train.yaml or fastsd.yaml.
        models: the tree's Models folder, or None.
        cache: the worker's cache folder.

    Raises:
        Waiting: it, or the configuration of a single file, is not on this machine; the reason names the command.
        Refusal: no such base is known, or its family is not trained yet.
    """
    model = registry.find(name, "checkpoint", models, cache)
    if model.family not in ("", "sd1", "sd2"):
        raise Refusal(
            "spec", f"{name} is of the family {model.family}, which comes with a later version.", "Use an SD 1 base."
        )
    if model.path.is_dir():
        return BaseModel(model, model.path)
    return BaseModel(model, _configuration_for(model, models, cache))


def _configuration_for(model: Model, models: Path | None, cache: Path) -> Path:
    """A Diffusers folder with the shape of a single file: its namesake beside it, SD 1.5, or the miniature."""
    width = _text_width(model.path)
    beside = model.path.with_suffix("")
    if (beside / "model_index.json").is_file() and _width_of(beside) == width:
        return beside
    for name in ("miniature", "sd15"):
        try:
            folder = registry.find(name, "checkpoint", models, cache).path
        except Waiting:
            continue
        if folder.is_dir() and _width_of(folder) == width:
            return folder
    raise Waiting(
        f"{model.path.name} is a single file: its tokenizer and configuration come from sd15, which is not on this "
        "machine. Get it with: fastsd models get sd15",
        retry_after=60.0,
    )


def _text_width(path: Path) -> int | None:
    """The width of the text encoder in a single file; None where its header does not say (a .ckpt)."""
    if path.suffix != ".safetensors":
        return 768
    tensor = read_header(path).tensors.get(_TOKENS)
    return tensor.shape[-1] if tensor else None


def _width_of(folder: Path) -> int | None:
    try:
        value = json.loads((folder / "text_encoder" / "config.json").read_bytes()).get("hidden_size")
    except (OSError, ValueError, AttributeError):
        return None
    return value if isinstance(value, int) else None
