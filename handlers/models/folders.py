"""What a Diffusers folder, or a captioner's transformers folder, holds; told from its JSON files and headers."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from handlers.models import headers, pickles

_FAMILIES = {"StableDiffusionXL": "sdxl", "Flux": "flux", "StableDiffusion": "sd1"}
_VARIANTS = {"Inpaint": "inpainting", "InstructPix2Pix": "instruct-pix2pix", "Depth2Img": "depth"}
_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}
# Parts that hold no weights, and those that drawing does without.
_WEIGHTLESS = frozenset({"scheduler", "tokenizer", "tokenizer_2", "feature_extractor", "image_processor"})
_OPTIONAL = frozenset({"safety_checker", "image_encoder"})
# By config.json's model_type: captioners, and models that translate.
_CAPTIONERS = {"kosmos-2": "kosmos2", "blip-2": "blip2", "florence2": "florence2"}
_TRANSLATORS = {"m2m_100": "m2m100", "marian": "marian"}
_TOKENIZERS = ("tokenizer.json", "sentencepiece.bpe.model", "vocab.json", "source.spm")


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


def folder_kind(folder: Path) -> str | None:
    """``diffusers`` for a Diffusers folder, ``captioner`` or ``translator`` for such a transformers one, else None."""
    if (folder / "model_index.json").is_file():
        return "diffusers"
    kind = _json(folder / "config.json").get("model_type")
    return "captioner" if kind in _CAPTIONERS else "translator" if kind in _TRANSLATORS else None


def read_folder(folder: Path) -> FolderContents:
    """Look at a folder; what is wrong with it stands in ``problems``."""
    match folder_kind(folder):
        case "diffusers":
            return _diffusers(folder)
        case "captioner" | "translator" as kind:
            family = (_CAPTIONERS | _TRANSLATORS)[_json(folder / "config.json")["model_type"]]
            contents = FolderContents(kind=kind, family=family, safe=True)
            _weigh(folder, folder, contents)
            if not any((folder / name).is_file() for name in _TOKENIZERS):
                contents.problems.append("It has no tokenizer.")
            return contents
    return FolderContents(problems=["It is no Diffusers folder: it has no model_index.json."])


def _diffusers(folder: Path) -> FolderContents:
    index = _json(folder / "model_index.json")
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
    for part, loader in index.items():
        if part.startswith("_") or not isinstance(loader, list) or loader[:1] == [None]:
            continue
        if not (folder / part).is_dir():
            if part not in _OPTIONAL:
                contents.problems.append(f"Its {part} is missing.")
        elif part not in _WEIGHTLESS:
            _weigh(folder / part, folder, contents)
    return contents


def _weigh(part: Path, folder: Path, contents: FolderContents) -> None:
    """Check the weights of a part and take its dtype in."""
    label = part.relative_to(folder).as_posix()
    whose = "Its" if label == "." else f"Its {label}'s"
    problems, dtypes, safe = [], set(), True
    shards = _shards(part)
    if not shards:
        problems.append(f"{whose} weights are missing.")
    for shard in shards:
        try:
            if shard.suffix == ".safetensors":
                dtypes.add(headers.dtype_of(headers.read_header(shard).tensors))
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
