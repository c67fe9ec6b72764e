"""What a Diffusers folder, or a captioner's transformers folder, holds; told from its JSON files and headers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from handlers.models import headers, pickles
from handlers.models.probe import probe

_FAMILIES = {"StableDiffusionXL": "sdxl", "Flux": "flux", "StableDiffusion": "sd1"}
_VARIANTS = {"Inpaint": "inpainting", "InstructPix2Pix": "instruct-pix2pix", "Depth2Img": "depth"}
_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}
# Parts that hold no weights, and those that drawing does without.
_WEIGHTLESS = frozenset({"scheduler", "tokenizer", "tokenizer_2", "feature_extractor", "image_processor"})
_OPTIONAL = frozenset({"safety_checker", "image_encoder"})
_PARTS = {
    "AutoencoderKL": "vae",
    "ControlNet": "controlnet",
    "FluxControlNet": "controlnet",
    "CLIPTextModel": "text-encoder",
    "T5EncoderModel": "text-encoder",
}
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
INDEX = "model_index.json"


@dataclass
class FolderContents:
    """The fields of ``inspect.Inspection`` that a folder has."""

    kind: str | None = None
    family: str | None = None
    prediction: str | None = None
    variant: str | None = None
    dtype: str | None = None
    safe: bool | None = None
    problems: list[str] = field(default_factory=list)
    parameters: int | None = None
    layout: str | None = None


def folder_kind(folder: Path) -> str | None:
    """``diffusers``, ``captioner`` (Kosmos-2), ``lora`` (peft), or what a component's configuration says; else None."""
    if (folder / INDEX).is_file():
        return "diffusers"
    if (folder / "adapter_config.json").is_file():
        return "lora"
    config = _json(folder / "config.json")
    if config.get("model_type") == "kosmos-2":
        return "captioner"
    kind = str(config.get("_class_name") or next(iter(config.get("architectures") or ()), ""))
    return next((known for start, known in _PARTS.items() if kind.startswith(start)), None)


def read_folder(folder: Path) -> FolderContents:
    """Look at a folder; what is wrong with it stands in ``problems``."""
    match folder_kind(folder):
        case "diffusers":
            return _diffusers(folder)
        case "captioner":
            contents = FolderContents(kind="captioner", family="kosmos2", safe=True)
            _weigh(folder, folder, contents)
            if not (folder / "tokenizer.json").is_file() and not (folder / "sentencepiece.bpe.model").is_file():
                contents.problems.append("It has no tokenizer.")
            return contents
        case "lora" | "vae" | "controlnet" | "text-encoder" as kind:
            return _part(folder, kind)
    return FolderContents(problems=["It is no Diffusers folder: it has no model_index.json."])


def _part(folder: Path, kind: str) -> FolderContents:
    """A component alone: what its tensors are says which family it is of."""
    contents = FolderContents(kind=kind, safe=True, layout="peft" if kind == "lora" else "diffusers")
    _weigh(folder, folder, contents)
    shapes: dict[str, tuple[int, ...] | None] = {}
    for shard in _shards(folder):
        with suppress(OSError, headers.HeaderError):
            shapes |= {name: entry.shape for name, entry in headers.read_header(shard).tensors.items()}
    found = probe(shapes)
    contents.family, contents.variant = found.family, found.variant
    if kind == "vae" and int(_json(folder / "config.json").get("latent_channels") or 4) == 16:
        contents.family = "flux"
    return contents


