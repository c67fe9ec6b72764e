"""Stable Diffusion XL: two text encoders, a pooled embedding, and the sizes of the picture (Podell et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline

from handlers.train.families.interface import Embedded, Tokens, token_ids
from handlers.train.families.unet import WithUNet


@dataclass(frozen=True)
class StableDiffusionXL(WithUNet):
    """SDXL's base model. Its VAE overflows in float16, so that it is always used in float32 here."""

    name: str = "sdxl"
    encoders: tuple[str, ...] = ("text_encoder", "text_encoder_2")

    def load(self, folder: Path) -> Any:
        """All but the denoiser (``interface.Family.load``)."""
        return StableDiffusionXLPipeline.from_pretrained(
            folder, unet=None, add_watermarker=False, dtype=torch.float32, local_files_only=True
        ).to(dtype=torch.float32)

    def assemble(self, pipeline: Any, denoiser: Any, scheduler: Any) -> Any:
        """A whole pipeline (``interface.Family.assemble``)."""
        return StableDiffusionXLPipeline(
            vae=pipeline.vae,
            text_encoder=pipeline.text_encoder,
            text_encoder_2=pipeline.text_encoder_2,
            tokenizer=pipeline.tokenizer,
            tokenizer_2=pipeline.tokenizer_2,
            unet=denoiser,
            scheduler=scheduler,
            force_zeros_for_empty_prompt=pipeline.config.force_zeros_for_empty_prompt,
            add_watermarker=False,
        )

    def tokens(self, pipeline: Any, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Token ids (``interface.Family.tokens``); the tokenizers differ in what they pad with."""
        return {
            "text_encoder": token_ids(pipeline.tokenizer, prompts),
            "text_encoder_2": token_ids(pipeline.tokenizer_2, prompts),
        }

    def embed(self, pipeline: Any, tokens: Tokens) -> Embedded:
        """Both encoders' last but one layer, side by side, and the second one's pooled and projected embedding."""
        first = pipeline.text_encoder(tokens["text_encoder"], output_hidden_states=True)
        second = pipeline.text_encoder_2(tokens["text_encoder_2"], output_hidden_states=True)
        hidden = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        if not pipeline.config.force_zeros_for_empty_prompt:
            return Embedded(hidden, second.text_embeds)
        # Without words SDXL is told zeros, not what its encoders say of no words: so it was trained, and so it draws.
        worded = self._worded(pipeline, tokens).to(hidden)
        return Embedded(hidden * worded[:, None, None], second.text_embeds * worded[:, None])

    def _worded(self, pipeline: Any, tokens: Tokens) -> torch.Tensor:
        """Whether there are words, (prompts,)."""
        empty = self.tokens(pipeline, [""])["text_encoder"].to(tokens["text_encoder"].device)
        return (tokens["text_encoder"] != empty).any(dim=-1)

    def condition(self, embedded: Embedded, sizes: torch.Tensor) -> dict[str, Any]:
        """Hidden states, and what is added to the time step."""
        added = {"text_embeds": embedded.pooled, "time_ids": sizes.to(embedded.hidden)}
        return {"encoder_hidden_states": embedded.hidden, "added_cond_kwargs": added}
