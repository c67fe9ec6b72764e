"""A train.yaml with nothing left open: what a run goes by. Pure; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from handlers.train.buckets import MINIATURE_SIDE_STEP, SIDE_STEP, Shape, bucket_shapes
from handlers.train.memory import Means, Optimizer
from handlers.train.prompts import TEMPLATES, WORLD_TEMPLATES
from sessions.spec_rules import kept_steps

Precision = Literal["fp32", "fp16", "bf16"]
ADAPTERS = ("lora", "dora")
GUIDANCE = 7.5
# More than this tears the edges of what a miniature draws, and class pictures would teach it the tears: old shapes fell
# from 95 to 78 % with 7.5, and stayed with 3.
MINIATURE_GUIDANCE = 3.0
# Of FLUX.1 [dev], a number that it is told; [schnell] is told none.
FLUX_GUIDANCE = 3.5


@dataclass(frozen=True)
class Plan:
    """A train.yaml with nothing left open. ``run.json`` keeps it; a resumed run goes by it.

    Attributes:
        instance: the token, or ``filename``.
        class_: the noun; may be empty.
        captions: ``all``, ``none`` or ``person`` (those that a person wrote).
        text_encoder_steps, text_encoder_rate: stage 1; 0 steps leave it out.
        train_unet_in_stage_1: joint training, as the ancestor does.
        unet_steps, unet_rate: stage 2; 0 steps keep the base's UNet.
        checkpoint_steps, checkpoint_seconds: one of the two is None.
        sample_every: steps of stage 2 between samples; 0 for none at all.
        prior_images, prior_weight: class pictures that train along, and what their loss counts; 0 for none.
        prior_caption_dropout: how often a class picture has no words.
        prior_target: what class pictures are kept to: themselves, or what the base predicts for them.
        miniature: whether the base is a built-in miniature.
        buckets: whether pictures keep about the aspect that they have.
        lora_rank, lora_alpha: of an adapter's factors; it counts alpha / rank.
        lora_convolutions: whether the UNet's convolutions have factors, too.
        caption_dropout, caption_shuffle: how often there are no words, and whether their parts change places.
        validation: pictures that are held out.
        ema: whether the result is a moving average.
        compile: whether the denoiser's repeated blocks are compiled.
        optimizer, at_once, checkpointing, quantised, offload, fused_backward: as in ``memory.Means``; at_once 0 is a
            whole step.
        save_every, save_from: intermediate models, as ``spec_rules.kept_steps`` counts them.
        vae: the name of a VAE in place of the base's; ``auto``: the base's.
    """

    base: str
    family: str
    method: str
    resolution: int
    instance: str
    class_: str
    concept: str
    captions: str
    text_encoder_steps: int
    text_encoder_rate: float
    train_unet_in_stage_1: bool
    unet_steps: int
    unet_rate: float
    batch_size: int
    schedule: str
    precision: Precision
    seed: int
    offset_noise: float
    min_snr: float | None
    checkpoint_steps: int | None
    checkpoint_seconds: float | None
    sample_every: int
    prompts: tuple[str, ...]
    prior_images: int = 0
    prior_weight: float = 1.0
    prior_caption_dropout: float = 0.0
    prior_target: Literal["picture", "base"] = "picture"
    miniature: bool = False
    buckets: bool = False
    lora_rank: int = 16
    lora_alpha: float = 16
    lora_convolutions: bool = False
    caption_dropout: float = 0.0
    caption_shuffle: bool = False
    validation: int = 0
    ema: bool = False
    compile: bool = False
    optimizer: Optimizer = "adamw"
    at_once: int = 0
    checkpointing: bool = False
    quantised: bool = False
    offload: bool = False
    fused_backward: bool = False
    save_every: int = 0
    save_from: int = 0
    vae: str = "auto"

    @property
    def kept_steps(self) -> range:
        """The steps of stage 2 after which an intermediate model is kept."""
        return kept_steps(self.save_every, self.save_from, self.unet_steps)

    @property
    def pictures_a_step(self) -> int:
        """Those of the subject, and as many class pictures."""
        return self.batch_size * (2 if self.prior_images else 1)

    @property
    def has_teacher(self) -> bool:
        """Whether the base is asked what class pictures shall stay."""
        return bool(self.prior_images) and self.prior_target == "base"

    @property
    def means(self) -> Means:
        """How a step fits into memory."""
        return Means(
            at_once=self.at_once or self.pictures_a_step,
            checkpointing=self.checkpointing,
            quantised=self.quantised,
            offload=self.offload,
            optimizer=self.optimizer,
            fused_backward=self.fused_backward,
        )

    def with_means(self, means: Means) -> Plan:
        """The same with other means."""
        return replace(self, **asdict(means))

    @property
    def bucket_shapes(self) -> tuple[Shape, ...]:
        """The buckets of its resolution, (width, height)."""
        return bucket_shapes(self.resolution, MINIATURE_SIDE_STEP if self.miniature else SIDE_STEP)

    @property
    def is_adapter(self) -> bool:
        """Whether an adapter is trained, and the base stays as it is."""
        return self.method in ADAPTERS

    @property
    def is_one_stage(self) -> bool:
        """Whether UNet and text encoders are trained together, if at all."""
        return self.method != "dreambooth"

    @property
    def guidance(self) -> float:
        """The classifier-free guidance with which its base draws samples and class pictures."""
        if self.family == "flux":
            return FLUX_GUIDANCE
        return MINIATURE_GUIDANCE if self.miniature else GUIDANCE

    @property
    def templates(self) -> tuple[str, ...]:
        """How its base is asked for a subject."""
        return WORLD_TEMPLATES if self.miniature else TEMPLATES

    @property
    def stage_1_steps(self) -> int:
        """Steps before the stage that makes the model."""
        return 0 if self.is_one_stage else self.text_encoder_steps

    @property
    def total_steps(self) -> int:
        """Steps of all stages."""
        return self.stage_1_steps + self.unet_steps

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Plan:
        """The inverse of ``to_json``."""
        return cls(**{**value, "prompts": tuple(value["prompts"])})


def is_small_miniature(family: str, *, miniature: bool) -> bool:
    """Whether a base is the miniature of SD 2 or SDXL: their UNets have a third of the first one's numbers."""
    return miniature and family != "sd1"
