"""The miniature of Stable Diffusion 1: its classes, blocks, names and schedule, at tiny widths, for 64 px pictures.

Four UNet levels of two layers with cross attention in the first three, a four-level VAE that reduces by 8, a CLIP text
encoder of 77 positions, SD 1's noise schedule. GroupNorm has 4 channels a group or more, as the real one has: with one
channel a group a VAE cannot keep flat colours.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from handlers.models.miniature import vocabulary
from handlers.models.miniature.seeded import seeded

SEED = 1
TEXT_WIDTH = 128
POSITIONS = 77
RESOLUTION = 64
SCALING_FACTOR = 0.18215


def tokenizer() -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer over the miniatures' vocabulary."""
    table, merges = vocabulary.clip_vocabulary()
    return CLIPTokenizer(vocab=table, merges=merges, model_max_length=POSITIONS)


def text_encoder() -> CLIPTextModel:
    """CLIP's text transformer, 3 layers of ``TEXT_WIDTH``."""
    table, _merges = vocabulary.clip_vocabulary()
    configuration = CLIPTextConfig(
        vocab_size=len(table),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        hidden_act="quick_gelu",
        bos_token_id=table[vocabulary.CLIP_START],
        eos_token_id=table[vocabulary.CLIP_END],
        pad_token_id=table[vocabulary.CLIP_END],
    )
    return CLIPTextModel(configuration)


def vae(scaling_factor: float = SCALING_FACTOR) -> AutoencoderKL:
    """SD 1's autoencoder at widths 16, 32, 64, 64: 64 px pictures become 8 × 8 × 4 latents."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=RESOLUTION,
        scaling_factor=scaling_factor,
    )


def unet(**changes: Any) -> UNet2DConditionModel:
    """SD 1's UNet at widths 48, 64, 72, 72 with its 8 heads; ``changes`` are what another family has otherwise."""
    configuration: dict[str, Any] = {
        "sample_size": RESOLUTION // 8,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "block_out_channels": (48, 64, 72, 72),
        "layers_per_block": 2,
        "cross_attention_dim": TEXT_WIDTH,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**configuration | changes)


def scheduler() -> PNDMScheduler:
    """SD 1's schedule, the values of its own scheduler_config.json."""
    return PNDMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def pipeline(**parts: Any) -> StableDiffusionPipeline:
    """A pipeline of the given parts (``unet=``, ``vae=`` …) and fresh ones for the rest."""
    made = {
        "vae": vae,
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "unet": unet,
        "scheduler": scheduler,
    }
    return StableDiffusionPipeline(
        **{name: parts[name] if name in parts else make() for name, make in made.items()},
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build(target: Path) -> None:
    """Write the Diffusers folder with random weights, the same every time."""
    with seeded(SEED):
        made = pipeline()
    save(made, target)


def save(made: StableDiffusionPipeline, target: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a pipeline as a Diffusers folder in ``dtype``, with the tokenizer in both of CLIP's file layouts."""
    made.to(dtype=dtype).save_pretrained(target, safe_serialization=True)
    write_vocabulary(target / "tokenizer")


def write_vocabulary(folder: Path) -> None:
    """Add CLIP's older file layout to a saved tokenizer, which other programs read."""
    table, merges = vocabulary.clip_vocabulary()
    (folder / "vocab.json").write_text(json.dumps(table, ensure_ascii=False), encoding="utf-8")
    lines = "".join(f"{left} {right}\n" for left, right in merges)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{lines}", encoding="utf-8")
