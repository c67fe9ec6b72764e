"""The table of SD 2, also inpainting and depth: SD 1's with OpenCLIP's text encoder.

The UNet reads the text encoder's last but one layer, so Diffusers keeps 23 of its 24 layers, and no projection.
"""

from __future__ import annotations

from handlers.convert import sd1
from handlers.convert.blocks import open_clip

COMPONENTS = (
    sd1.UNET,
    sd1.VAE,
    open_clip("text_encoder", "cond_stage_model.model.", ("transformer.resblocks.23.", "text_projection")),
)
