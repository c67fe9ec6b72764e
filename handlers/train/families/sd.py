"""Stable Diffusion 1 and 2: one text encoder, of which the UNet attends to the last layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from handlers.train.families.interface import Embedded, Tokens, token_ids
from handlers.train.objective import Denoising


@dataclass(frozen=True)
class StableDiffusion:
    """SD 1 and SD 2; what differs between them lies in the base's configuration."""

    name: str
    denoiser: str = "unet"
    encoders: tuple[str, ...] = ("text_encoder",)

    def load(self, folder: Path) -> Any:
        """All but the denoiser (``interface.Family.load``)."""
        return StableDiffusionPipeline.from_pretrained(
            folder,
            unet=None,
            feature_extractor=None,
            safety_checker=None,
            requires_safety_checker=False,
            dtype=torch.float32,
            local_files_only=True,
        )

    def load_denoiser(self, folder: Path) -> Any:
        """The UNet (``interface.Family.load_denoiser``)."""
        return load_unet(folder)

    def objective(self, pipeline: Any) -> Denoising:
        """Noise or velocity, as the base's schedule says (``interface.Family.objective``)."""
        return denoising(pipeline)

    def sampling_scheduler(self, pipeline: Any) -> Any:
        """DDIM (``interface.Family.sampling_scheduler``)."""
        return ddim(pipeline)

    def assemble(self, pipeline: Any, denoiser: Any, scheduler: Any) -> Any:
        """A whole pipeline (``interface.Family.assemble``)."""
        return StableDiffusionPipeline(
            vae=pipeline.vae,
            text_encoder=pipeline.text_encoder,
            tokenizer=pipeline.tokenizer,
            unet=denoiser,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    def tokens(self, pipeline: Any, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Token ids (``interface.Family.tokens``)."""
        return {"text_encoder": token_ids(pipeline.tokenizer, prompts)}

    def embed(self, pipeline: Any, tokens: Tokens) -> Embedded:
        """The last layer after its norm; SD 2's encoder has no more layers than are used."""
        return Embedded(pipeline.text_encoder(tokens["text_encoder"])[0])

    def condition(self, embedded: Embedded, sizes: torch.Tensor) -> dict[str, Any]:  # noqa: ARG002
        """Only the hidden states: SD 1 and 2 do not know of sizes."""
        return {"encoder_hidden_states": embedded.hidden}


def load_unet(folder: Path) -> Any:
    """A UNet in float32 on the CPU."""
    return UNet2DConditionModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True, subfolder="unet")


def denoising(pipeline: Any) -> Denoising:
    """The objective of a base with a UNet."""
    return Denoising(DDPMScheduler.from_config(pipeline.scheduler.config), pipeline.vae.config.scaling_factor)


def ddim(pipeline: Any) -> Any:
    """The base's schedule, for few steps."""
    return DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
