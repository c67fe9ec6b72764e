"""The base of a training: a Diffusers folder, loaded in float32, never from the network; one file becomes one first."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from handlers.context import Waiting
from handlers.convert import families as converted
from handlers.convert.folder import convert_single
from handlers.convert.source import locate, tensors_of
from handlers.models import catalogue, registry
from handlers.models.registry import Model
from handlers.train.auto import Base
from handlers.train.families import FAMILIES, Family, family_of
from handlers.train.trainable import is_adapted
from sessions.refusal import Refusal

# Where the first text encoder's words lie in one file of SD 1, SD 2, SDXL and Flux.
_TOKENS = (
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
    "cond_stage_model.model.token_embedding.weight",
    "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight",
    "text_encoders.clip_l.transformer.text_model.embeddings.token_embedding.weight",
)
_MINIATURES = {"sd1": "miniature", "sd2": "miniature-sd2", "sdxl": "miniature-sdxl"}
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Channels that a denoiser reads for each of the latents'; more are a mask and a masked picture, or a picture to be
# changed. Flux reads squares of four.
_READ_PER_LATENT = {"unet": 1, "transformer": 4}
_PLAIN_FLUX = "FluxPipeline"


@dataclass(frozen=True)
class BaseModel:
    """A base that can be loaded.

    Attributes:
        model: what the registry says of it.
        folder: the Diffusers folder to load: its own, or what was made of its one file.
    """

    model: Model
    folder: Path

    @property
    def training(self) -> Family:
        """How its family is trained."""
        return family_of(self.model.family)

    @property
    def facts(self) -> Base:
        """What the table of defaults needs."""
        miniature = self.model.origin == catalogue.BUILT_IN
        return Base(self.model.name, self.training.name, self.model.resolution or 512, miniature)

    def load_pipeline(self) -> Any:
        """All but the denoiser: a pipeline with VAE, text encoders, tokenizers and scheduler, on the CPU."""
        return self.training.load(self.folder)

    def load_denoiser(self, dtype: torch.dtype = torch.float32) -> Any:
        """A fresh UNet or transformer of the base, on the CPU."""
        return self.training.load_denoiser(self.folder, dtype)

    def parameters(self) -> dict[str, int]:
        """How many numbers each component holds, told from headers.

        Raises:
            Refusal: weights are missing, torn or unsafe.
        """
        found = {
            part.name: locate(self.folder, part.name) for part in converted.FAMILIES[self.training.name].components
        }
        return {name: sum(prod(part.tensor.shape) for part in parts.values()) for name, parts in found.items()}

    def adapter_parameters(self, layers: Mapping[str, tuple[str, ...]], rank: int) -> int:
        """How many numbers the two factors of an adapter hold; a DoRA's lengths are few beside them.

        Args:
            layers: name of each component that is adapted → endings of its layers' names.
            rank: of the factors.

        Raises:
            Refusal: weights are missing, torn or unsafe.
        """
        shapes = [
            located.tensor.shape
            for part, endings in layers.items()
            for name, located in locate(self.folder, part).items()
            if name.endswith(".weight") and is_adapted(name.removesuffix(".weight"), endings)
        ]
        return sum(rank * (shape[0] + prod(shape[1:])) for shape in shapes)

    def finished_dtype(self) -> torch.dtype:
        """The type that the finished weights get: half precision for real bases, a miniature keeps its own."""
        if not self.facts.miniature:
            return torch.float16
        kinds = {located.tensor.dtype for located in locate(self.folder, self.training.denoiser).values()}
        return _DTYPES.get(min(kinds), torch.float32)


def find_base(name: str, models: Path | None, cache: Path, gpu_bytes: int = 0) -> BaseModel:
    """Find a base that the trainer can use.

    Args:
        name: from train.yaml or fastsd.yaml.
        models: the tree's Models folder, or None.
        cache: the worker's cache folder.
        gpu_bytes: memory of the GPU, by which ``auto`` chooses; 0 without one.

    Raises:
        Waiting: it is not on this machine, and the reason names the command; or there is no room to unpack its file.
        Refusal: no such base is known, its family is not trained yet, it is no plain model, or its file is broken.
    """
    if name.strip().lower() == "auto":
        name = _auto(models, cache, gpu_bytes)
    model = registry.find(name, "checkpoint", models, cache)
    if (model.family or "sd1") not in FAMILIES:
        raise Refusal(
            "spec",
            f"{name} is of the family {model.family}, which comes with a later version.",
            "Use an SD 1, SD 2, SDXL or Flux base.",
        )
    folder = model.path if model.path.is_dir() else unpacked(model, models, cache)
    _refuse_variants(name, folder, family_of(model.family).denoiser)
    return BaseModel(model, folder)


def _auto(models: Path | None, cache: Path, gpu_bytes: int) -> str:
    """What the GPU can train and is here; where nothing is, what it can train."""
    wanted = registry.auto_base(gpu_bytes)
    for name in (wanted, registry.auto_base(0)):
        with suppress(Waiting):
            return registry.check(name, "checkpoint", models, cache).name
    return wanted


def unpacked(model: Model, models: Path | None, cache: Path) -> Path:
    """The Diffusers folder of one file, made once; what was made of an older file of that name is removed.

    Raises:
        Refusal: the file cannot be converted.
        Waiting: there is no room on the disk.
    """
    file = model.path
    facts = file.stat()
    source = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:8]
    version = hashlib.sha256(f"{facts.st_size} {facts.st_mtime_ns}".encode()).hexdigest()[:8]
    parent = cache / "bases"
    folder = parent / f"{file.stem}-{source}-{version}"
    if folder.is_dir():
        return folder
    parent.mkdir(parents=True, exist_ok=True)
    for older in parent.glob(f"*-{source}-*"):
        shutil.rmtree(older, ignore_errors=True)
    try:
        convert_single(file, folder, cache=cache, like=_like(model, models, cache))
    except Refusal as refusal:
        if not folder.is_dir():  # else another worker was faster
            raise Refusal("base", f"{file.name} cannot be trained. {refusal.what}", refusal.advice) from None
    return folder


def _like(model: Model, models: Path | None, cache: Path) -> Path | None:
    """A Diffusers folder of the shape of one file: its namesake beside it, or the miniature; None: the family's own."""
    width = _text_width(model.path)
    beside = model.path.with_suffix("")
    if (beside / "model_index.json").is_file() and _width_of(beside) == width:
        return beside
    name = _MINIATURES.get(model.family or "sd1")
    with suppress(Waiting):
        miniature = registry.find(name, "checkpoint", models, cache).path if name else None
        if miniature and _width_of(miniature) == width:
            return miniature
    return None


