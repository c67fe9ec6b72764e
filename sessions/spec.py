"""``train.yaml`` as values: every key, its type, what it may be, and which combinations make no sense.

``parse_spec`` turns the text of the file into a ``TrainSpec`` or a ``Refusal`` with the line, the reason and the fix.
``auto`` stays ``auto`` here: the table that resolves it needs the base and the pictures (``handlers.train.auto``).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from sessions.layout import SPEC_NAMES
from sessions.refusal import Refusal
from sessions.spec_text import Lines, read_mapping

__all__ = ["SPEC_NAMES", "TrainSpec", "json_schema", "parse_spec"]

Auto = Literal["auto"]
PER_IMAGE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*/\s*(?:image|picture)\s*$")
_EVERY = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(s|sec|min|m|h)\s*$")
_OUTSIDE = re.compile(r"://|\\|^/|^~|^[A-Za-z]:|(^|/)\.\.(/|$)")
_SECONDS = {"s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}

# Base names the registry knows → side lengths (pixels) that its architecture was made for.
RESOLUTIONS: dict[str, tuple[int, int]] = {
    "miniature": (64, 128),
    "miniature-sd2": (64, 128),
    "miniature-sdxl": (64, 128),
    "sd15": (256, 768),
    "sd21": (256, 768),
    "sd21-768": (512, 1024),
    "sdxl": (512, 1536),
    "flux-dev": (256, 1536),
    "flux-schnell": (256, 1536),
}
# GB of GPU memory without which all of a base cannot be trained, by the smallest of the presets.
_LEAST_MEMORY = {"sd21-768": 12, "sdxl": 24}
FLUX = ("flux-dev", "flux-schnell")


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


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)


class TextEncoderSpec(_Section):
    """``text_encoder:`` stage 1."""

    steps: Steps = Field("auto", description='auto, a number of steps, 0 for none, or a rate like "35/image"')
    learning_rate: Auto | Rate = Field("auto", description="auto or a number like 1e-6")
    unet: Literal["trained", "frozen"] = Field("trained", description="trained or frozen: the UNet during stage 1")


class UNetSpec(_Section):
    """``unet:`` stage 2."""

    steps: Steps = Field("auto", description='auto, a number of steps, 0 for none, or a rate like "150/image"')
    learning_rate: Auto | Rate = Field("auto", description="auto or a number like 2e-6")


class LoraSpec(_Section):
    """``lora:`` the size of a LoRA."""

    rank: int = Field(16, ge=1, le=1024, description="a whole number from 1 to 1024")
    alpha: float = Field(16, gt=0, allow_inf_nan=False, description="a number above 0")
    convolutions: Auto | bool = Field(
        "auto", description="auto, true or false: whether the UNet's convolutions learn, too"
    )


class PriorSpec(_Section):
    """``prior:`` prior preservation with class pictures."""

    images: int = Field(0, ge=0, le=100_000, description="a number of class pictures, 0 for none")
    weight: float = Field(1.0, ge=0, allow_inf_nan=False, description="a number, 0 or more")


class TrainSpec(_Section):
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
    prior: PriorSpec = Field(default_factory=PriorSpec, description="{images: 0, weight: 1.0}")
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


def kept_steps(save_every: int, save_from: int, unet_steps: int) -> range:
    """The steps of stage 2 after which an intermediate model is kept; that of the last step is the result.

    As in fast-stable-diffusion: the first at ``save_from``, then every ``save_every``.
    """
    return range(save_from or save_every, unet_steps, save_every) if save_every else range(0)


def parse_spec(text: str) -> TrainSpec:
    """Read the text of a ``train.yaml``. An empty file, or one of comments alone, is the defaults.

    Raises:
        Refusal: code ``spec``: with the line, what is wrong there and what to write instead.
    """
    values, lines = read_mapping(text)
    try:
        spec = TrainSpec.model_validate(values)
    except ValidationError as error:
        raise _refusal(error, lines) from None
    _refuse_combinations(spec, lines)
    return spec


def json_schema() -> dict[str, Any]:
    """The JSON Schema of ``train.yaml``, for editors."""
    schema = TrainSpec.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "fastsd train.yaml"}


def _refusal(error: ValidationError, lines: Lines) -> Refusal:
    """The first complaint in the order of the file, with a count of the others."""
    places: dict[tuple[str, ...], str] = {}
    for problem in error.errors(include_url=False, include_input=False):
        key, unknown = _key_of(problem["loc"], problem["type"])
        places.setdefault(key, "unknown" if unknown else "value")
    ordered = sorted(places, key=lambda key: lines.of(*key) or 0)
    key = ordered[0]
    what, advice = _unknown(key) if places[key] == "unknown" else _bad_value(key, lines)
    if len(ordered) > 1:
        others = ", ".join(str(lines.of(*other)) for other in ordered[1:6])
        advice += f" (Look at line {others} as well.)"
    return Refusal("spec", what, advice, lines.of(*key))


def _key_of(location: tuple[int | str, ...], kind: str) -> tuple[tuple[str, ...], bool]:
    """The key of the file that an error is about: pydantic's location also names members of unions and list items."""
    first = str(location[0]) if location else ""
    section = _sections().get(first)
    depth = 1
    if section is not None and len(location) > 1 and (location[1] in section.model_fields or kind == "extra_forbidden"):
        depth = 2
    return tuple(str(part) for part in location[:depth]), kind == "extra_forbidden"


