"""The pictures of a run, frozen: whatever happens to the files afterwards, the run keeps the set that it began with.

A picture is encoded once. The VAE gives a distribution; its mean and deviation are kept and sampled anew in each step,
so that caching takes no randomness away. Pictures of one shape lie together.
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

from handlers.crop.decode import OpenPicture, read_source
from handlers.crop.render import render_window
from handlers.train.buckets import Frame, Shape, bucket_frame
from handlers.train.place import Place, folder_in
from handlers.train.plan import Plan
from sessions import files
from sessions.layout import PRIVATE
from sessions.refusal import Refusal

FEWEST = 3
# Any scale does to learn a picture's upright size; a small one decodes fast.
_GLANCE = 0.1


@dataclass(frozen=True)
class Rendered:
    """What the pictures of a job came to.

    Attributes:
        images: RGB, squares of the training's resolution or of their buckets' shapes.
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
        mean: one a picture, (channels, height, width), float32, before the VAE's scaling factor.
        std: the same shapes.
    """

    mean: Sequence[torch.Tensor]
    std: Sequence[torch.Tensor]

    def of(self, chosen: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation of pictures of one shape, (pictures, channels, height, width)."""
        return torch.stack([self.mean[index] for index in chosen]), torch.stack([self.std[index] for index in chosen])

    def groups(self, first: int) -> list[list[int]]:
        """The first so many pictures by their shape: lists of indices, in the order of the shapes."""
        found: dict[tuple[int, ...], list[int]] = {}
        for index in range(first):
            found.setdefault(tuple(self.mean[index].shape), []).append(index)
        return [found[shape] for shape in sorted(found)]


def render_pictures(
    pictures: Sequence[Mapping[str, Any]], resolution: int, progress: Callable[[int], None]
) -> Rendered:
    """Render each picture's window from its original.

    Args:
        pictures: ``source``, ``box`` (upright pixels), perhaps ``window`` and ``bucket``, and whatever else the payload
            has.
        resolution: pixels of a side.
        progress: called with the number done; may raise to stop.
    """
    rendered = Rendered([], [], [])
    for number, picture in enumerate(pictures, 1):
        source = Path(picture["source"])
        try:
            frame = frame_of(picture, resolution)
            image = render_window(source, frame.window, frame.shape)
        except (Refusal, OSError, ValueError, TypeError) as error:
            reason = error.what if isinstance(error, Refusal) else str(error)
            rendered.left_out.append({"source": str(source), "reason": reason})
        else:
            rendered.images.append(image)
            rendered.pictures.append(picture)
        progress(number)
    return rendered


def with_buckets(
    pictures: Sequence[Mapping[str, Any]], shapes: Sequence[Shape], progress: Callable[[int], None]
) -> list[Mapping[str, Any]]:
    """Find each picture's bucket.

    Args:
        pictures: ``source``, ``box`` (upright pixels) and whatever else the payload has.
        shapes: the buckets.
        progress: called with the number done; may raise to stop.

    Returns:
        The pictures with ``picture`` (its upright size), ``bucket`` (a shape) and ``window`` (upright pixels). One that
        cannot be read stays as it is: rendering it will say why.
    """
    found: list[Mapping[str, Any]] = []
    for number, picture in enumerate(pictures, 1):
        try:
            size = upright_size(Path(picture["source"]))
            frame = bucket_frame(size, square_within(picture["box"]), shapes)
        except (Refusal, OSError, ValueError, TypeError):
            found.append(picture)
        else:
            found.append({**picture, "picture": list(size), "bucket": list(frame.shape), "window": list(frame.window)})
        progress(number)
    return found


def upright_size(source: Path) -> tuple[int, int]:
    """(width, height) of a picture file as it is looked at.

    Raises:
        Refusal, OSError: it cannot be read.
    """
    return OpenPicture(read_source(source)).decode(_GLANCE).size


def frame_of(entry: Mapping[str, Any], resolution: int) -> Frame:
    """How a picture of a run is rendered: as its ``bucket`` and ``window`` say, else as the square in its ``box``."""
    if "bucket" not in entry:
        return Frame(square_within(entry["box"]), (resolution, resolution))
    x0, y0, x1, y1 = entry["window"]
    width, height = entry["bucket"]
    return Frame((x0, y0, x1, y1), (width, height))


def sizes_told(inputs: Sequence[Mapping[str, Any]], plan: Plan) -> torch.Tensor:
    """What SDXL is told of each picture: original size, crop, size trained at; (pictures, 6) in pixels, heights first.

    A window around a subject is a picture of its own, as if nothing had been cut off: told of a crop, the model would
    learn that the subject belongs to cut pictures. A miniature knows no size but the one that it draws.
    """
    rows = []
    for entry in inputs:
        frame = frame_of(entry, plan.resolution)
        left, top, right, bottom = frame.window
        width, height = frame.shape
        original = (height, width) if plan.miniature else (bottom - top, right - left)
        rows.append([*original, 0, 0, height, width])
    return torch.tensor(rows, dtype=torch.float32)


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
        images: RGB.
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
        means.append(distribution.mean[0].cpu())
        deviations.append(distribution.std[0].cpu())
        progress(number)
    vae.to("cpu")
    return Frozen(means, deviations)


def _path(session: Path, run: str) -> Path:
    return session / PRIVATE / "frozen" / run / "latents.safetensors"


def store(place: Place, run: str, frozen: Frozen) -> str:
    """Write ``.fastsd/frozen/<run>/latents.safetensors``. Returns its SHA-256."""

    def write(session: Path) -> str:
        folder_in(session, PRIVATE, "frozen", run)
        with files.atomic_path(_path(session, run)) as temporary:
            save_file(_tensors_of(frozen), temporary)
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
    return _frozen_of(tensors)


def _tensors_of(frozen: Frozen) -> dict[str, torch.Tensor]:
    """``mean`` and ``std`` of the first shape, ``mean.1`` and so on of the others, with the pictures' numbers."""
    groups = frozen.groups(len(frozen.mean))
    tensors: dict[str, torch.Tensor] = {}
    for number, group in enumerate(groups):
        mean, std = frozen.of(group)
        tensors |= {_key("mean", number): mean, _key("std", number): std}
        if len(groups) > 1:
            tensors[_key("pictures", number)] = torch.tensor(group)
    return tensors


def _frozen_of(tensors: Mapping[str, torch.Tensor]) -> Frozen:
    """The inverse of ``_tensors_of``."""
    if "pictures" not in tensors:
        return Frozen(tensors["mean"].unbind(), tensors["std"].unbind())
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    number = 0
    while (key := _key("pictures", number)) in tensors:
        means, deviations = tensors[_key("mean", number)], tensors[_key("std", number)]
        found |= dict(zip(tensors[key].tolist(), zip(means, deviations, strict=True), strict=True))
        number += 1
    ordered = [found[index] for index in range(len(found))]
    return Frozen([mean for mean, _ in ordered], [std for _, std in ordered])


def _key(name: str, number: int) -> str:
    return f"{name}.{number}" if number else name