def _diffusers(folder: Path) -> FolderContents:
    index = _json(folder / INDEX)
    if not index:
        return FolderContents(kind="diffusers", problems=["Its model_index.json is damaged or incomplete."])
    name = str(index.get("_class_name", ""))
    family = next((family for start, family in _FAMILIES.items() if name.startswith(start)), None)
    contents = FolderContents(kind="diffusers", family=family, safe=True)
    contents.variant = next((variant for part, variant in _VARIANTS.items() if part in name), "base")
    if family is None:
        contents.problems.append(f"Its pipeline {name or '(unnamed)'} is none that fastsd knows.")
    if family == "sd1" and _json(folder / "text_encoder" / "config.json").get("hidden_act") == "gelu":
        contents.family = "sd2"  # OpenCLIP; SD 1's CLIP has quick_gelu
    if family == "flux":
        contents.prediction = "flow"
    elif family:
        scheduler = _json(folder / "scheduler" / "scheduler_config.json")
        contents.prediction = _PREDICTIONS.get(str(scheduler.get("prediction_type", "epsilon")))
    for part in parts_of(index):
        if not (folder / part).is_dir():
            if part not in _OPTIONAL:
                contents.problems.append(f"Its {part} is missing.")
            continue
        if problem := _lacks_config(folder / part):
            contents.problems.append(problem)
        if part not in _WEIGHTLESS:
            _weigh(folder / part, folder, contents)
    return contents


def parts_of(index: Mapping[str, Any]) -> list[str]:
    """The components that a model_index.json names: their folders. A name that is no plain folder's is none."""
    named = (part for part, loader in index.items() if isinstance(loader, list) and loader[:1] != [None])
    return [part for part in named if not part.startswith(("_", ".")) and "/" not in part]


def read_parts(folder: Path) -> list[str]:
    """``parts_of`` the model_index.json in a folder; none where it cannot be read."""
    return parts_of(_json(folder / INDEX))


def _lacks_config(part: Path) -> str | None:
    """What is wrong with a component's configuration; None where it is there and can be read."""
    if part.name.startswith("tokenizer"):
        files = [*part.glob("*.json"), *part.glob("*.model")]
        return None if files else f"Its {part.name} is empty."
    if part.name in ("feature_extractor", "image_processor"):
        return None
    name = "scheduler_config.json" if part.name == "scheduler" else "config.json"
    if not (part / name).is_file():
        return f"Its {part.name}'s {name} is missing."
    return None if _json(part / name) else f"Its {part.name}'s {name} is damaged or incomplete."


def _weigh(part: Path, folder: Path, contents: FolderContents) -> None:
    """Check the weights of a part and take its dtype in."""
    label = part.relative_to(folder).as_posix()
    whose = "Its" if label == "." else f"Its {label}'s"
    problems, dtypes, safe = [], set(), True
    shards = _shards(part)
    if any(_SHARD.search(shard.name) for shard in shards) and not list(part.glob("*.index*.json")):
        problems.append(f"{whose} index of shards is missing.")
    elif not shards:
        problems.append(f"{whose} weights are missing.")
    for shard in shards:
        try:
            if shard.suffix == ".safetensors":
                tensors = headers.read_header(shard).tensors
                dtypes.add(headers.dtype_of(tensors))
                contents.parameters = (contents.parameters or 0) + headers.parameters_of(tensors)
            else:
                found = pickles.read_contents(shard)
                safe = safe and not found.harmful
                dtypes |= {dtype for dtype in found.dtypes if "F" in dtype}
        except (headers.HeaderError, pickles.ArchiveError) as error:
            problems.append(f"{whose} {shard.name} is damaged: {error}.")
            safe = safe and shard.suffix == ".safetensors"
        except OSError:
            problems.append(f"{whose} {shard.name} is missing.")
    contents.problems += problems
    contents.safe = bool(contents.safe) and safe
    kinds = {dtype for dtype in (*dtypes, contents.dtype) if dtype}
    contents.dtype = None if not kinds else kinds.pop() if len(kinds) == 1 else "mixed"


def _shards(part: Path) -> list[Path]:
    """The files of a part's weights: those that an index names, else safetensors, else pickles."""
    for index in sorted(part.glob("*.safetensors.index*.json")) or sorted(part.glob("*.bin.index*.json")):
        table = _json(index).get("weight_map", {})
        return [part / name for name in sorted(set(table.values())) if isinstance(name, str) and "/" not in name]
    return sorted(part.glob("*.safetensors")) or sorted(part.glob("*.bin"))


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
