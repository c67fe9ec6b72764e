"""The miniature of Stable Diffusion XL: its classes and blocks, with the first one's text encoder and VAE.

What SDXL changed: a second text encoder (OpenCLIP's, with a projection) stands beside the first, both give their
last but one layer and are joined along the width; three UNet levels, of which the first has no attention and the others
several transformer blocks; the second encoder's pooled embedding and the picture's sizes are added to the time step
(Podell et al. 2023, "SDXL"). The last level has 2 transformer blocks where SDXL has 10.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from handlers.models.miniature import drawing

SECOND_WIDTH = 64
WIDTHS = (24, 32, 40)
HEADS = (3, 4, 5)
DEPTHS = (1, 2, 2)
TIME_WIDTH = 16
"""Of the embedding of each of the six numbers that say a picture's sizes."""
SCALING_FACTOR = 0.13025


def tokenizer_2() -> CLIPTokenizer:
    """The first tokenizer, padded with "!" as OpenCLIP's is."""
    made = drawing.tokenizer()
    made.pad_token = "!"  # noqa: S105 - a token of text
    return made


def text_encoder_2() -> CLIPTextModelWithProjection:
    """OpenCLIP's text transformer with its projection, 3 layers of ``SECOND_WIDTH``."""
    first = drawing.text_encoder().config
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            **{
                **first.to_dict(),
                "hidden_size": SECOND_WIDTH,
                "intermediate_size": 4 * SECOND_WIDTH,
                "projection_dim": SECOND_WIDTH,
                "hidden_act": "gelu",
            }
        )
    )


def vae() -> AutoencoderKL:
    """The first miniature's, with SDXL's factor: what differs is the spread of the latents that the UNet sees."""
    return drawing.vae(SCALING_FACTOR)


def unet() -> UNet2DConditionModel:
    """SDXL's UNet at ``WIDTHS`` with heads of 8."""
    return drawing.unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=WIDTHS,
        attention_head_dim=HEADS,
        transformer_layers_per_block=DEPTHS,
        cross_attention_dim=drawing.TEXT_WIDTH + SECOND_WIDTH,
        use_linear_projection=True,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_WIDTH,
        projection_class_embeddings_input_dim=6 * TIME_WIDTH + SECOND_WIDTH,
    )


def scheduler() -> EulerDiscreteScheduler:
    """SDXL's schedule, the values of its own scheduler_config.json."""
    return EulerDiscreteScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        interpolation_type="linear",
        timestep_spacing="leading",
        steps_offset=1,
    )


def time_ids(count: int) -> torch.Tensor:
    """Original size, crop and target size of uncropped pictures of the miniatures' own size, [count, 6]."""
    side = float(drawing.RESOLUTION)
    return torch.tensor([[side, side, 0.0, 0.0, side, side]]).repeat(count, 1)


def pipeline(**parts: Any) -> StableDiffusionXLPipeline:
    """A pipeline of the given parts and fresh ones for the rest."""
    made = {
        "vae": vae,
        "text_encoder": drawing.text_encoder,
        "text_encoder_2": text_encoder_2,
        "tokenizer": drawing.tokenizer,
        "tokenizer_2": tokenizer_2,
        "unet": unet,
        "scheduler": scheduler,
    }
    return StableDiffusionXLPipeline(
        **{name: parts[name] if name in parts else make() for name, make in made.items()}, add_watermarker=False
    )


def save(made: StableDiffusionXLPipeline, target: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a pipeline as a Diffusers folder in ``dtype``, tokenizers in both of CLIP's file layouts."""
    made.to(dtype=dtype).save_pretrained(target, safe_serialization=True)
    for folder in ("tokenizer", "tokenizer_2"):
        drawing.write_vocabulary(target / folder)
