"""Another VAE in the place of the base's (``vae:``): checked against the base, and known again by its tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from handlers.convert import families as converted
from handlers.convert.exchange import read_vae
from handlers.convert.plan import Located
from handlers.models import registry
from handlers.train.base import BaseModel
from sessions.refusal import Refusal

_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What diffusers takes where a configuration names none.
_USUAL_SCALE = 0.18215
_LATENTS = "decoder.conv_in.weight"


def put_in(pipeline: Any, base: BaseModel, name: str, models: Path | None, cache: Path) -> dict[str, str]:
    """Put the tensors of another VAE into the pipeline's own.

    Args:
        pipeline: of the base; its VAE gets other weights and stays of its type.
        base: it shall draw with that VAE.
        name: from train.yaml.
        models: the tree's Models folder, or None.
        cache: the worker's cache folder.

    Returns:
        What run.json keeps: ``name``, ``origin``, and ``sha256`` over all tensors.

    Raises:
        Waiting: it is known and not on this machine; the reason names the command.
        Refusal: no such VAE is known, it is of another family than the base, or it is broken.
    """
    model = registry.find(name, "vae", models, cache)
    component = next(part for part in converted.FAMILIES[base.training.name].components if part.name == "vae")
    found = read_vae(model.path, component)
    _check(pipeline.vae, found, model.path, name, base.model.name)
    digest = hashlib.sha256()
    tensors = {}
    for key in sorted(found):
        tensors[key] = _read(found[key], digest)
    pipeline.vae.load_state_dict(tensors)
    return {"name": name, "origin": model.origin, "sha256": digest.hexdigest()}


def require_same(before: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> None:
    """A run goes on with the VAE that its pictures were encoded with.

    Args:
        before: what its run.json keeps.
        now: what ``put_in`` gave; None: the base's own.

    Raises:
        Refusal: code ``vae``: it is another by now.
    """
    if now is not None and before is not None and before.get("sha256") != now["sha256"]:
        raise Refusal(
            "vae",
            f"The VAE {now['name']} is another one than the run began with.",
            "Bring the former one back, or save train.yaml again to start a new run.",
        )


def _check(own: Any, found: Mapping[str, Located], path: Path, name: str, base: str) -> None:
    wanted = {key: tuple(value.shape) for key, value in own.state_dict().items()}
    shapes = {key: tuple(located.tensor.shape) for key, located in found.items()}
    advice = f"Name a VAE that was made for {base}, or write vae: auto."
    channels = own.config.latent_channels
    if _LATENTS in shapes and shapes[_LATENTS][1] != channels:
        what = f"The VAE {name} has {shapes[_LATENTS][1]} latent channels where {base} draws {channels}."
        raise Refusal("vae", what, advice)
    odd = sorted(key for key in {*wanted, *shapes} if wanted.get(key) != shapes.get(key))
    if odd:
        raise Refusal("vae", f"The VAE {name} differs in shape from that of {base}, in {odd[0]}.", advice)
    scale = _scale_of(path)
    if scale is not None and abs(scale - own.config.scaling_factor) > 1e-6:
        what = (
            f"The VAE {name} scales its latents by {scale:g} where {base} knows them by {own.config.scaling_factor:g}."
        )
        raise Refusal("vae", what, advice)


def _scale_of(path: Path) -> float | None:
    """What the latents are multiplied by; None for one file, which does not say."""
    if not path.is_dir():
        return None
    try:
        return float(json.loads((path / "config.json").read_bytes()).get("scaling_factor") or _USUAL_SCALE)
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _read(located: Located, digest: Any) -> torch.Tensor:
    entry = located.tensor
    with located.file.open("rb") as file:
        file.seek(entry.begin)
        content = bytearray(file.read(entry.end - entry.begin))
    digest.update(f"{entry.dtype} {list(entry.shape)}\n".encode())
    digest.update(content)
    if entry.dtype not in _TYPES:
        raise Refusal("vae", f"{located.file.name} holds numbers of the type {entry.dtype}.", "Name another VAE.")
    return torch.frombuffer(content, dtype=_TYPES[entry.dtype]).reshape(tuple(entry.shape))
