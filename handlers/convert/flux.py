"""The table of Flux, in the layout that ComfyUI and Forge read whole: transformer, VAE, CLIP and T5 in one file.

The published files hold the transformer alone, without a prefix; they are read too.
"""

from __future__ import annotations

from handlers.convert.blocks import clip, vae
from handlers.convert.keymap import Component, Rule, pairs

_BLOCK, _DOUBLE = "double_blocks.#", "transformer_blocks.#"
_SINGLE, _ALONE = "single_blocks.#", "single_transformer_blocks.#"
_STREAMS = (
    ("img", "norm1", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "to_out.0", "ff"),
    (
        "txt",
        "norm1_context",
        ("add_q_proj", "add_k_proj", "add_v_proj"),
        ("norm_added_q", "norm_added_k"),
        "to_add_out",
        "ff_context",
    ),
)
_ENDS = [
    ("img_in", "x_embedder"),
    ("txt_in", "context_embedder"),
    ("final_layer.linear", "proj_out"),
    *(
        (f"{single}.{a}", f"time_text_embed.{diffusers}.{b}")
        for single, diffusers in (
            ("time_in", "timestep_embedder"),
            ("vector_in", "text_embedder"),
            ("guidance_in", "guidance_embedder"),
        )
        for a, b in (("in_layer", "linear_1"), ("out_layer", "linear_2"))
    ),
]


def _double() -> list[Rule]:
    rules = []
    for stream, norm, attention, norms, out, feed in _STREAMS:
        rules.append(Rule(f"{_BLOCK}.{stream}_attn.qkv", tuple(f"{_DOUBLE}.attn.{part}" for part in attention)))
        rules += pairs(
            [
                (f"{_BLOCK}.{stream}_mod.lin", f"{_DOUBLE}.{norm}.linear"),
                (f"{_BLOCK}.{stream}_attn.norm.query_norm.scale", f"{_DOUBLE}.attn.{norms[0]}.weight"),
                (f"{_BLOCK}.{stream}_attn.norm.key_norm.scale", f"{_DOUBLE}.attn.{norms[1]}.weight"),
                (f"{_BLOCK}.{stream}_attn.proj", f"{_DOUBLE}.attn.{out}"),
                (f"{_BLOCK}.{stream}_mlp.0", f"{_DOUBLE}.{feed}.net.0.proj"),
                (f"{_BLOCK}.{stream}_mlp.2", f"{_DOUBLE}.{feed}.net.2"),
            ]
        )
    return rules


_TRANSFORMER = (
    *pairs(_ENDS),
    *_double(),
    # The feed-forward part is four times as wide as the attention.
    Rule(
        f"{_SINGLE}.linear1",
        (*(f"{_ALONE}.attn.to_{part}" for part in "qkv"), f"{_ALONE}.proj_mlp"),
        shares=(1, 1, 1, 4),
    ),
    *pairs(
        [
            (f"{_SINGLE}.modulation.lin", f"{_ALONE}.norm.linear"),
            (f"{_SINGLE}.linear2", f"{_ALONE}.proj_out"),
            (f"{_SINGLE}.norm.query_norm.scale", f"{_ALONE}.attn.norm_q.weight"),
            (f"{_SINGLE}.norm.key_norm.scale", f"{_ALONE}.attn.norm_k.weight"),
        ]
    ),
    # Scale and shift stand in the other order.
    Rule("final_layer.adaLN_modulation.1", ("norm_out.linear",), form="halves"),
)

COMPONENTS = (
    vae("vae.", "first_stage_model."),
    clip("text_encoder", "text_encoders.clip_l.transformer."),
    Component(
        "text_encoder_2",
        "text_encoders.t5xxl.transformer.",
        tied=(("encoder.embed_tokens.weight", "shared.weight"),),
    ),
    Component("transformer", "model.diffusion_model.", _TRANSFORMER, aliases=("",)),
)
