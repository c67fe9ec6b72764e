"""The table of SD 1, also inpainting and instruct-pix2pix: the layout of the original LDM code."""

from __future__ import annotations

from handlers.convert.blocks import clip, unet, vae

UNET = unet((True, True, True, False))
VAE = vae("first_stage_model.", "vae.")
TEXT_ENCODER = clip("text_encoder", "cond_stage_model.transformer.")

COMPONENTS = (UNET, VAE, TEXT_ENCODER)
