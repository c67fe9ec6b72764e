"""What ``auto`` means: a table of base × method × concept, and the plan that comes out of it. Pure; no torch.

The SD numbers are those of fast-stable-diffusion's two stages: 150 UNet steps an image at 2e-6, 35 text encoder steps
an image at 1e-6, both within bounds. The miniature's are for a few pictures on a laptop's CPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from handlers.train.holdout import how_many
from handlers.train.plan import ADAPTERS, Plan, Precision, is_small_miniature
from handlers.train.prompts import head_noun, instance_token
from sessions.refusal import Refusal
from sessions.spec_model import TrainSpec, seconds_of, steps_of
from sessions.spec_rules import RESOLUTIONS, flux_problem, require_kept


@dataclass(frozen=True)
class Amount:
    """How many steps by default, and how large they are.

    Attributes:
        per_image: steps for each picture.
        least, most: bounds of the product.
        rate: learning rate.
    """

    per_image: float
    least: int
    most: int
    rate: float

    def steps(self, pictures: int) -> int:
        """Steps for so many pictures."""
        return min(self.most, max(self.least, round(self.per_image * pictures)))


# (class of base, method, concept; None: any) → (text encoder, UNet). LoRA and DoRA are adapters. The first row that
# fits counts.
_ANCESTOR = Amount(150, 750, 3000, 2e-6)
_ANCESTOR_TEXT = Amount(35, 200, 450, 1e-6)
_NO_TEXT = Amount(0, 0, 0, 1e-6)
_ADAPTER = Amount(150, 750, 3000, 1e-4)
_ADAPTER_NO_TEXT = Amount(0, 0, 0, 1e-4)
_MINIATURE = Amount(60, 200, 500, 1e-3)
# With the text encoder left alone: trained along, it lost more of the old shapes and learned fewer stars.
_MINIATURE_ADAPTER = Amount(90, 300, 700, 4e-3)
# The miniatures of SD 2 and SDXL have a third of the first one's numbers: they need longer, and are that much faster.
_SMALL_MINIATURE = Amount(160, 500, 1200, 1e-3)
_SMALL_MINIATURE_ADAPTER = Amount(160, 500, 1200, 4e-3)
_TABLE: tuple[tuple[str, str, str | None, Amount, Amount], ...] = (
    ("miniature", "dreambooth", None, Amount(16, 40, 100, 5e-4), _MINIATURE),
    ("miniature", "finetune", None, Amount(60, 200, 500, 5e-4), _MINIATURE),
    ("miniature", "adapter", None, Amount(0, 0, 0, 4e-3), _MINIATURE_ADAPTER),
    ("small miniature", "dreambooth", None, Amount(16, 40, 100, 5e-4), _SMALL_MINIATURE),
    ("small miniature", "finetune", None, Amount(160, 500, 1200, 5e-4), _SMALL_MINIATURE),
    ("small miniature", "adapter", None, Amount(0, 0, 0, 4e-3), _SMALL_MINIATURE_ADAPTER),
    ("sd1", "dreambooth", None, _ANCESTOR_TEXT, _ANCESTOR),
    ("sd1", "finetune", None, _ANCESTOR_TEXT, _ANCESTOR),
    ("sd1", "adapter", None, _ADAPTER_NO_TEXT, _ADAPTER),
    ("sd2", "dreambooth", None, _ANCESTOR_TEXT, _ANCESTOR),
    ("sd2", "finetune", None, _ANCESTOR_TEXT, _ANCESTOR),
    ("sd2", "adapter", None, _ADAPTER_NO_TEXT, _ADAPTER),
    ("sdxl", "dreambooth", None, _NO_TEXT, _ANCESTOR),
    ("sdxl", "finetune", None, _NO_TEXT, _ANCESTOR),
    ("sdxl", "adapter", None, _ADAPTER_NO_TEXT, _ADAPTER),
    ("flux", "adapter", None, _ADAPTER_NO_TEXT, _ADAPTER),
)
# Pictures a step. A miniature's step of 6 costs little more than one of 1, and its lessons are short.
_BATCH_SIZE = {"miniature": 6}
# γ of min-SNR where train.yaml names none. Uniform weights spend a miniature's short lesson on the last traces of
# noise, where shapes are long settled: of 100 pictures 47 showed the new shape without it, 73 with it.
_MIN_SNR = {"miniature": 1.0}
# How often class pictures have no words. Guidance goes away from what a model draws without words (Ho & Salimans 2022),
# and a lesson that never asks for that lets it drift. Of 100 pictures each, with 60 class pictures: 71 stars and old
# shapes 97 → 89 without, 92 and 97 → 93 with it. SD was trained with a tenth. Flux is drawn without guidance.
_PRIOR_CAPTION_DROPOUT = {"miniature": 0.35, "flux": 0.0}
_USUAL_CAPTION_DROPOUT = 0.1
_SAMPLES = 2  # halfway and at the end; more where train.yaml asks for them
# Where not the base's: a step of Flux at 1024 pixels takes four times as long, and what is learned at 512 shows there.
_RESOLUTION = {"flux": 512}
_OFFSET_NOISE = {"style": 0.1}
# Pixels of a side that a family can be trained at; a base known by name has its own bounds in the spec.
_SIDES = {
    "sd1": RESOLUTIONS["sd15"],
    "sd2": (256, 1024),
    "sdxl": RESOLUTIONS["sdxl"],
    "flux": RESOLUTIONS["flux-dev"],
}


@dataclass(frozen=True)
class Base:
    """What the table needs to know of a base.

    Attributes:
        name: as written in train.yaml.
        family: ``sd1`` …
        resolution: pixels of a side that it was made for.
        miniature: whether it is one of the built-in miniatures.
    """

    name: str
    family: str
    resolution: int
    miniature: bool

    @property
    def size_class(self) -> str:
        """``miniature``, or the family."""
        return "miniature" if self.miniature else self.family


def make_plan(
    spec: TrainSpec, base: Base, pictures: Sequence[Mapping[str, Any]], session: str, precision: Precision
) -> Plan:
    """Resolve every ``auto``.

    Args:
        spec: the validated train.yaml.
        base: what it is trained from.
        pictures: those that will be trained on: ``source``, and where known ``subject`` (face, grounded, saliency,
            centre), ``noun`` (the grounded noun), ``caption`` and ``caption_by`` (``person`` where one wrote it).
        session: the session's identity, for its rare token.
        precision: what ``auto`` is on this device.

    Raises:
        Refusal: code ``spec``: a combination that the base cannot do.
    """
    method = _method(base) if spec.method == "auto" else spec.method
    if base.family == "flux":
        _check_flux(spec, base, method)
    concept = _concept(pictures) if spec.concept == "auto" else spec.concept
    text_encoder, unet = _amounts(base, method, concept)
    resolution = _RESOLUTION.get(base.size_class, base.resolution) if spec.resolution == "auto" else spec.resolution
    _check_resolution(base, resolution)
    instance = instance_token([str(picture["source"]) for picture in pictures], session)
    held_out = how_many(spec.validation, len(pictures), spec.instance)
    count = len(pictures) - held_out
    text_encoder_steps = steps_of(spec.text_encoder.steps, count)
    unet_steps = steps_of(spec.unet.steps, count)
    unet_steps = unet.steps(count) if unet_steps is None else unet_steps
    require_kept(spec, unet_steps)
    every = spec.checkpoint_every
    return Plan(
        base=base.name,
        family=base.family,
        method=method,
        resolution=resolution,
        instance=instance if spec.instance == "auto" else spec.instance,
        class_=_noun(concept, pictures) if spec.class_ == "auto" else spec.class_,
        concept=concept,
        captions=_captions(spec.captions, concept),
        text_encoder_steps=text_encoder.steps(count) if text_encoder_steps is None else text_encoder_steps,
        text_encoder_rate=_rate(spec, spec.text_encoder.learning_rate, text_encoder),
        train_unet_in_stage_1=spec.text_encoder.unet == "trained",
        unet_steps=unet_steps,
        unet_rate=_rate(spec, spec.unet.learning_rate, unet),
        batch_size=_BATCH_SIZE.get(base.size_class, 1) if spec.batch_size == "auto" else spec.batch_size,
        schedule=spec.schedule,
        precision=precision if spec.precision == "auto" else spec.precision,
        seed=spec.seed,
        offset_noise=_offset_noise(base, concept) if spec.offset_noise == "auto" else spec.offset_noise,
        min_snr=_MIN_SNR.get(base.size_class) if spec.min_snr is None else spec.min_snr,
        checkpoint_steps=every if isinstance(every, int) else None,
        checkpoint_seconds=seconds_of(every),
        sample_every=max(1, -(-unet_steps // _SAMPLES)) if spec.sample_every == "auto" else spec.sample_every,
        prompts=() if spec.prompts == "auto" else tuple(spec.prompts),
        prior_images=spec.prior.images if _has_prior(spec) else 0,
        prior_weight=spec.prior.weight,
        prior_caption_dropout=_prior_caption_dropout(spec, base),
        prior_target=_prior_target(spec, base),
        miniature=base.miniature,
        buckets=spec.buckets,
        lora_rank=spec.lora.rank,
        lora_alpha=spec.lora.alpha,
        lora_convolutions=base.miniature if spec.lora.convolutions == "auto" else spec.lora.convolutions,
        caption_dropout=spec.caption_dropout,
        caption_shuffle=spec.caption_shuffle,
        validation=held_out,
        ema=spec.ema,
        compile=spec.compile,
        optimizer="adamw" if spec.optimizer == "auto" else spec.optimizer,
        save_every=spec.save_every,
        save_from=spec.save_from,
        vae=spec.vae,
    )


def _method(base: Base) -> str:
    """All of SDXL takes 40 GB to train; an adapter takes 12. All of Flux takes more than any card has."""
    return "lora" if base.size_class in ("sdxl", "flux") else "dreambooth"


def _check_flux(spec: TrainSpec, base: Base, method: str) -> None:
    """Refuse what Flux does not do; ``spec_rules`` says the same with the line, where the base's name tells."""
    problem = flux_problem(spec, method, base.name)
    if problem:
        raise Refusal("spec", problem.what, problem.advice)


