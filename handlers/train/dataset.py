"""The pictures of a run, frozen: whatever happens to the files afterwards, the run keeps the set that it began with.

A picture is encoded once. The VAE gives a distribution; its mean and deviation are kept and sampled anew in each step,
so that caching takes no randomness away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from handlers.crop.render import render_window
from handlers.train.place import Place, folder_in
from sessions import files
from sessions.layout import PRIVATE
from sessions.refusal import Refusal

FEWEST = 3


@dataclass(frozen=True)
class Rendered:
    """What the pictures of a job came to.

    Attributes:
        images: RGB squares of the training's resolution.
        pictures: the entries of the payload that they were made from, in the same order.
        left_out: ``{"source", "reason"}`` of those that could not be read.
    """

    images: list[Image.Image]
    pictures: list[Mapping[str, Any]]
    left_out: list[dict[str, str]]


@dataclass(frozen=True)
class Frozen:
    """Latent distributions.

    Attributes:
        mean: (pictures, channels, height, width), float32, before the VAE's scaling factor.
        std: the same shape.
    """

    mean: torch.Tensor
    std: torch.Tensor


def render_pictures(
    pictures: Sequence[Mapping[str, Any]], resolution: int, progress: Callable[[int], None]
) -> Rendered:
    """Render each picture's window from its original.

    Args:
        pictures: ``source``, ``box`` (upright pixels) and whatever else the payload has.
        resolution: pixels of a side.
        progress: called with the number done; may raise to stop.
    """
    rendered = Rendered([], [], [])
    for number, picture in enumerate(pictures, 1):
        source = Path(picture["source"])
        try:
            image = render_window(source, square_within(picture["box"]), resolution)
        except (Refusal, OSError, ValueError, TypeError) as error:
            reason = error.what if isinstance(error, Refusal) else str(error)
            rendered.left_out.append({"source": str(source), "reason": reason})
        else:
            rendered.images.append(image)
            rendered.pictures.append(picture)
        progress(number)
    return rendered


def require_enough(rendered: Rendered) -> None:
    """Refuse a set that is too small to train on.

    Raises:
        Refusal: code ``pictures``: fewer than ``FEWEST`` could be read.
    """
    if len(rendered.images) < FEWEST:
        named = "; ".join(f"{Path(left['source']).name}: {left['reason']}" for left in rendered.left_out[:5])
        count = len(rendered.images)
        raise Refusal(
            "pictures",
            f"{count} readable picture{'' if count == 1 else 's'} {'is' if count == 1 else 'are'} too few to train on."
            + (f" Left out: {named}." if named else ""),
            f"Put at least {FEWEST} pictures into the folder and save train.yaml again.",
        )


def square_within(box: Sequence[int]) -> tuple[int, int, int, int]:
    """The largest square in the middle of a box: a picture that was not cropped must not be squeezed."""
    x0, y0, x1, y1 = (int(edge) for edge in box)
    side = min(x1 - x0, y1 - y0)
    left, top = x0 + (x1 - x0 - side) // 2, y0 + (y1 - y0 - side) // 2
    return left, top, left + side, top + side


def encode(images: Sequence[Image.Image], vae: Any, device: str, progress: Callable[[int], None]) -> Frozen:
    """Encode pictures one by one: the VAE takes more memory for a picture than a training step.

    Args:
        images: RGB, of one size.
        vae: diffusers' AutoencoderKL in float32.
        device: where to compute.
        progress: called with the number done; may raise to stop.
    """
    means, deviations = [], []
    vae.to(device)
    for number, image in enumerate(images, 1):
        pixels = torch.from_numpy(np.asarray(image, dtype=np.float32).copy()) / 127.5 - 1.0
        with torch.no_grad():
            distribution = vae.encode(pixels.permute(2, 0, 1)[None].to(device)).latent_dist
        means.append(distribution.mean.cpu())
        deviations.append(distribution.std.cpu())
        progress(number)
    vae.to("cpu")
    return Frozen(torch.cat(means), torch.cat(deviations))


def _path(session: Path, run: str) -> Path:
    return session / PRIVATE / "frozen" / run / "latents.safetensors"


def store(place: Place, run: str, frozen: Frozen) -> str:
    """Write ``.fastsd/frozen/<run>/latents.safetensors``. Returns its SHA-256."""

    def write(session: Path) -> str:
        folder_in(session, PRIVATE, "frozen", run)
        with files.atomic_path(_path(session, run)) as temporary:
            save_file({"mean": frozen.mean, "std": frozen.std}, temporary)
        return files.sha256_of(_path(session, run))

    return place.write(write)


def load(place: Place, run: str, digest: str) -> Frozen | None:
    """The latents of a run; None where they are gone or not those that were written."""
    path = _path(place.now(), run)
    try:
        if files.sha256_of(path) != digest:
            return None
        tensors = load_file(path)
    except OSError:
        return None
    return Frozen(tensors["mean"], tensors["std"])
