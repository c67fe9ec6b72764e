"""The keys of ``train.yaml`` as values: every key, its type and what it may be, each for itself.

``auto`` stays ``auto`` here: the table that resolves it needs the base and the pictures (``handlers.train.auto``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Auto = Literal["auto"]
PER_IMAGE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*/\s*(?:image|picture)\s*$")
_EVERY = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(s|sec|min|m|h)\s*$")
_SECONDS = {"s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def _steps(value: object) -> object:
    """``150/image`` keeps its meaning and loses its spaces; everything else is for the type to judge."""
    if isinstance(value, str) and (match := PER_IMAGE.match(value)):
        return f"{match[1]}/image"
    return value


def _every(value: object) -> object:
    if isinstance(value, str) and (match := _EVERY.match(value)):
        return f"{match[1]}{match[2]}"
    return value


def _one_or_many(value: object) -> object:
    return [value] if isinstance(value, str) and value != "auto" else value


Count = Annotated[int, Field(ge=0, le=1_000_000)]
PerImage = Annotated[str, Field(pattern=r"^\d+(\.\d+)?/image$")]
Steps = Annotated[Auto | Count | PerImage, BeforeValidator(_steps)]
Rate = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
Duration = Annotated[str, Field(pattern=r"^\d+(\.\d+)?(s|sec|m|min|h)$")]
Every = Annotated[Annotated[int, Field(ge=1)] | Duration, BeforeValidator(_every)]
Prompts = Annotated[
    Auto | Annotated[list[Annotated[str, Field(max_length=1000)]], Field(max_length=16)],
    BeforeValidator(_one_or_many),
]
Token = Annotated[str, Field(min_length=1, max_length=200)]


class Section(BaseModel):
    """Keys that stand together, and no others."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)


class TextEncoderSpec(Section):
    """``text_encoder:`` stage 1."""

    steps: Steps = Field("auto", description='auto, a number of steps, 0 for none, or a rate like "35/image"')
    learning_rate: Auto | Rate = Field("auto", description="auto or a number like 1e-6")
    unet: Literal["trained", "frozen"] = Field("trained", description="trained or frozen: the UNet during stage 1")


class UNetSpec(Section):
    """``unet:`` stage 2."""

    steps: Steps = Field("auto", description='auto, a number of steps, 0 for none, or a rate like "150/image"')
    learning_rate: Auto | Rate = Field("auto", description="auto or a number like 2e-6")


class LoraSpec(Section):
    """``lora:`` the size of a LoRA."""

    rank: int = Field(16, ge=1, le=1024, description="a whole number from 1 to 1024")
    alpha: float = Field(16, gt=0, allow_inf_nan=False, description="a number above 0")
    convolutions: Auto | bool = Field(
        "auto", description="auto, true or false: whether the UNet's convolutions learn, too"
    )


class PriorSpec(Section):
    """``prior:`` prior preservation with class pictures."""

    images: int = Field(0, ge=0, le=100_000, description="a number of class pictures, 0 for none")
    weight: float = Field(1.0, ge=0, allow_inf_nan=False, description="a number, 0 or more")
    caption_dropout: Auto | Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = Field(
        "auto", description="auto, or a number from 0 to 1: how often a class picture has no words"
    )
    target: Auto | Literal["picture", "base"] = Field(
        "auto", description="auto, picture or base: what the model shall still draw"
    )


