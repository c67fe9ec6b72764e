"""The tables of SDXL: the base with its two text encoders, the refiner with the second one alone."""

from __future__ import annotations

from handlers.convert.blocks import clip, open_clip, unet, vae

VAE = vae("first_stage_model.", "vae.")
BASE = (
    unet((False, True, True), added=True),
    VAE,
    clip("text_encoder", "conditioner.embedders.0.transformer."),
    open_clip("text_encoder_2", "conditioner.embedders.1.model."),
)
REFINER = (
    unet((False, True, True, False), added=True),
    VAE,
    open_clip("text_encoder_2", "conditioner.embedders.0.model."),
)
