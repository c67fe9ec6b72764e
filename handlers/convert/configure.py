"""Configurations of a Diffusers folder made of one file: the family's own, as data, or those of a folder like it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handlers.convert.families import Family
from handlers.convert.recognise import Single
from handlers.convert.source import locate
from handlers.convert.vocabulary import write_clip
from handlers.models.folders import parts_of
from sessions import files
from sessions.refusal import Refusal

_DATA = Path(__file__).parent / "configs"
_CHANNELS = {"inpainting": 9, "instruct-pix2pix": 8}
_CLASSES = {
    ("sd1", "inpainting"): "StableDiffusionInpaintPipeline",
    ("sd2", "inpainting"): "StableDiffusionInpaintPipeline",
    ("sdxl", "inpainting"): "StableDiffusionXLInpaintPipeline",
    ("sd1", "instruct-pix2pix"): "StableDiffusionInstructPix2PixPipeline",
    ("sdxl", "instruct-pix2pix"): "StableDiffusionXLInstructPix2PixPipeline",
}
# Parts that drawing does without.
_SPARED = ("safety_checker", "image_encoder")
_GUIDANCE = ("guidance_in.in_layer.weight", "model.diffusion_model.guidance_in.in_layer.weight")


@dataclass(frozen=True)
class Configuration:
    """What a Diffusers folder has besides weights.

    Attributes:
        documents: relative path → JSON.
        folders: relative path → a folder to copy (tokenizers, a depth estimator).
        tokenizers: name → token that pads, for those of CLIP that come with fastsd.
        resolution: pixels of a side that the model was made for.
    """

    documents: Mapping[str, Any]
    folders: Mapping[str, Path]
    tokenizers: Mapping[str, str]
    resolution: int


def configuration_of(single: Single, family: Family, like: Path | None) -> Configuration:
    """The configuration of a file.

    Args:
        single: the file.
        family: its family.
        like: a Diffusers folder to take all from; None: the family's own.

    Raises:
        Refusal: code ``source``: ``like`` is no Diffusers folder, or the variant has no configuration.
    """
    return _taken(like, family) if like else _own(single, family)


def _taken(like: Path, family: Family) -> Configuration:
    names = ["model_index.json", "scheduler/scheduler_config.json"]
    names += [f"{part.name}/config.json" for part in family.components]
    documents = {}
    for name in names:
        try:
            documents[name] = json.loads((like / name).read_bytes())
        except (OSError, ValueError):
            raise Refusal("source", f"{like.name} has no {name} that can be read.", "Name a whole folder.") from None
    folders = {place.name: place for place in sorted(like.glob("tokenizer*"))}
    index = documents["model_index.json"]
    known = {"scheduler", *folders, *(part.name for part in family.components)}
    for name in parts_of(index):
        if name in _SPARED or (name not in known and not (like / name).is_dir()):
            index[name] = [None, None]  # a name without its folder would keep the pipeline from loading
            if name == "safety_checker":
                index["requires_safety_checker"] = False
        elif name not in known:
            folders[name] = like / name
    return Configuration(
        documents, folders, {}, int(documents.get("unet/config.json", {}).get("sample_size") or 64) * 8
    )


def _own(single: Single, family: Family) -> Configuration:
    if (single.variant not in ("base", "inpainting")) and (family.name, single.variant) not in _CLASSES:
        raise Refusal(
            "source",
            f"{single.path.name} is a {single.variant} model of the family {family.name}.",
            "Name a Diffusers folder of such a model with --like: what the file has not is taken from there.",
        )
    data = deepcopy(json.loads((_DATA / f"{family.name}.json").read_bytes()))
    documents, scheduler = data["documents"], data["documents"]["scheduler/scheduler_config.json"]
    resolution = data["resolution"]
    if single.prediction == "v":
        scheduler["prediction_type"] = "v_prediction"
        if family.name == "sd2":
            resolution = 768
            documents["unet/config.json"]["sample_size"] = 96
    if single.zero_snr:
        scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    kind = _CLASSES.get((family.name, single.variant))
    if kind:
        documents["model_index.json"]["_class_name"] = kind
        documents["unet/config.json"]["in_channels"] = _CHANNELS[single.variant]
    if family.name == "flux":
        guided = any(name in single.tensors for name in _GUIDANCE)
        documents["transformer/config.json"]["guidance_embeds"] = guided
        scheduler |= {} if guided else {"shift": 1.0, "use_dynamic_shifting": False}
    return Configuration(documents, {}, data["tokenizers"], resolution)


def write(configuration: Configuration, target: Path) -> None:
    """Write configurations and tokenizers into a fresh folder."""
    for name, document in configuration.documents.items():
        files.write_json(target / name, document)
    for name, folder in configuration.folders.items():
        shutil.copytree(folder, target / name)
    for name, padding in configuration.tokenizers.items():
        (target / name).mkdir()
        if padding:
            write_clip(target / name, padding)


# (component, tensor, axis, key of the configuration): where a shape says what the configuration says too.
_SHAPES = (
    ("unet", "conv_in.weight", 0, "block_out_channels"),
    ("unet", "conv_in.weight", 1, "in_channels"),
    ("vae", "decoder.conv_in.weight", 1, "latent_channels"),
    ("vae", "encoder.conv_in.weight", 0, "block_out_channels"),
    ("text_encoder", "embeddings.token_embedding.weight", 0, "vocab_size"),
    ("text_encoder", "embeddings.token_embedding.weight", 1, "hidden_size"),
    ("text_encoder_2", "embeddings.token_embedding.weight", 1, "hidden_size"),
    ("text_encoder_2", "shared.weight", 1, "d_model"),
    ("transformer", "x_embedder.weight", 1, "in_channels"),
    ("transformer", "context_embedder.weight", 1, "joint_attention_dim"),
)


def check(folder: Path, family: Family) -> None:
    """Hold the written weights against the configuration, where one says what the other does.

    Raises:
        Refusal: code ``source``: they are of different shapes.
    """
    for part in family.components:
        config = json.loads((folder / part.name / "config.json").read_bytes())
        tensors = {part.current(key): found.tensor for key, found in locate(folder, part.name).items()}
        for component, key, axis, name in _SHAPES:
            said = config.get(name)
            said = said[0] if isinstance(said, list) and said else said
            if component != part.name or key not in tensors or said is None:
                continue
            shape = tensors[key].shape
            if axis >= len(shape) or shape[axis] != said:
                raise Refusal(
                    "source",
                    f"{part.name}/{key} has the shape {list(shape)}, and the configuration says {name} {said}.",
                    "Name a Diffusers folder of the same shape with --like.",
                )