def _offset_noise(base: Base, concept: str) -> float:
    """It mends schedules that never come to pure noise; a flow does."""
    return 0.0 if base.family == "flux" else _OFFSET_NOISE.get(concept, 0.0)


def _amounts(base: Base, method: str, concept: str) -> tuple[Amount, Amount]:
    method = "adapter" if method in ADAPTERS else method
    row = "small miniature" if is_small_miniature(base.family, miniature=base.miniature) else base.size_class
    for its_row, its_method, its_concept, text_encoder, unet in _TABLE:
        if (its_row, its_method) == (row, method) and its_concept in (None, concept):
            return text_encoder, unet
    raise Refusal("spec", f"{method} on {base.name} comes with a later version of fastsd.", "Use dreambooth.")


def _prior_caption_dropout(spec: TrainSpec, base: Base) -> float:
    if not _has_prior(spec):
        return 0.0
    written = spec.prior.caption_dropout
    if not isinstance(written, str):
        return written
    return _PRIOR_CAPTION_DROPOUT.get(base.size_class, _USUAL_CAPTION_DROPOUT)


def _prior_target(spec: TrainSpec, base: Base) -> Literal["picture", "base"]:
    """Beside the whole of a real model the base takes memory that few cards have."""
    if spec.prior.target != "auto":
        return spec.prior.target
    return "base" if base.miniature and _has_prior(spec) else "picture"


