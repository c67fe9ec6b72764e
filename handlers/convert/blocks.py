"""What the families' tables are made of: LDM's UNet and VAE, and OpenCLIP's text encoder.

Sources: the module trees of the original LDM code and of OpenCLIP against those of Diffusers and transformers.
"""

from __future__ import annotations

from collections.abc import Sequence

from handlers.convert.keymap import Component, Rule, pairs, with_leaves

_RESNET = [
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
]


def unet(attention: Sequence[bool], added: bool = False) -> Component:
    """LDM's UNet with two residual blocks a level going down and three going up.

    Args:
        attention: for each resolution level, whether it has transformers. The widths and depths do not matter.
        added: whether sizes and a pooled embedding join the time step (SDXL).
    """
    levels = len(attention)
    resnets = [("middle_block.0", "mid_block.resnets.0"), ("middle_block.2", "mid_block.resnets.1")]
    attentions = [("middle_block.1", "mid_block.attentions.0")]
    samplers = []
    for i, has in enumerate(attention):
        for j in range(2):
            resnets.append((f"input_blocks.{3 * i + j + 1}.0", f"down_blocks.{i}.resnets.{j}"))
            if has:
                attentions.append((f"input_blocks.{3 * i + j + 1}.1", f"down_blocks.{i}.attentions.{j}"))
        if i < levels - 1:
            samplers.append((f"input_blocks.{3 * (i + 1)}.0.op", f"down_blocks.{i}.downsamplers.0.conv"))
    for i, has in enumerate(reversed(attention)):
        for j in range(3):
            resnets.append((f"output_blocks.{3 * i + j}.0", f"up_blocks.{i}.resnets.{j}"))
            if has:
                attentions.append((f"output_blocks.{3 * i + j}.1", f"up_blocks.{i}.attentions.{j}"))
        if i < levels - 1:
            # The upsampler follows the transformer in its block, where there is one.
            place = 2 if has else 1
            samplers.append((f"output_blocks.{3 * i + 2}.{place}.conv", f"up_blocks.{i}.upsamplers.0.conv"))
    rules = [
        ("time_embed.0", "time_embedding.linear_1"),
        ("time_embed.2", "time_embedding.linear_2"),
        ("input_blocks.0.0", "conv_in"),
        ("out.0", "conv_norm_out"),
        ("out.2", "conv_out"),
        *with_leaves(resnets, _RESNET),
        *attentions,
        *samplers,
    ]
    if added:
        rules += [("label_emb.0.0", "add_embedding.linear_1"), ("label_emb.0.2", "add_embedding.linear_2")]
    return Component("unet", "model.diffusion_model.", tuple(pairs(rules)))


_SIDES = ("encoder", "decoder")
_LEVELS = 4
_VAE_RESNETS = [
    *(
        (f"encoder.down.{i}.block.{j}", f"encoder.down_blocks.{i}.resnets.{j}")
        for i in range(_LEVELS)
        for j in range(2)
    ),
    # The decoder counts its levels from the other end in the two layouts.
    *(
        (f"decoder.up.{_LEVELS - 1 - i}.block.{j}", f"decoder.up_blocks.{i}.resnets.{j}")
        for i in range(_LEVELS)
        for j in range(3)
    ),
    *((f"{side}.mid.block_{j + 1}", f"{side}.mid_block.resnets.{j}") for side in _SIDES for j in range(2)),
]
_VAE_SAMPLERS = [
    *(
        (f"encoder.down.{i}.downsample.conv", f"encoder.down_blocks.{i}.downsamplers.0.conv")
        for i in range(_LEVELS - 1)
    ),
    *(
        (f"decoder.up.{_LEVELS - 1 - i}.upsample.conv", f"decoder.up_blocks.{i}.upsamplers.0.conv")
        for i in range(_LEVELS - 1)
    ),
]
_VAE_ATTENTIONS = [(f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0") for side in _SIDES]
_VAE = [
    *pairs((name, name) for name in ("quant_conv", "post_quant_conv")),
    *pairs(
        (f"{side}.{single}", f"{side}.{diffusers}")
        for side in _SIDES
        for single, diffusers in (("conv_in", "conv_in"), ("norm_out", "conv_norm_out"), ("conv_out", "conv_out"))
    ),
    *pairs(
        with_leaves(
            _VAE_RESNETS,
            [(name, name) for name in ("norm1", "conv1", "norm2", "conv2")] + [("nin_shortcut", "conv_shortcut")],
        )
    ),
    *pairs(with_leaves(_VAE_ATTENTIONS, [("norm", "group_norm")])),
    *pairs(
        with_leaves(_VAE_ATTENTIONS, [("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")]),
        form="ones",
    ),
    *pairs(_VAE_SAMPLERS),
]
_VAE_OLDER = tuple(
    (f"mid_block.attentions.0.{old}.", f"mid_block.attentions.0.{new}.")
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))
)


def vae(prefix: str, alias: str) -> Component:
    """LDM's autoencoder of four levels; a VAE without quant_conv (Flux) has simply none.

    Args:
        prefix: what its keys start with.
        alias: the prefix that other programs write.
    """
    return Component("vae", prefix, tuple(_VAE), (alias,), older=_VAE_OLDER, dropped=("loss.",))


def clip(name: str, prefix: str) -> Component:
    """CLIP's text encoder as transformers has it: the names are the same. Old files go without ``text_model.``."""
    return Component(name, prefix + "text_model.", aliases=(prefix,), optional="text_model.")


_LAYER = "transformer.resblocks.#"
_SELF = "encoder.layers.#.self_attn"
_OPEN_CLIP = (
    Rule("positional_embedding", ("embeddings.position_embedding.weight",)),
    Rule("text_projection", ("text_projection.weight",), form="transposed"),
    Rule(f"{_LAYER}.attn.in_proj_weight", tuple(f"{_SELF}.{part}_proj.weight" for part in "qkv")),
    Rule(f"{_LAYER}.attn.in_proj_bias", tuple(f"{_SELF}.{part}_proj.bias" for part in "qkv")),
    *pairs(
        [
            ("token_embedding", "embeddings.token_embedding"),
            ("ln_final", "final_layer_norm"),
            (f"{_LAYER}.attn.out_proj", f"{_SELF}.out_proj"),
            (f"{_LAYER}.ln_1", "encoder.layers.#.layer_norm1"),
            (f"{_LAYER}.ln_2", "encoder.layers.#.layer_norm2"),
            (f"{_LAYER}.mlp.c_fc", "encoder.layers.#.mlp.fc1"),
            (f"{_LAYER}.mlp.c_proj", "encoder.layers.#.mlp.fc2"),
        ]
    ),
)


def open_clip(name: str, prefix: str, dropped: tuple[str, ...] = ()) -> Component:
    """OpenCLIP's text encoder against transformers' CLIP.

    Args:
        name: the component's folder.
        prefix: what its keys start with.
        dropped: what the Diffusers component has not, besides the scale of the training loss.
    """
    return Component(
        name,
        prefix,
        _OPEN_CLIP,
        optional="text_model.",
        bare=("text_projection.weight",),
        ignored=("position_ids", "attn_mask"),
        dropped=("logit_scale", *dropped),
    )
