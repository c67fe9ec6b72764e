"""The VAE's latents: how they are spread, and a VAE whose latents have SD 1's spread."""

from __future__ import annotations

import math

import torch
from diffusers import AutoencoderKL

from tools.miniature.pool import Pool

# The posterior's deviation beside the latents' own, 1.
POSTERIOR = 0.01
# The same while it trains: the decoder learns to forgive what a UNet gets a little wrong.
TRAINING_POSTERIOR = 0.1


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Pool, batch: int = 64) -> torch.Tensor:
    """The means of all pictures' latents, [N, 4, side / 8, side / 8], unscaled, on the CPU."""
    device = next(vae.parameters()).device
    made = []
    for start in range(0, len(pictures.pixels), batch):
        pixels = torch.from_numpy(pictures.pixels[start : start + batch]).to(device)
        made.append(vae.encode(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).latent_dist.mean.cpu())
    return torch.cat(made)


@torch.no_grad()
def standardise(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Fold shift and scale into the VAE, so that ``scaling_factor`` × its latents has mean 0 and spread 1 a channel.

    SD 1's factor, 0.18215, then holds for this VAE too, wherever a program has it built in. What it decodes stays
    the same. Gives the new VAE's latents for those given, already scaled.
    """
    mean = latents.mean((0, 2, 3))
    scale = 1 / (vae.config.scaling_factor * latents.std((0, 2, 3)))
    into, out = vae.quant_conv, vae.post_quant_conv
    channels = len(mean)
    device = into.weight.device
    m, k = mean.to(device), scale.to(device)
    out.bias += out.weight.flatten(1) @ m
    out.weight /= k[None, :, None, None]
    into.weight[:channels] *= k[:, None, None, None]
    into.bias[:channels] = (into.bias[:channels] - m) * k
    # A channel that the decoder does without has a wide posterior; drawn from it, a training would see noise where the
    # UNet knows a picture. SD 1's posteriors are narrow, and so are these.
    into.weight[channels:] = 0
    into.bias[channels:] = 2 * math.log(POSTERIOR / vae.config.scaling_factor)
    return (latents - mean[:, None, None]) * scale[:, None, None] * vae.config.scaling_factor


@torch.no_grad()
def widen_posterior(vae: AutoencoderKL) -> None:
    """Let a VAE that ``standardise`` made learn on."""
    channels = vae.config.latent_channels
    vae.quant_conv.bias[channels:] = 2 * math.log(TRAINING_POSTERIOR / vae.config.scaling_factor)