def _has_prior(spec: TrainSpec) -> bool:
    return bool(spec.prior.images and spec.prior.weight)


def _rate(spec: TrainSpec, written: float | str, amount: Amount) -> float:
    if not isinstance(written, str):
        return written
    # Prodigy finds the rate itself; this is what it is multiplied by.
    return 1.0 if spec.optimizer == "prodigy" else amount.rate


def _check_resolution(base: Base, resolution: int) -> None:
    smallest, largest = RESOLUTIONS["miniature"] if base.miniature else _SIDES.get(base.family, RESOLUTIONS["sd15"])
    if not smallest <= resolution <= largest:
        raise Refusal(
            "spec",
            f"{base.name} cannot be trained at {resolution} pixels.",
            f"Write a resolution from {smallest} to {largest}, or auto.",
        )
    if resolution % 64 and not base.miniature:
        raise Refusal("spec", f"64 does not divide {resolution}.", f"Write {resolution // 64 * 64}, or auto.")


def _concept(pictures: Sequence[Mapping[str, Any]]) -> str:
    faces = sum(picture.get("subject") == "face" for picture in pictures)
    return "face" if faces * 2 > len(pictures) else "object"


def _noun(concept: str, pictures: Sequence[Mapping[str, Any]]) -> str:
    if concept == "face":
        return "person"
    nouns = Counter(head_noun(str(picture["noun"])) for picture in pictures if picture.get("noun"))
    nouns.pop("", None)
    return "" if concept == "style" or not nouns else min(nouns, key=lambda noun: (-nouns[noun], noun))


def _captions(written: bool | str, concept: str) -> str:
    if isinstance(written, bool):
        return "all" if written else "none"
    return {"style": "all", "face": "none"}.get(concept, "person")
