"""Train the drawing miniatures' VAE on the world: ``python -m tools.miniature.train_vae --state DIR``.

L1 + L2 on pixels, the same on 8 × 8 means (flat colours are what a small VAE gets wrong), a faint KL term: enough
that the decoder forgives the small errors of a UNet. Full precision: on a CPU bfloat16 is slower at these widths.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from handlers.models.miniature import drawing
from handlers.models.miniature.seeded import seeded
from tools.miniature import latents, muon, pool, training

BATCH = 8
PICTURES = 16_384
MUON_RATE = 0.02
LEARNING_RATE = 3e-3
KL_WEIGHT = 1e-5
# The part of the pictures whose things have outlines of no name.
NAMELESS = 0.4
# What the learning rates are multiplied by where trained weights learn on.
GENTLY = 0.3


def pixels_of(pictures: pool.Pool, indices: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Pictures as float [B, 3, side, side] in -1..1."""
    chosen = torch.from_numpy(pictures.pixels[indices.numpy()]).to(device)
    return chosen.permute(0, 3, 1, 2).float() / 127.5 - 1


def distance(made: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """L1 + 2 L2 over elements."""
    return functional.l1_loss(made, truth) + 2 * functional.mse_loss(made, truth)


def main() -> None:
    """Train until the minutes are spent; the state file is ``vae.pt``."""
    options = training.arguments("Train the miniature VAE.", minutes=25).parse_args()
    device = training.set_up(options)
    rate = GENTLY if options.from_shipped else 1.0
    pictures = pool.drawn(PICTURES, pool.TRAINING_SEED, most_things=3, nameless=NAMELESS)
    with seeded(drawing.SEED):
        vae = drawing.vae().to(device)
    if options.from_shipped:
        training.load_shipped(vae, "miniature", "vae")
        latents.widen_posterior(vae)
    average = training.Average([vae])
    optimizer = muon.optimizer_for(vae, rate * MUON_RATE, rate * LEARNING_RATE)

    def step(number: int, _fraction: float) -> torch.Tensor:
        random = torch.Generator().manual_seed(number)
        truth = pixels_of(pictures, torch.randint(PICTURES, (BATCH,), generator=random), device)
        if number % 2:
            truth = truth.flip(3)
        latent = vae.encode(truth).latent_dist
        noise = torch.randn(latent.mean.shape, generator=random).to(device)
        made = vae.decode(latent.mean + latent.std * noise).sample
        kl = 0.5 * (latent.mean**2 + latent.var - 1 - latent.logvar).mean()
        coarse = distance(functional.avg_pool2d(made, 8), functional.avg_pool2d(truth, 8))
        return distance(made, truth) + coarse + KL_WEIGHT * kl

    training.run(options.state / "vae.pt", minutes=options.minutes, average=average, optimizer=optimizer, step=step)


if __name__ == "__main__":
    main()
