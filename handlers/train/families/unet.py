"""What SD 1, SD 2 and SDXL have in common: a UNet that learns noise or velocity."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from PIL import Image

from handlers.train.families.drawing import computed_in, decoded
from handlers.train.families.interface import Asked
from handlers.train.objective import Denoising

STEPS = 20
"""In which a sample is drawn."""


class WithUNet:
    """The part of ``interface.Family`` that families with a UNet share."""

    denoiser: ClassVar[str] = "unet"
    draws_from_embeddings: ClassVar[bool] = False

    def load_denoiser(self, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
        """The UNet (``interface.Family.load_denoiser``)."""
        return load_unet(folder).to(dtype=dtype)

    def objective(self, pipeline: Any) -> Denoising:
        """Noise or velocity, as the base's schedule says (``interface.Family.objective``)."""
        return Denoising(DDPMScheduler.from_config(pipeline.scheduler.config), pipeline.vae.config.scaling_factor)

    def sampling_scheduler(self, pipeline: Any) -> Any:
        """DDIM on the base's schedule (``interface.Family.sampling_scheduler``)."""
        return DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)

    def draw(self, whole: Any, asked: Asked) -> list[Image.Image]:
        """Pictures (``interface.Family.draw``)."""
        kind = whole.unet.dtype
        is_half = kind != torch.float32
        with computed_in(kind, whole.unet.device.type):
            drawn: Any = whole(
                asked.prompts,
                height=asked.side,
                width=asked.side,
                num_inference_steps=STEPS,
                guidance_scale=asked.guidance,
                generator=asked.generators,
                output_type="latent" if is_half else "pil",
                callback_on_step_end=asked.after_step,
            ).images
        # A VAE computes in float32, whatever the UNet does: SDXL's overflows in float16.
        return decoded(whole, drawn.float() / whole.vae.config.scaling_factor) if is_half else list(drawn)


def load_unet(folder: Path) -> Any:
    """A UNet in float32 on the CPU."""
    return UNet2DConditionModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True, subfolder="unet")
