"""A Diffusers folder as a list of tensors: which file holds which, read from headers and scanned pickles alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handlers.convert.header import read_header
from handlers.convert.plan import Located
from handlers.convert.unpickle import read_tensors
from sessions.refusal import Refusal

__all__ = ["Located", "Pipeline", "locate", "read_pipeline", "tensors_of"]

_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_SUFFIXES = (".safetensors", ".bin")
# Input channels of the UNet beyond the 4 of the latents: what it is shown besides.
_VARIANTS = {9: "inpainting", 8: "instruct-pix2pix", 5: "depth"}


@dataclass(frozen=True)
class Pipeline:
    """What a Diffusers folder says of itself.

    Attributes:
        folder: where it lies.
        family: a name of ``families.FAMILIES``.
        prediction: ``epsilon``, ``v`` or ``flow``.
        variant: ``base``, ``inpainting``, ``instruct-pix2pix`` or ``depth``.
        resolution: pixels of a side that it was made for.
        zero_snr: whether its noise schedule ends without signal.
    """

    folder: Path
    family: str
    prediction: str
    variant: str
    resolution: int
    zero_snr: bool = False

    @property
    def spoken(self) -> tuple[str, str]:
        """Family and variant as ``inspect`` tells them: the refiner is a variant of SDXL, with a table of its own."""
        return ("sdxl", "refiner") if self.family == "sdxl-refiner" else (self.family, self.variant)


def read_pipeline(folder: Path) -> Pipeline:
    """Read what kind of pipeline lies in a folder.

    Raises:
        Refusal: code ``source``: it is none, or of a family that cannot be converted.
        OSError: it cannot be read.
    """
    index = _read_json(folder / "model_index.json", folder)
    kind = str(index.get("_class_name", ""))
    schedule = _read_json(folder / "scheduler" / "scheduler_config.json", folder)
    vae = _read_json(folder / "vae" / "config.json", folder)
    reduction = 2 ** (len(vae.get("block_out_channels", (1, 1, 1, 1))) - 1)
    if kind.startswith("Flux"):
        _read_json(folder / "transformer" / "config.json", folder)
        return Pipeline(folder, "flux", "flow", "base", 1024)
    unet = _read_json(folder / "unet" / "config.json", folder)
    return Pipeline(
        folder,
        _family(kind, unet, folder),
        "v" if schedule.get("prediction_type") == "v_prediction" else "epsilon",
        _VARIANTS.get(int(unet.get("in_channels") or 4), "base"),
        int(unet.get("sample_size") or 64) * reduction,
        bool(schedule.get("rescale_betas_zero_snr")),
    )


def _family(kind: str, unet: Mapping[str, Any], folder: Path) -> str:
    levels = len(unet.get("block_out_channels", ()))
    if kind.startswith("StableDiffusionXL"):
        family, wanted = ("sdxl", 3) if (folder / "text_encoder").is_dir() else ("sdxl-refiner", 4)
    elif kind.startswith("StableDiffusion") and "3" not in kind and "Upscale" not in kind:
        text = _read_json(folder / "text_encoder" / "config.json", folder)
        openclip = unet.get("use_linear_projection") or text.get("hidden_act", "quick_gelu") == "gelu"
        family, wanted = ("sd2" if openclip else "sd1"), 4
    else:
        raise Refusal(
            "source",
            f"{folder.name} is a {kind or 'folder without a class'}.",
            "SD 1, SD 2, SDXL and Flux models are converted.",
        )
    if levels != wanted:
        raise Refusal(
            "source",
            f"The UNet of {folder.name} has {levels} levels where the family {family} has {wanted}.",
            "Is it a model of another family?",
        )
    return family


def _read_json(path: Path, folder: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        missing = path.relative_to(folder).as_posix()
        raise Refusal("source", f"{folder.name} has no {missing}.", "Copy the whole Diffusers folder.") from None
    except (ValueError, RecursionError):
        raise Refusal("source", f"{path.name} in {folder.name} cannot be read.", "Copy the folder again.") from None
    return value if isinstance(value, dict) else {}


def locate(folder: Path, component: str) -> Mapping[str, Located]:
    """The tensors of a component: one file, a ``.fp16.`` variant, shards with their index; safetensors before pickles.

    Raises:
        Refusal: code ``source``: no weights, or a shard is missing; ``corrupt``: one is torn; ``unsafe``: a pickle
            would run code.
    """
    place = folder / component
    for suffix in _SUFFIXES:
        for stem in _STEMS:
            for name in (f"{stem}{suffix}", f"{stem}.fp16{suffix}"):
                if (place / name).is_file():
                    return tensors_of(place / name)
            for name in (f"{stem}{suffix}.index.json", f"{stem}{suffix}.index.fp16.json"):
                if (place / name).is_file():
                    return _shards(place / name, folder)
    raise Refusal("source", f"{folder.name}/{component} has no weights.", "Copy the whole Diffusers folder.")


def tensors_of(file: Path) -> dict[str, Located]:
    """The tensors of a ``.safetensors`` file or of a pickle, without loading them.

    Raises:
        Refusal: ``corrupt`` or ``unsafe``.
    """
    with file.open("rb") as opened:
        zipped = opened.read(2) == b"PK"
    pickled = file.suffix != ".safetensors" and (zipped or file.suffix in {".ckpt", ".pt", ".pth", ".bin"})
    tensors = read_tensors(file) if pickled else read_header(file).tensors
    return {name: Located(file, tensor) for name, tensor in tensors.items()}


def _shards(index: Path, folder: Path) -> dict[str, Located]:
    table = _read_json(index, folder).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise Refusal("source", f"{index.name} in {folder.name} is damaged.", "Copy the folder again.")
    found: dict[str, Located] = {}
    for name in sorted(set(table.values())):
        shard = index.parent / Path(name).name
        if not shard.is_file():
            raise Refusal("source", f"The shard {name} of {folder.name} is missing.", "Copy the whole folder.")
        found.update(tensors_of(shard))
    missing = sorted(set(table) - set(found))
    if missing:
        raise Refusal("source", f"{folder.name}: {missing[0]} is in no shard.", "Copy the whole folder.")
    return found