class TrainSpec(Section):
    """A validated ``train.yaml``. Keys are the file's; ``continue`` is ``continue_`` here.

    The ``description`` of each field says what may stand there: it is the advice when something else does.
    """

    base: str = Field(
        "auto",
        min_length=1,
        max_length=255,
        description="auto, miniature, sd15, sd21, sd21-768, sdxl, flux-dev, flux-schnell, or a name under Models/",
    )
    method: Auto | Literal["dreambooth", "finetune", "lora", "dora"] = Field(
        "auto", description="auto, dreambooth, finetune, lora or dora"
    )
    instance: Token = Field("auto", description="auto, filename, or the word that shall mean your subject")
    class_: Token = Field("auto", alias="class", description="auto, or the noun for what it is, like person or dog")
    concept: Auto | Literal["object", "face", "style"] = Field("auto", description="auto, object, face or style")
    resolution: Auto | Annotated[int, Field(ge=64, le=2048, multiple_of=8)] = Field(
        "auto", description="auto or a number of pixels that 8 divides, like 512"
    )
    buckets: bool = Field(default=False, description="true or false")
    crop: Literal["smart", "centre", "off"] = Field("smart", description="smart, centre or off")
    captions: Auto | bool = Field("auto", description="auto, true or false")
    caption_dropout: float = Field(
        0.0, ge=0, lt=1, allow_inf_nan=False, description="a number from 0 to below 1: how often a picture has no words"
    )
    caption_shuffle: bool = Field(
        default=False, description="true or false: whether the parts between a caption's commas change places"
    )
    text_encoder: TextEncoderSpec = Field(
        default_factory=TextEncoderSpec, description="{steps: auto, learning_rate: auto}"
    )
    unet: UNetSpec = Field(default_factory=UNetSpec, description="{steps: auto, learning_rate: auto}")
    lora: LoraSpec = Field(default_factory=LoraSpec, description="{rank: 16, alpha: 16}")
    prior: PriorSpec = Field(
        default_factory=PriorSpec, description="{images: 0, weight: 1.0, caption_dropout: auto, target: auto}"
    )
    optimizer: Auto | Literal["adamw", "adamw8bit", "adafactor", "prodigy"] = Field(
        "auto", description="auto, adamw, adamw8bit, adafactor or prodigy"
    )
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="linear, cosine or constant")
    batch_size: Auto | Annotated[int, Field(ge=1, le=256)] = Field(
        "auto", description="auto or a whole number from 1 to 256"
    )
    precision: Auto | Literal["fp32", "fp16", "bf16"] = Field("auto", description="auto, fp32, fp16 or bf16")
    memory: Auto | Literal["8GB", "12GB", "16GB", "24GB", "48GB"] = Field(
        "auto", description="auto, 8GB, 12GB, 16GB, 24GB or 48GB"
    )
    seed: int = Field(7, ge=0, lt=2**32, description="a whole number from 0 to 4294967295")
    offset_noise: Auto | Annotated[float, Field(ge=0, le=1)] = Field("auto", description="auto or a number from 0 to 1")
    min_snr: Annotated[float, Field(gt=0, le=100)] | None = Field(None, description="null or a number like 5")
    ema: bool = Field(default=False, description="true or false")
    compile: bool = Field(
        default=False, description="true or false: minutes to compile at the start, and faster steps after them"
    )
    vae: Token = Field("auto", description="auto, a name of `fastsd models list`, or a name under Models/")
    checkpoint_every: Every = Field("10min", description="a time like 10min, or a number of steps")
    sample_every: Auto | Count = Field("auto", description="auto, a number of steps, or 0 for none")
    validation: Auto | Count = Field("auto", description="auto, a number of pictures to hold out, or 0 for none")
    save_every: Count = Field(0, description="a number of unet steps, or 0 for none")
    save_from: Count = Field(0, description="the unet step of the first intermediate model; 0: save_every")
    prompts: Prompts = Field("auto", description="auto or a list of prompts, each in quotes")
    continue_: Annotated[str, Field(max_length=255)] | None = Field(
        None, alias="continue", description="null, last, or the name of a run or of a model in this folder"
    )
    publish: bool = Field(default=True, description="true or false")
    name: Annotated[str, Field(min_length=1, max_length=120, pattern=r"^[^/\\\x00-\x1f]+$")] | None = Field(
        None, description="null or a name for the model, without slashes"
    )
    start: Auto | Literal["now"] = Field("auto", description="auto or now")

    def to_json(self) -> dict[str, Any]:
        """The spec as JSON values under the file's own keys, for payloads and ``run.json``."""
        return self.model_dump(mode="json", by_alias=True)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The inverse of ``to_json``."""
        return cls.model_validate(dict(value))


def steps_of(value: int | str, pictures: int) -> int | None:
    """A number of steps from ``steps:``, None for ``auto``; "150/image" counts the pictures."""
    if isinstance(value, int):
        return value
    match = PER_IMAGE.match(value)
    return round(float(match[1]) * pictures) if match else None


def seconds_of(value: int | str) -> float | None:
    """Seconds from ``checkpoint_every: 10min``; None where it is a number of steps."""
    match = _EVERY.match(value) if isinstance(value, str) else None
    return float(match[1]) * _SECONDS[match[2]] if match else None
