"""Train the CLIP miniature on the world: ``python -m tools.miniature.train_search --state DIR``.

The contrastive loss of CLIP (Radford et al. 2021): of a batch, each text shall find its picture and each picture its
text. What is said of a picture changes from step to step: all of it, or what somebody who searches would say. Beside
it each patch learns to tell what lies there, which opens the eyes far sooner than the contrast alone.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional
from transformers import CLIPModel, CLIPTokenizer

from handlers.models.miniature import searcher, world
from handlers.models.miniature.seeded import seeded
from tools.miniature import muon, pool, training
from tools.miniature.train_captioner import MOST_THINGS, Eyes, targets

PICTURES = 24_000
BATCH = 96
MUON_RATE = 0.02
LEARNING_RATE = 2e-3
# Texts that each picture has; the first two tell all.
SAID = 6
# The part of the time in which the patches' loss fades to a fifth.
FADE = 0.5
_HIGHEST_SCALE = 4.6052  # the logarithm of 100, as CLIP's own


def texts(scene: world.Scene, rng: np.random.Generator) -> list[str]:
    """``SAID`` ways to ask for a scene: two tell all of it, the others leave things, words or the background out."""
    whole = world.caption(scene)
    bare = whole.removeprefix("An image of ").removesuffix(".")
    return [whole, bare, *(_asked(scene, rng) for _ in range(SAID - 2))]


def _asked(scene: world.Scene, rng: np.random.Generator) -> str:
    count = int(rng.integers(1, len(scene.things) + 1))
    kept = sorted(rng.permutation(len(scene.things))[:count])
    phrases = [_phrase(scene.things[index], rng) for index in kept]
    said = " and ".join(phrases)
    return f"{said} on {world.background_phrase(scene)}" if rng.random() < 0.6 else said


def _phrase(thing: world.Thing, rng: np.random.Generator) -> str:
    words = [thing.shape]
    if rng.random() < 0.9:
        words.insert(0, thing.colour)
    if thing.size != "medium" and rng.random() < 0.5:
        words.insert(0, thing.size)
    return f"{world.article(words[0])} {' '.join(words)}"


def token_ids(tokenizer: CLIPTokenizer, said: list[list[str]]) -> torch.Tensor:
    """Ids [pictures, SAID, longest], padded with the token that ends a text."""
    flat = [text for row in said for text in row]
    ids = tokenizer(flat, padding="longest", return_tensors="pt").input_ids
    return ids.view(len(said), SAID, -1)


def contrast(model: CLIPModel, pictures: torch.Tensor, said: torch.Tensor) -> torch.Tensor:
    """CLIP's loss of normalised embeddings [B, width] whose rows belong together."""
    logits = model.logit_scale.clamp(max=_HIGHEST_SCALE).exp() * said @ pictures.T
    right = torch.arange(len(logits), device=logits.device)
    return (functional.cross_entropy(logits, right) + functional.cross_entropy(logits.T, right)) / 2


def main() -> None:
    """Train until the minutes are spent; the state file is ``search.pt``."""
    options = training.arguments("Train the CLIP miniature.", minutes=25).parse_args()
    device = training.set_up(options)
    pictures = pool.drawn(PICTURES, pool.TRAINING_SEED + 3, most_things=MOST_THINGS)
    tools = searcher.processor()
    said = [texts(scene, np.random.default_rng((11, index))) for index, scene in enumerate(pictures.scenes)]
    ids = token_ids(tools.tokenizer, said)
    ends = (ids == tools.tokenizer.eos_token_id).int().argmax(2)
    truth = targets(pictures)
    mean = torch.tensor(tools.image_processor.image_mean)[:, None, None]
    std = torch.tensor(tools.image_processor.image_std)[:, None, None]
    with seeded(searcher.SEED):
        model = searcher.model()
        eyes = Eyes(model.config.vision_config.hidden_size)
    average = training.Average([model.to(device), eyes.to(device)])
    optimizer = muon.optimizer_for(average.live, MUON_RATE, LEARNING_RATE)

    def step(number: int, fraction: float) -> torch.Tensor:
        random = torch.Generator().manual_seed(number)
        chosen = torch.randint(PICTURES, (BATCH,), generator=random)
        # Half of the texts tell all.
        way = torch.randint(2 * SAID - 4, (BATCH,), generator=random)
        way = torch.where(way < SAID - 2, way % 2, way - SAID + 4)
        longest = int(ends[chosen, way].max()) + 1
        pixels = torch.from_numpy(pictures.pixels[chosen.numpy()]).permute(0, 3, 1, 2).float() / 255
        seen = model.vision_model(pixel_values=((pixels - mean) / std).to(device))
        told = model.text_model(input_ids=ids[chosen, way, :longest].to(device))
        loss = contrast(
            model,
            functional.normalize(model.visual_projection(seen.pooler_output), dim=-1),
            functional.normalize(model.text_projection(told.pooler_output), dim=-1),
        )
        weight = max(0.2, 1 - 0.8 * fraction / FADE)
        return loss + 0.5 * weight * eyes.loss(seen.last_hidden_state[:, 1:], truth.of(chosen, device))

    training.run(options.state / "search.pt", minutes=options.minutes, average=average, optimizer=optimizer, step=step)


if __name__ == "__main__":
    main()
