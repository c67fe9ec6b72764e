"""Stable Diffusion 1 and 2: one text encoder, of which the UNet attends to the last layer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image

from handlers.train.families.interface import Asked, Embedded, Tokens, token_ids
from handlers.train.objective import Denoising

STEPS = 20
"""In which a sample is drawn."""


@dataclass(frozen=True)
class StableDiffusion:
    """SD 1 and SD 2; what differs between them lies in the base's configuration."""

    name: str
    denoiser: str = "unet"
    encoders: tuple[str, ...] = ("text_encoder",)
    draws_from_embeddings: bool = False

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

    def load_denoiser(self, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
        """The UNet (``interface.Family.load_denoiser``)."""
        return load_unet(folder).to(dtype=dtype)

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

    def draw(self, whole: Any, asked: Asked) -> list[Image.Image]:
        """Pictures (``interface.Family.draw``)."""
        return drawn(whole, asked)

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


def drawn(whole: Any, asked: Asked) -> list[Image.Image]:
    """Pictures of a pipeline with a UNet."""
    kind = whole.unet.dtype
    is_half = kind != torch.float32
    with computed_in(kind, whole.unet.device.type):
        drawn: Any = whole(
            asked.prompts,
            height=asked.side,
            width=asked.side,
            num_inference_steps=STEPS,
            guidance_scale=asked.guidance,
            generator=asked.generators,
            output_type="latent" if is_half else "pil",
            callback_on_step_end=asked.after_step,
        ).images
    # A VAE computes in float32, whatever the UNet does: SDXL's overflows in float16.
    return decoded(whole, drawn.float() / whole.vae.config.scaling_factor) if is_half else list(drawn)


def computed_in(kind: torch.dtype, device: str) -> AbstractContextManager[Any]:
    """Autocast to the type of a denoiser's weights, if that is a half one."""
    context: AbstractContextManager[Any] = (
        nullcontext() if kind == torch.float32 else torch.autocast(device, dtype=kind)
    )
    return context


def decoded(whole: Any, latents: torch.Tensor) -> list[Image.Image]:
    """Pictures of latents as the VAE gave them, (pictures, channels, height, width)."""
    pictures: list[Image.Image] = whole.image_processor.postprocess(whole.vae.decode(latents).sample, output_type="pil")
    return pictures
