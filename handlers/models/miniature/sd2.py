"""The miniature of Stable Diffusion 2: SD 2's structure, with the first one's text encoder weights and VAE.

What SD 2 changed: the text encoder is OpenCLIP's (exact GELU), a level has as many heads as fit its width, the
transformers project with linear layers, and the UNet predicts the velocity (Salimans & Ho 2022).
"""

from __future__ import annotations

from typing import Any

from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel

from handlers.models.miniature import drawing

HEADS = (3, 5, 6, 6)


def text_encoder() -> CLIPTextModel:
    """The first miniature's text encoder with OpenCLIP's activation."""
    made = drawing.text_encoder()
    configuration = made.config
    configuration.hidden_act = "gelu"
    return CLIPTextModel(configuration)


def unet() -> UNet2DConditionModel:
    """SD 2's UNet at widths 24, 40, 48, 48 with heads of 8."""
    return drawing.unet(
        block_out_channels=(24, 40, 48, 48), attention_head_dim=HEADS, use_linear_projection=True, norm_num_groups=4
    )


def scheduler() -> DDIMScheduler:
    """SD 2's schedule: SD 1's noise, the velocity predicted."""
    made: DDIMScheduler = DDIMScheduler.from_config(
        drawing.scheduler().config, clip_sample=False, prediction_type="v_prediction"
    )
    return made


def pipeline(**parts: Any) -> StableDiffusionPipeline:
    """A pipeline of the given parts and fresh ones for the rest."""
    made = {"text_encoder": text_encoder, "unet": unet, "scheduler": scheduler}
    return drawing.pipeline(**{name: make() for name, make in made.items() if name not in parts} | parts)
