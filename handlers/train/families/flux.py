"""Flux (FLUX.1 [dev] and [schnell]): a transformer that is told T5's words and CLIP's pooled embedding.

T5 XXL and the transformer do not fit beside each other on most machines: the text encoders speak first, and leave.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from PIL import Image

from handlers.convert.source import locate
from handlers.train.families.drawing import computed_in, decoded
from handlers.train.families.interface import Asked, Embedded, Tokens, token_ids
from handlers.train.flow import FlowMatching

# Tokens of T5 that the two models were made for.
_DEV_TOKENS, _SCHNELL_TOKENS = 512, 256
# Steps in which a sample is drawn: [schnell] was distilled to few, and knows no guidance.
_DEV_STEPS, _SCHNELL_STEPS = 20, 4


@dataclass(frozen=True)
class Flux:
    """FLUX.1; whether it is [dev] or [schnell] lies in the transformer's configuration (``guidance_embeds``)."""

    name: str = "flux"
    denoiser: str = "transformer"
    encoders: tuple[str, ...] = ("text_encoder", "text_encoder_2")
    draws_from_embeddings: bool = True

    def load(self, folder: Path) -> Any:
        """All but the denoiser (``interface.Family.load``).

        The VAE is in float32; text encoders, which are never trained, in bfloat16, unless their files are in float32.
        """
        kinds = {name: _held_as(folder, name) for name in self.encoders}
        pipeline = FluxPipeline.from_pretrained(
            folder, transformer=None, dtype={"default": torch.float32, **kinds}, local_files_only=True
        )
        config = json.loads((folder / "transformer" / "config.json").read_bytes())
        pipeline.tokenizer_2.model_max_length = _DEV_TOKENS if config.get("guidance_embeds") else _SCHNELL_TOKENS
        return pipeline

    def load_denoiser(self, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
        """The transformer (``interface.Family.load_denoiser``)."""
        return FluxTransformer2DModel.from_pretrained(
            folder, dtype=dtype, local_files_only=True, subfolder="transformer"
        )

    def objective(self, pipeline: Any) -> FlowMatching:
        """Flow matching (``interface.Family.objective``)."""
        return FlowMatching(
            self.sampling_scheduler(pipeline), pipeline.vae.config.scaling_factor, pipeline.vae.config.shift_factor
        )

    def sampling_scheduler(self, pipeline: Any) -> Any:
        """Euler's steps along the flow (``interface.Family.sampling_scheduler``)."""
        return FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)

    def assemble(self, pipeline: Any, denoiser: Any, scheduler: Any) -> Any:
        """A whole pipeline; without the text encoders where they have left (``interface.Family.assemble``)."""
        return FluxPipeline(
            scheduler=scheduler,
            vae=pipeline.vae,
            text_encoder=pipeline.text_encoder,
            tokenizer=pipeline.tokenizer,
            text_encoder_2=pipeline.text_encoder_2,
            tokenizer_2=pipeline.tokenizer_2,
            transformer=denoiser,
        )

    def draw(self, whole: Any, asked: Asked) -> list[Image.Image]:
        """Pictures (``interface.Family.draw``); latents first, since the VAE is decoded in float32."""
        assert asked.embedded is not None
        assert asked.embedded.pooled is not None
        guided = whole.transformer.config.guidance_embeds
        kind = whole.transformer.x_embedder.weight.dtype
        with computed_in(kind, asked.embedded.hidden.device.type):
            packed = whole(
                prompt_embeds=asked.embedded.hidden,
                pooled_prompt_embeds=asked.embedded.pooled,
                height=asked.side,
                width=asked.side,
                num_inference_steps=_DEV_STEPS if guided else _SCHNELL_STEPS,
                guidance_scale=asked.guidance if guided else 0.0,
                generator=asked.generators,
                output_type="latent",
                callback_on_step_end=asked.after_step,
            ).images
        latents = whole._unpack_latents(packed.float(), asked.side, asked.side, whole.vae_scale_factor)  # noqa: SLF001
        config = whole.vae.config
        return decoded(whole, latents / config.scaling_factor + config.shift_factor)

    def tokens(self, pipeline: Any, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Token ids of CLIP and of T5 (``interface.Family.tokens``)."""
        return {
            "text_encoder": token_ids(pipeline.tokenizer, prompts),
            "text_encoder_2": token_ids(pipeline.tokenizer_2, prompts),
        }

    def embed(self, pipeline: Any, tokens: Tokens) -> Embedded:
        """T5's last layer, paddings included, and CLIP's pooled embedding; in float32."""
        pooled = pipeline.text_encoder(tokens["text_encoder"]).pooler_output
        hidden = pipeline.text_encoder_2(tokens["text_encoder_2"])[0]
        return Embedded(hidden.float(), pooled.float())

    def condition(self, embedded: Embedded, sizes: torch.Tensor) -> dict[str, Any]:  # noqa: ARG002
        """Words, pooled embedding, and the words' places, which are all one; Flux does not know of sizes."""
        return {
            "encoder_hidden_states": embedded.hidden,
            "pooled_projections": embedded.pooled,
            "txt_ids": torch.zeros(embedded.hidden.shape[1], 3, device=embedded.hidden.device),
        }


def _held_as(folder: Path, encoder: str) -> torch.dtype:
    kinds = {located.tensor.dtype for located in locate(folder, encoder).values()}
    return torch.float32 if "F32" in kinds else torch.bfloat16