def _sections() -> dict[str, type[_Section]]:
    return {"text_encoder": TextEncoderSpec, "unet": UNetSpec, "lora": LoraSpec, "prior": PriorSpec}


def _names(model: type[_Section]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


# Words that other trainers use, and where the same thing stands here.
_ELSEWHERE = {
    "steps": "unet: {steps: 1500}",
    "max_train_steps": "unet: {steps: 1500}",
    "epochs": 'unet: {steps: "150/image"}',
    "learning_rate": "unet: {learning_rate: 2e-6}",
    "lr": "unet: {learning_rate: 2e-6}",
    "token": "instance",
    "trigger": "instance",
    "instance_prompt": "instance",
    "subject": "class",
    "model": "base",
    "checkpoint": "base",
    "size": "resolution",
    "rank": "lora: {rank: 16}",
    "resume": "continue",
}


def _unknown(key: tuple[str, ...]) -> tuple[str, str]:
    *parents, word = key
    model = _sections()[parents[0]] if parents else TrainSpec
    known = _names(model)
    within = f" in {parents[0]}" if parents else ""
    what = f"There is no key '{word}'{within}."
    close = difflib.get_close_matches(word.casefold().replace("-", "_"), known, n=1, cutoff=0.6)
    if close:
        return what, f"Did you mean '{close[0]}'?"
    if not parents and word.casefold() in _ELSEWHERE:
        return what, f"Write '{_ELSEWHERE[word.casefold()]}' instead."
    return what, f"The keys are: {', '.join(known)}."


def _bad_value(key: tuple[str, ...], lines: Lines) -> tuple[str, str]:
    model: type[_Section] = _sections()[key[0]] if len(key) == 2 else TrainSpec
    fields = {field.alias or name: field for name, field in model.model_fields.items()}
    field = fields.get(key[-1])
    written = lines.text(*key)
    shown = written if len(written) <= 60 else written[:57] + "…"
    return f"'{'.'.join(key)}: {shown}' cannot be.", f"Write {field.description if field else 'something else'}."


def _refuse_combinations(spec: TrainSpec, lines: Lines) -> None:
    for key, name in (("base", spec.base), ("vae", spec.vae)):
        if _OUTSIDE.search(name):
            raise Refusal(
                "spec",
                f"{key}: {name} points outside of the tree.",
                "Put the file or folder under Models/ and write its name.",
                lines.of(key),
            )
    smallest, largest = RESOLUTIONS.get(spec.base, (64, 2048))
    if isinstance(spec.resolution, int) and not smallest <= spec.resolution <= largest:
        raise Refusal(
            "spec",
            f"{spec.base} cannot be trained at {spec.resolution} pixels.",
            f"Write a resolution from {smallest} to {largest}, or auto.",
            lines.of("resolution"),
        )
    if spec.method not in ("auto", "dreambooth") and spec.unet.steps == 0:
        raise Refusal(
            "spec",
            f"method: {spec.method} trains the UNet, and unet.steps is 0.",
            "Give it steps, leave them out, or use dreambooth to train the text encoder alone.",
            lines.of("unet", "steps"),
        )
    least = _LEAST_MEMORY.get(spec.base, 0)
    if spec.method in ("dreambooth", "finetune") and spec.memory != "auto" and int(spec.memory[:-2]) < least:
        raise Refusal(
            "spec",
            f"All of {spec.base} cannot be trained in memory: {spec.memory}; it takes a GPU of {least} GB or more.",
            "Use method: lora.",
            lines.of("memory"),
        )
    problem = flux_problem(spec, spec.method, spec.base) if spec.base in FLUX else None
    if problem:
        raise Refusal("spec", problem.what, problem.advice, lines.of(*problem.key))
    if spec.continue_ is not None and spec.base != "auto":
        raise Refusal(
            "spec",
            f"continue: {spec.continue_} starts from a model of this session, and base: {spec.base} from another.",
            "Leave one of them out.",
            lines.of("base"),
        )
    if spec.text_encoder.steps == 0 and spec.unet.steps == 0:
        raise Refusal(
            "spec",
            "With text_encoder.steps and unet.steps both 0 there is nothing to train.",
            "Give one of them steps, or leave them out.",
            lines.of("unet", "steps"),
        )
    _refuse_keeping_nothing(spec, lines)


def _refuse_keeping_nothing(spec: TrainSpec, lines: Lines) -> None:
    if spec.save_from and not spec.save_every:
        raise Refusal(
            "spec",
            f"save_from: {spec.save_from} says from when on intermediate models are kept, and save_every keeps none.",
            "Write a number of steps for save_every, or leave save_from out.",
            lines.of("save_from"),
        )
    if isinstance(spec.unet.steps, int):
        require_kept(spec, spec.unet.steps, lines.of("save_from" if spec.save_from else "save_every"))


def require_kept(spec: TrainSpec, unet_steps: int, line: int | None = None) -> None:
    """Refuse to keep intermediate models of a run that ends before the first of them.

    Args:
        spec: the train.yaml.
        unet_steps: what its run has.
        line: of the key at fault, where it is known.

    Raises:
        Refusal: code ``spec``.
    """
    if spec.save_every and not kept_steps(spec.save_every, spec.save_from, unet_steps):
        first = spec.save_from or spec.save_every
        raise Refusal(
            "spec",
            f"The first intermediate model would be that of step {first}, and the run has {unet_steps} unet steps.",
            f"Write a {'save_from' if spec.save_from else 'save_every'} below {unet_steps}, or leave it out.",
            line,
        )


@dataclass(frozen=True)
class Problem:
    """Something that cannot be: the key at fault, what is wrong, and what to write instead."""

    key: tuple[str, ...]
    what: str
    advice: str


def flux_problem(spec: TrainSpec, method: str, base: str) -> Problem | None:
    """What a train.yaml asks of a Flux base that it does not do; None where nothing.

    Args:
        spec: the file.
        method: as written, or what ``auto`` means.
        base: the base's name.
    """
    if method in ("dreambooth", "finetune"):
        return Problem(
            ("method",),
            f"All of {base} cannot be trained: 12 billion numbers, their gradients and moments fit no single GPU.",
            "Use method: lora, or dora.",
        )
    if spec.text_encoder.steps not in ("auto", 0):
        return Problem(
            ("text_encoder", "steps"),
            f"The text encoders of {base} are not trained.",
            "Leave text_encoder out, or write steps: 0.",
        )
    if spec.lora.convolutions is True:
        return Problem(
            ("lora", "convolutions"),
            f"{base} has no convolutions: its LoRA is in the linear layers of its blocks.",
            "Leave convolutions out.",
        )
    if spec.min_snr is not None:
        return Problem(
            ("min_snr",),
            f"min_snr weighs the noise schedules of Stable Diffusion; {base} learns a flow, which has none.",
            "Leave min_snr out.",
        )
    if spec.offset_noise not in ("auto", 0):
        return Problem(
            ("offset_noise",),
            f"offset_noise mends schedules that never come to pure noise; {base} learns a flow, which does.",
            "Leave offset_noise out.",
        )
    return None
