"""Another VAE in place of the model's own: a Diffusers folder, or one file in either naming."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from handlers.convert.header import TensorEntry
from handlers.convert.keymap import Component
from handlers.convert.plan import Located, canonical, to_components
from handlers.convert.source import locate, tensors_of
from sessions.refusal import Refusal


def read_vae(path: Path, component: Component) -> dict[str, Located]:
    """The tensors of a VAE by canonical name.

    Args:
        path: a Diffusers pipeline, the folder of its VAE, or one file: Diffusers' names, or the original ones.
        component: the family's table of its VAE.

    Raises:
        Refusal: code ``source``: it is no VAE; ``corrupt``, ``unsafe``: as of every source.
    """
    if path.is_dir():
        pipeline = path if (path / component.name).is_dir() else None
        return canonical(component, locate(pipeline, component.name) if pipeline else locate(path.parent, path.name))
    tensors = tensors_of(path)
    if all(component.match_diffusers(component.current(key)) for key in tensors):
        return canonical(component, tensors)
    bare = replace(component, aliases=(*component.aliases, ""))
    planned, unknown = to_components((bare,), tensors)
    if unknown or not planned:
        raise Refusal(
            "source", f"{path.name} is no VAE of this family.", "Name a VAE, as a file or a Diffusers folder."
        )
    found = {}
    for entry in planned[component.name]:
        piece = entry.pieces[0]  # a VAE has no fused tensors
        found[entry.name] = Located(
            piece.file, TensorEntry(entry.dtype, entry.shape, piece.begin, piece.begin + piece.length)
        )
    return found
