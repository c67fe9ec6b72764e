"""What the families share of drawing samples in half precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from PIL import Image


def computed_in(kind: torch.dtype, device: str) -> AbstractContextManager[Any]:
    """Autocast to the type of a denoiser's weights, if that is a half one."""
    context: AbstractContextManager[Any] = (
        nullcontext() if kind == torch.float32 else torch.autocast(device, dtype=kind)
    )
    return context


def decoded(whole: Any, latents: torch.Tensor) -> list[Image.Image]:
    """Pictures of latents as the VAE gave them, (pictures, channels, height, width)."""
    pictures: list[Image.Image] = whole.image_processor.postprocess(whole.vae.decode(latents).sample, output_type="pil")
    return pictures
