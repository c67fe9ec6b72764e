"""The key map of SD 1 (also SD 1 inpainting): the layout of the original LDM code against Diffusers' components.

Four resolution levels, two residual blocks a level going down, three going up, as in the published configuration.
The widths do not matter here. The VAE's decoder counts its levels from the other end in the two layouts.
"""

from __future__ import annotations

from handlers.convert.keymap import Component, with_leaves

_LEVELS = 4
_DOWN = 2
_UP = 3

_UNET_RESNETS = [
    *(
        (f"input_blocks.{3 * i + j + 1}.0", f"down_blocks.{i}.resnets.{j}")
        for i in range(_LEVELS)
        for j in range(_DOWN)
    ),
    ("middle_block.0", "mid_block.resnets.0"),
    ("middle_block.2", "mid_block.resnets.1"),
    *((f"output_blocks.{3 * i + j}.0", f"up_blocks.{i}.resnets.{j}") for i in range(_LEVELS) for j in range(_UP)),
]
_UNET_RESNET_PARTS = [
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
]
_UNET_ATTENTIONS = [
    *(
        (f"input_blocks.{3 * i + j + 1}.1", f"down_blocks.{i}.attentions.{j}")
        for i in range(_LEVELS - 1)
        for j in range(_DOWN)
    ),
    ("middle_block.1", "mid_block.attentions.0"),
    *((f"output_blocks.{3 * i + j}.1", f"up_blocks.{i}.attentions.{j}") for i in range(1, _LEVELS) for j in range(_UP)),
]
_UNET_SAMPLERS = [
    *((f"input_blocks.{3 * (i + 1)}.0.op", f"down_blocks.{i}.downsamplers.0.conv") for i in range(_LEVELS - 1)),
    # The first level up has no attention, so its upsampler is one place earlier in its block.
    ("output_blocks.2.1.conv", "up_blocks.0.upsamplers.0.conv"),
    *((f"output_blocks.{3 * i + 2}.2.conv", f"up_blocks.{i}.upsamplers.0.conv") for i in range(1, _LEVELS - 1)),
]
_UNET = [
    ("time_embed.0", "time_embedding.linear_1"),
    ("time_embed.2", "time_embedding.linear_2"),
    ("input_blocks.0.0", "conv_in"),
    ("out.0", "conv_norm_out"),
    ("out.2", "conv_out"),
    *with_leaves(_UNET_RESNETS, _UNET_RESNET_PARTS),
    *_UNET_ATTENTIONS,
    *_UNET_SAMPLERS,
]

_VAE_RESNETS = [
    *(
        (f"encoder.down.{i}.block.{j}", f"encoder.down_blocks.{i}.resnets.{j}")
        for i in range(_LEVELS)
        for j in range(_DOWN)
    ),
    *(
        (f"decoder.up.{_LEVELS - 1 - i}.block.{j}", f"decoder.up_blocks.{i}.resnets.{j}")
        for i in range(_LEVELS)
        for j in range(_UP)
    ),
    *(
        (f"{side}.mid.block_{j + 1}", f"{side}.mid_block.resnets.{j}")
        for side in ("encoder", "decoder")
        for j in range(2)
    ),
]
_VAE_RESNET_PARTS = [
    ("norm1", "norm1"),
    ("conv1", "conv1"),
    ("norm2", "norm2"),
    ("conv2", "conv2"),
    ("nin_shortcut", "conv_shortcut"),
]
_VAE_ATTENTIONS = [(f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0") for side in ("encoder", "decoder")]
_VAE_ATTENTION_PARTS = [
    ("norm", "group_norm"),
    ("q", "to_q"),
    ("k", "to_k"),
    ("v", "to_v"),
    ("proj_out", "to_out.0"),
]
_VAE = [
    *((name, name) for name in ("quant_conv", "post_quant_conv")),
    *(
        (f"{side}.{single}", f"{side}.{diffusers}")
        for side in ("encoder", "decoder")
        for single, diffusers in (("conv_in", "conv_in"), ("norm_out", "conv_norm_out"), ("conv_out", "conv_out"))
    ),
    *with_leaves(_VAE_RESNETS, _VAE_RESNET_PARTS),
    *with_leaves(_VAE_ATTENTIONS, _VAE_ATTENTION_PARTS),
    *(
        (f"encoder.down.{i}.downsample.conv", f"encoder.down_blocks.{i}.downsamplers.0.conv")
        for i in range(_LEVELS - 1)
    ),
    *(
        (f"decoder.up.{_LEVELS - 1 - i}.upsample.conv", f"decoder.up_blocks.{i}.upsamplers.0.conv")
        for i in range(_LEVELS - 1)
    ),
]

UNET = Component("unet", "model.diffusion_model.", tuple(_UNET))
VAE = Component(
    "vae",
    "first_stage_model.",
    tuple(_VAE),
    older=tuple(
        (f"mid_block.attentions.0.{old}.", f"mid_block.attentions.0.{new}.")
        for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))
    ),
    ones=frozenset(
        f"{side}.mid.attn_1.{part}" for side in ("encoder", "decoder") for part in ("q", "k", "v", "proj_out")
    ),
)
TEXT_ENCODER = Component("text_encoder", "cond_stage_model.transformer.", optional="text_model.")

COMPONENTS = (UNET, VAE, TEXT_ENCODER)
