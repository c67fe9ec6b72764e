"""A Diffusers folder as a list of tensors: which file holds which, read from headers alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handlers.convert.header import Tensor, read_header
from sessions.refusal import Refusal

_STEMS = ("diffusion_pytorch_model", "model")


@dataclass(frozen=True)
class Located:
    """A tensor and the file that it lies in."""

    file: Path
    tensor: Tensor


@dataclass(frozen=True)
class Pipeline:
    """What a Diffusers folder says of itself.

    Attributes:
        folder: where it lies.
        family: ``sd1``.
        prediction: ``epsilon`` or ``v``.
        variant: ``base`` or ``inpainting``.
        resolution: pixels of a side that it was made for.
    """

    folder: Path
    family: str
    prediction: str
    variant: str
    resolution: int


def read_pipeline(folder: Path) -> Pipeline:
    """Read what kind of pipeline lies in a folder.

    Raises:
        Refusal: code ``source``: it is none, or of a family that cannot be converted yet.
        OSError: it cannot be read.
    """
    index = _read_json(folder / "model_index.json", folder)
    kind = str(index.get("_class_name", ""))
    if not kind.startswith("StableDiffusion") or "XL" in kind or "3" in kind:
        raise Refusal(
            "source",
            f"{folder.name} is a {kind or 'folder without a class'}.",
            "Only SD 1 models are converted so far.",
        )
    unet = _read_json(folder / "unet" / "config.json", folder)
    text = _read_json(folder / "text_encoder" / "config.json", folder)
    if unet.get("use_linear_projection") or text.get("hidden_act", "quick_gelu") != "quick_gelu":
        raise Refusal("source", f"{folder.name} is an SD 2 model.", "Only SD 1 models are converted so far.")
    if len(unet.get("block_out_channels", ())) != 4:
        raise Refusal("source", f"{folder.name} has not SD 1's four levels.", "Only SD 1 models are converted so far.")
    schedule = _read_json(folder / "scheduler" / "scheduler_config.json", folder)
    vae = _read_json(folder / "vae" / "config.json", folder)
    reduction = 2 ** (len(vae.get("block_out_channels", (1, 1, 1, 1))) - 1)
    return Pipeline(
        folder,
        "sd1",
        "v" if schedule.get("prediction_type") == "v_prediction" else "epsilon",
        "inpainting" if unet.get("in_channels") == 9 else "base",
        int(unet.get("sample_size") or 64) * reduction,
    )


def _read_json(path: Path, folder: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        missing = path.relative_to(folder).as_posix()
        raise Refusal("source", f"{folder.name} has no {missing}.", "Copy the whole Diffusers folder.") from None
    except ValueError:
        raise Refusal("source", f"{path.name} in {folder.name} cannot be read.", "Copy the folder again.") from None
    return value if isinstance(value, dict) else {}


def locate(folder: Path, component: str) -> Mapping[str, Located]:
    """The tensors of a component: one file, a ``.fp16.`` variant, or shards with their index.

    Raises:
        Refusal: code ``source``: no ``.safetensors`` weights, or a shard is missing; ``corrupt``: one is torn.
    """
    place = folder / component
    for stem in _STEMS:
        for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors"):
            if (place / name).is_file():
                return _tensors(place / name)
        for name in (f"{stem}.safetensors.index.json", f"{stem}.safetensors.index.fp16.json"):
            if (place / name).is_file():
                return _shards(place / name, folder)
    raise Refusal(
        "source",
        f"{folder.name}/{component} has no .safetensors weights.",
        "Save it with safe_serialization=True; .bin files are not read.",
    )


def _tensors(file: Path) -> dict[str, Located]:
    return {name: Located(file, tensor) for name, tensor in read_header(file).tensors.items()}


def _shards(index: Path, folder: Path) -> dict[str, Located]:
    table = _read_json(index, folder).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise Refusal("source", f"{index.name} in {folder.name} is damaged.", "Copy the folder again.")
    found: dict[str, Located] = {}
    for name in sorted(set(table.values())):
        shard = index.parent / Path(name).name
        if not shard.is_file():
            raise Refusal("source", f"The shard {name} of {folder.name} is missing.", "Copy the whole folder.")
        found.update(_tensors(shard))
    missing = sorted(set(table) - set(found))
    if missing:
        raise Refusal("source", f"{folder.name}: {missing[0]} is in no shard.", "Copy the whole folder.")
    return found
