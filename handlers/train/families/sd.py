"""Stable Diffusion 1 and 2: one text encoder, of which the UNet attends to the last layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from handlers.train.families.interface import Embedded, Tokens, token_ids
from handlers.train.families.unet import WithUNet


@dataclass(frozen=True)
class StableDiffusion(WithUNet):
    """SD 1 and SD 2; what differs between them lies in the base's configuration."""

    name: str
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
        ).to(dtype=torch.float32)  # transformers keeps the type of the file where diffusers converts

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
