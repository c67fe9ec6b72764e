"""The names of LoRA modules: kohya's flat ones and the dotted ones of diffusers and peft, read in both directions.

kohya writes a module's path with ``_`` for every dot, and paths have ``_`` of their own. ``WORDS`` is the table: every
word of a path that has one, and every other word that occurs. A flat name is divided into the longest words that leave
words behind them, which gives the path of every module of these models back.

Of Flux, kohya and ComfyUI name the layers of its authors' code, some of which are several of diffusers' layers, one
behind the other: what is said of such a layer is said of each in its share of the rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

from handlers.convert.families import FAMILIES

_WORDS = """
diffusers' UNet
    down_blocks mid_block up_blocks resnets attentions downsamplers upsamplers transformer_blocks attn1 attn2
    to_q to_k to_v to_out proj_in proj_out ff net proj conv conv1 conv2 conv_in conv_out conv_shortcut
    time_emb_proj time_embedding add_embedding linear_1 linear_2
the original UNet, which kohya trains for SDXL
    input_blocks middle_block output_blocks in_layers out_layers emb_layers skip_connection op out
    time_embed label_emb
the original Flux
    double_blocks single_blocks img_attn txt_attn qkv img_mlp txt_mlp img_mod txt_mod lin linear linear1 linear2
    modulation img_in txt_in time_in vector_in guidance_in in_layer out_layer final_layer
transformers' CLIP
    text_model encoder layers self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2 text_projection
"""
WORDS = frozenset(word for line in _WORDS.splitlines() if line.startswith(" ") for word in line.split())
_ORIGINAL = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.")
# How the beginnings of names mean components; the first is what is written.
_KOHYA: Mapping[str, Mapping[str, str]] = {
    "sd1": {"unet": "lora_unet_", "text_encoder": "lora_te_"},
    "sd2": {"unet": "lora_unet_", "text_encoder": "lora_te_"},
    "sdxl": {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
}
_TEXT = "text_model."
# What paths within Flux's transformer begin with, and within no UNet.
_FLUX = ("transformer_blocks.", "single_transformer_blocks.")
_ORIGINAL_FLUX = (
    *("double_blocks.", "single_blocks.", "final_layer."),
    *("img_in", "txt_in", "time_in.", "vector_in.", "guidance_in."),
)
_COMFY = "diffusion_model."
# Written in dotted names: kohya's speak of layers that hold q, k and v together, of which an adapter may have one.
DOTTED = "flux"
FLAT_FAMILIES = tuple(_KOHYA)
LORA_FAMILIES = (*FLAT_FAMILIES, DOTTED)


@dataclass(frozen=True)
class Module:
    """A module of a pipeline.

    Attributes:
        part: ``unet``, ``transformer``, ``text_encoder`` or ``text_encoder_2``.
        path: its dotted name there, as diffusers and transformers have it, without ``text_model.``.
    """

    part: str
    path: str


@dataclass(frozen=True)
class Share:
    """What a name in a file means, or a part of it.

    Attributes:
        module: a module.
        begin, end: which of ``of`` equal shares of the layer's rows are the module's.
        of: 1 where the layer is the module.
    """

    module: Module
    begin: int = 0
    end: int = 1
    of: int = 1


def flat(path: str) -> str:
    """A path with ``_`` for its dots."""
    return path.replace(".", "_")


def dotted(name: str) -> str | None:
    """The path that ``flat`` made this name of; None where it cannot be divided into words of the table."""
    pieces = name.split("_")
    # From the end: place → the words from there on, of which the first is the longest that leaves words behind it.
    divided: dict[int, list[str]] = {len(pieces): []}
    for place in range(len(pieces) - 1, -1, -1):
        for end in range(len(pieces), place, -1):
            word = "_".join(pieces[place:end])
            if end in divided and (word in WORDS or word.isdecimal()):
                divided[place] = [word, *divided[end]]
                break
    return ".".join(divided[0]) if 0 in divided else None


def from_kohya(name: str) -> tuple[Share, ...]:
    """What a kohya name (``lora_unet_…``, without ``.lora_down.weight``) means; nothing where it is unknown."""
    beginnings = {begin: part for table in _KOHYA.values() for part, begin in table.items()}
    for begin, part in beginnings.items():
        if name.startswith(begin):
            path = dotted(name.removeprefix(begin))
            return () if path is None else _meant(part, path)
    return ()


def to_kohya(module: Module, family: str) -> str | None:
    """The name of a module that WebUIs read: kohya's flat one; None where the family has no such component.

    Args:
        module: the module.
        family: one of ``LORA_FAMILIES``; SDXL's UNet is named as the original code names it, as kohya does; Flux has
            diffusers' dotted names.
    """
    if family == DOTTED:
        return to_diffusers(module) if module.part in ("transformer", "text_encoder") else None
    begin = _KOHYA[family].get(module.part)
    if begin is None:
        return None
    if module.part != "unet":
        path = module.path if module.path == "text_projection" else _TEXT + module.path
        return begin + flat(path)
    if family != "sdxl":
        return begin + flat(module.path)
    unet = FAMILIES["sdxl"].drawing
    match = unet.match_diffusers(module.path)
    return None if match is None else begin + flat(match.single.removeprefix(unet.prefix))


def from_diffusers(key: str) -> tuple[Share, ...]:
    """What a dotted path means that begins with its component, or is of one component alone (peft, ComfyUI)."""
    part, _, path = key.partition(".")
    if part in ("unet", "transformer", "text_encoder", "text_encoder_2"):
        return _meant(part, path)
    path = key.removeprefix("base_model.model.").removeprefix(_COMFY)
    is_text = path.startswith(("text_model.", "encoder.layers.", "text_projection"))
    if is_text:
        return _meant("text_encoder", path)
    return _meant("transformer" if path.startswith(_FLUX) else "unet", path)


def to_diffusers(module: Module) -> str:
    """The dotted path that begins with its component, as diffusers saves it."""
    text = _TEXT if module.part.startswith("text_encoder") and module.path != "text_projection" else ""
    return f"{module.part}.{text}{module.path}"


def _meant(part: str, path: str) -> tuple[Share, ...]:
    if part.startswith("text_encoder"):
        return (Share(Module(part, path.removeprefix(_TEXT))),)
    if path.startswith(_ORIGINAL_FLUX):
        return _divided(path)
    if part != "unet" or not path.startswith(_ORIGINAL):
        return (Share(Module(part, path)),)
    unet = FAMILIES["sdxl"].drawing
    match = unet.match_single(unet.prefix + path)
    return () if match is None else (Share(Module(part, match.parts[0])),)


def _divided(path: str) -> tuple[Share, ...]:
    """Diffusers' layers in a layer of the original Flux."""
    transformer = FAMILIES["flux"].drawing
    match = transformer.match_single(transformer.prefix + path)
    if match is None or match.rule.form != "same":
        return ()
    ends = list(accumulate(match.rule.weights))
    return tuple(
        Share(Module(transformer.name, part), end - weight, end, ends[-1])
        for part, weight, end in zip(match.parts, match.rule.weights, ends, strict=True)
    )
