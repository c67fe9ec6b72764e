"""What kind and family of model a set of tensor names and shapes is.

The marks are those of checkpoints.md's layouts: SD 1 keeps Hugging Face's CLIP under ``cond_stage_model.transformer``,
SD 2 OpenCLIP under ``cond_stage_model.model``, SDXL both under ``conditioner.embedders``, Flux has double blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

UNET = "model.diffusion_model."
# The width of a textual inversion's vectors is that of its text encoder's words: CLIP L, OpenCLIP H, OpenCLIP bigG.
WORD_WIDTHS = {768: "sd1", 1024: "sd2", 1280: "sdxl"}
_MOST_VECTORS = 256
CONTEXT_WIDTHS = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
_INPUT_CHANNELS = {9: "inpainting", 8: "instruct-pix2pix", 5: "depth"}
Shapes = Mapping[str, tuple[int, ...] | None]


@dataclass(frozen=True)
class Probe:
    """Kind, family, variant and layout as in ``inspect.Inspection``; what is missing from a checkpoint, in words."""

    kind: str | None = None
    family: str | None = None
    variant: str | None = None
    missing: tuple[str, ...] = ()
    layout: str | None = None


def probe(shapes: Shapes) -> Probe:
    """Tell what a file of these tensors is; a shape is None where only the name is known."""
    names = Names(shapes)
    for look in (
        *(_captioner, _lora, _controlnet, _adapter, _checkpoint, _component, _vae, _embedding, _text_encoder),
    ):
        found = look(shapes, names)
        if found:
            return found
    return Probe()


class Names:
    """Questions about a set of names. As one text they are answered many times faster than name by name."""

    def __init__(self, names: Iterable[str]) -> None:
        self._text = "\n" + "\n".join(names)

    def starting(self, *prefixes: str) -> bool:
        """Whether any name starts with any of the prefixes."""
        return any(f"\n{prefix}" in self._text for prefix in prefixes)

    def having(self, *parts: str) -> bool:
        """Whether any name contains any of the parts."""
        return any(part in self._text for part in parts)


def _captioner(_shapes: Shapes, names: Names) -> Probe | None:
    if names.starting("image_to_text_projection.") and names.starting("text_model.model."):
        return Probe("captioner", "kosmos2")
    return None


def _lora(shapes: Shapes, names: Names) -> Probe | None:
    if not names.having(".lora_down.", ".lora_A.", ".lora.down.", "_lora.down.", ".hada_w1_a", ".lokr_w1"):
        return None
    variant = next((variant for variant, parts in _LORA_VARIANTS.items() if names.having(*parts)), None)
    if names.having(".lora_A."):
        layout = "peft"
    else:
        layout = "diffusers" if names.having(".lora.down.", "_lora.down.") else "kohya"
    family: str | None
    if names.having("double_blocks", "single_transformer_blocks"):
        family = "flux"
    elif names.starting("lora_te2_", "text_encoder_2."):
        family = "sdxl"
    else:
        family = _family_by_context(shapes, _DOWN_ENDINGS) or _family_by_words(shapes)
    return Probe("lora", family, variant, layout=layout)


_LORA_VARIANTS = {
    "dora": (".dora_scale", ".lora_magnitude_vector"),
    "loha": (".hada_w1_a",),
    "lokr": (".lokr_w1",),
}
_DOWN_ENDINGS = ("lora_down.weight", "lora_A.weight", "lora.down.weight")


def _family_by_words(shapes: Shapes) -> str | None:
    """The family of a LoRA without cross attention, by the width of its text encoder."""
    for name, shape in shapes.items():
        if name.startswith(("lora_te", "text_encoder")) and name.endswith(_DOWN_ENDINGS) and "q_proj" in name and shape:
            return {768: "sd1", 1024: "sd2"}.get(shape[-1])
    return None


def _controlnet(shapes: Shapes, names: Names) -> Probe | None:
    if "lora_controlnet" in shapes:
        return Probe("controlnet", _family_by_context(shapes, ("to_k.down", "to_k.weight")), "control-lora")
    if not names.having(
        "input_hint_block.", "controlnet_cond_embedding.", "controlnet_x_embedder.", "controlnet_blocks."
    ):
        return None
    flux = names.having("controlnet_x_embedder.", "single_transformer_blocks", "double_blocks")
    return Probe("controlnet", "flux" if flux else _family_by_context(shapes, ("to_k.weight",)))


def _adapter(_shapes: Shapes, names: Names) -> Probe | None:
    if names.starting("adapter.body.", "body.0.") or names.starting("ip_adapter."):
        return Probe("adapter")
    return None


def _checkpoint(shapes: Shapes, names: Names) -> Probe | None:
    if names.having("double_blocks.0.img_attn.qkv.weight"):
        variant = "fill" if _second_size(shapes, "img_in.weight") == 384 else "base"
        return Probe("checkpoint", "flux", variant)
    if not names.starting(UNET, "unet."):
        return None
    missing = []
    if names.starting("conditioner.embedders.1.model.", "conditioner.embedders.1.transformer."):
        family, variant = "sdxl", "base"
    elif names.starting("conditioner.embedders.0.model."):
        family, variant = "sdxl", "refiner"
    elif names.starting("cond_stage_model.model."):
        family, variant = "sd2", "base"
    elif names.starting("cond_stage_model."):
        family, variant = "sd1", "base"
    else:
        family, variant = _family_by_context(shapes, ("to_k.weight",)) or "", "base"
        missing.append("text encoder")
    if not names.starting("first_stage_model.", "vae."):
        missing.append("VAE")
    channels = _second_size(shapes, f"{UNET}input_blocks.0.0.weight")
    return Probe("checkpoint", family or None, _INPUT_CHANNELS.get(channels or 4, variant), tuple(missing))


def _component(shapes: Shapes, names: Names) -> Probe | None:
    """The part of a Diffusers folder that draws, alone."""
    missing = ("text encoder", "VAE")
    if names.starting("transformer_blocks.0.attn.to_q.") and names.starting("x_embedder."):
        return Probe("diffusers", "flux", "base", missing, "diffusers")
    if not names.starting("down_blocks.0.") or not names.starting("conv_in.") or not names.having(".attn2.to_k."):
        return None
    variant = _INPUT_CHANNELS.get(_second_size(shapes, "conv_in.weight") or 4, "base")
    return Probe("diffusers", _family_by_context(shapes, ("to_k.weight",)), variant, missing, "diffusers")


def _vae(shapes: Shapes, names: Names) -> Probe | None:
    if not names.starting("first_stage_model.", "encoder.conv_in.", "decoder.conv_in."):
        return None
    channels = next((_second_size(shapes, name) for name in shapes if name.endswith("decoder.conv_in.weight")), None)
    # SD 1, SD 2 and SDXL share one shape.
    layout = "diffusers" if names.having("decoder.up_blocks.") else None
    return Probe("vae", "flux" if channels == 16 else None, layout=layout)


def _embedding(shapes: Shapes, names: Names) -> Probe | None:
    if names.starting("clip_g") and names.starting("clip_l"):
        return Probe("embedding", "sdxl")
    if names.starting("emb_params", "string_to_param"):
        return Probe("embedding", WORD_WIDTHS.get(_second_size(shapes, "emb_params") or 0))
    if len(shapes) == 1:  # Diffusers' form: the token is the name
        ((name, shape),) = shapes.items()
        if shape and shape[-1] in WORD_WIDTHS and ".weight" not in name and prod(shape[:-1]) <= _MOST_VECTORS:
            return Probe("embedding", WORD_WIDTHS[shape[-1]], layout="diffusers")
    return None


def _text_encoder(shapes: Shapes, names: Names) -> Probe | None:
    if names.starting("text_model.encoder.layers.", "encoder.layers.", "encoder.block.", "transformer.resblocks."):
        return Probe("text-encoder", _family_of_text(shapes, names))
    return None


def _family_of_text(shapes: Shapes, names: Names) -> str | None:
    """CLIP L (768) serves SD 1, SDXL and Flux: its family cannot be told."""
    if names.starting("encoder.block."):
        return "flux"
    endings = ("token_embedding.weight",)
    width = next((shape[-1] for name, shape in shapes.items() if name.endswith(endings) and shape), 0)
    return {1024: "sd2", 1280: "sdxl"}.get(width)


def _family_by_context(shapes: Shapes, endings: tuple[str, ...]) -> str | None:
    """The family by the width of the text that the cross attention reads (its keys' input)."""
    for name, shape in shapes.items():
        if "attn2" in name and "to_k" in name and name.endswith(endings) and shape and len(shape) >= 2:
            return CONTEXT_WIDTHS.get(shape[1])
    return None


def _second_size(shapes: Shapes, name: str) -> int | None:
    shape = next((shape for key, shape in shapes.items() if key.endswith(name)), None)
    return shape[1] if shape and len(shape) >= 2 else None
