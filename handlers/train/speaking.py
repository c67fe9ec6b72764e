"""Text encoders that are not trained: what they say of prompts, once; on the CPU where the GPU has no room for them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch

from handlers.out_of_memory import is_out_of_memory
from handlers.train.families import Embedded, Family


def speak(
    family: Family, pipeline: Any, prompts: Sequence[str], device: str, told: Callable[[str], None]
) -> list[Embedded]:
    """What the text encoders say of each prompt, on ``device``; they leave it afterwards.

    One by one: what is said of a prompt must not depend on its company.

    Args:
        family: of the base.
        pipeline: gives tokenizers and text encoders; the latter are frozen.
        prompts: all that will be said.
        device: where to compute.
        told: told in a line where that is the CPU instead.
    """
    tokens = family.tokens(pipeline, prompts)
    try:
        return _spoken(family, pipeline, tokens, device)
    except (RuntimeError, MemoryError) as error:
        if device == "cpu" or not is_out_of_memory(error):
            raise
    gc.collect()
    torch.cuda.empty_cache()
    told("the text encoders do not fit the GPU: they speak on the CPU")
    return [each.to(device) for each in _spoken(family, pipeline, tokens, "cpu")]


def _spoken(family: Family, pipeline: Any, tokens: dict[str, torch.Tensor], device: str) -> list[Embedded]:
    encoders = [getattr(pipeline, name) for name in family.encoders]
    count = len(next(iter(tokens.values())))
    try:
        for encoder in encoders:
            encoder.requires_grad_(requires_grad=False).eval().to(device)
        with torch.no_grad():
            return [
                family.embed(pipeline, {name: ids[row : row + 1].to(device) for name, ids in tokens.items()})
                for row in range(count)
            ]
    finally:
        for encoder in encoders:
            encoder.to("cpu")