def _refuse_variants(name: str, folder: Path, denoiser: str) -> None:
    """Refuse a base that draws with more than a prompt: it would learn from a mask that is not there.

    Raises:
        Refusal: code ``base``.
    """
    try:
        channels = json.loads((folder / denoiser / "config.json").read_bytes())["in_channels"]
        latent = json.loads((folder / "vae" / "config.json").read_bytes())["latent_channels"]
        kind = json.loads((folder / "model_index.json").read_bytes())["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if denoiser == "transformer" and kind != _PLAIN_FLUX:
        raise Refusal(
            "base",
            f"{name} is a {kind}, which draws with more than a prompt.",
            "Train flux-dev or flux-schnell, and use the LoRA on it.",
        )
    usual = latent * _READ_PER_LATENT[denoiser]
    if channels != usual:
        raise Refusal(
            "base",
            f"{name} reads {channels} channels where a model that draws from prompts reads {usual}: "
            "it is an inpainting, depth or editing model, and would learn to ignore what it is given.",
            "Train its plain sibling, and add the difference afterwards in the WebUI's checkpoint merger.",
        )


def _text_width(path: Path) -> int | None:
    """The width of the first text encoder in one file; None where it does not say."""
    tensors = tensors_of(path)
    return next((tensors[name].tensor.shape[-1] for name in _TOKENS if name in tensors), None)


def _width_of(folder: Path) -> int | None:
    try:
        value = json.loads((folder / "text_encoder" / "config.json").read_bytes()).get("hidden_size")
    except (OSError, ValueError, AttributeError):
        return None
    return value if isinstance(value, int) else None
