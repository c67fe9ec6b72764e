"""The objective of models that learn a straight way from noise to picture: flow matching (Lipman et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxPipeline

from handlers.train import randomness

# With which the guidance that is distilled into FLUX.1 [dev] is trained: 1 is the plain flow, unguided, as diffusers'
# README runs its script for Flux.
TRAINED_GUIDANCE = 1.0


@dataclass(frozen=True)
class FlowMatching:
    """Predict the way from picture to noise, ``noise - latents``, at a level σ of ``(1 - σ) latents + σ noise``.

    Levels are drawn with the logit-normal density of Esser et al. 2024 (section 3.1, mean 0, deviation 1), from the
    base's schedule as diffusers sets it up for training; every level's loss counts the same.

    Attributes:
        scheduler: diffusers' FlowMatchEulerDiscreteScheduler of the base.
        scaling_factor, shift_factor: the VAE's.
    """

    scheduler: Any
    scaling_factor: float
    shift_factor: float

    @property
    def worthless(self) -> float:
        """That of noise and of a latent together (``Objective.worthless``)."""
        return 2.0

    def latents(self, mean: torch.Tensor, std: torch.Tensor, within: torch.Tensor) -> torch.Tensor:
        """(Samples - shift) × scaling factor (``Objective.latents``)."""
        return (mean + std * within - self.shift_factor) * self.scaling_factor

    def timesteps(self, count: int, seed: int, stage: int, step: int, purpose: str) -> torch.Tensor:
        """Levels of the schedule, σ × 1000 (``Objective.timesteps``)."""
        shares = randomness.shares(count, seed, stage, step, purpose=purpose)
        levels = self.scheduler.timesteps
        places = (torch.sigmoid(torch.special.ndtri(shares)) * len(levels)).long().clamp(max=len(levels) - 1)
        chosen: torch.Tensor = levels[places]
        return chosen

    def noisy(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """On the straight line between both (``Objective.noisy``)."""
        sigmas = self._sigmas(timesteps, latents)
        return (1.0 - sigmas) * latents + sigmas * noise

    def _sigmas(self, timesteps: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return (timesteps / self.scheduler.config.num_train_timesteps).to(like).view(-1, *[1] * (like.dim() - 1))

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """The way from picture to noise (``Objective.target``)."""
        return noise - latents

    def weights(self, timesteps: torch.Tensor, min_snr: float | None) -> torch.Tensor | None:  # noqa: ARG002
        """None: all count the same; min-SNR is refused before (``Objective.weights``)."""
        return None

    def predict(
        self, denoiser: Any, noisy: torch.Tensor, timesteps: torch.Tensor, condition: Mapping[str, Any]
    ) -> torch.Tensor:
        """The transformer's answer, from packed latents and back (``Objective.predict``)."""
        pictures, channels, height, width = noisy.shape
        packed = FluxPipeline._pack_latents(noisy, pictures, channels, height, width)  # noqa: SLF001
        places = FluxPipeline._prepare_latent_image_ids(pictures, height // 2, width // 2, noisy.device, noisy.dtype)  # noqa: SLF001
        guided = denoiser.config.guidance_embeds
        answer = denoiser(
            hidden_states=packed,
            timestep=timesteps / self.scheduler.config.num_train_timesteps,
            guidance=torch.full((pictures,), TRAINED_GUIDANCE, device=noisy.device) if guided else None,
            img_ids=places,
            **condition,
        ).sample
        # In latents a side is already divided by the VAE.
        back: torch.Tensor = FluxPipeline._unpack_latents(answer, height, width, vae_scale_factor=1)  # noqa: SLF001
        return back
