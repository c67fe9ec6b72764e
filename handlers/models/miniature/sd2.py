"""The miniature of Stable Diffusion 2: SD 2's structure, with the first one's text encoder weights and VAE.

What SD 2 changed: the text encoder is OpenCLIP's (exact GELU), a level has as many heads as fit its width, the
transformers project with linear layers, and the UNet predicts the velocity (Salimans & Ho 2022).
"""

from __future__ import annotations

from pathlib import Path

from diffusers import DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel

from handlers.models.miniature import drawing
from handlers.models.miniature.seeded import seeded

HEADS = (3, 5, 6, 6)


def text_encoder() -> CLIPTextModel:
    """The first miniature's text encoder with OpenCLIP's activation."""
    made = drawing.text_encoder()
    configuration = made.config
    configuration.hidden_act = "gelu"
    return CLIPTextModel(configuration)


def unet() -> UNet2DConditionModel:
    """SD 2's UNet at widths 24, 40, 48, 48 with heads of 8."""
    return UNet2DConditionModel(
        sample_size=drawing.RESOLUTION // 8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(24, 40, 48, 48),
        layers_per_block=2,
        cross_attention_dim=drawing.TEXT_WIDTH,
        attention_head_dim=HEADS,
        use_linear_projection=True,
        norm_num_groups=4,
    )


def scheduler() -> DDIMScheduler:
    """SD 2's schedule: SD 1's noise, the velocity predicted."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


def build(target: Path) -> None:
    """Write the Diffusers folder with random weights, the same every time."""
    with seeded(drawing.SEED):
        made = drawing.pipeline(text_encoder=text_encoder(), unet=unet(), scheduler=scheduler())
    drawing.save(made, target)
