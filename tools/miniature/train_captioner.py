"""Train the Kosmos-2 miniature on the world: ``python -m tools.miniature.train_captioner --state DIR``.

First its eyes: each patch, and each of the 64 latent queries after it, learns to tell shape, colour, box and rank from
left to right of what lies at one place of an 8 × 8 grid. Then caption and boxes by language loss, with the first loss
kept at a smaller weight. The embeddings of the 1024 patch indices start as codes of row and column, so that neighbours
are alike from the beginning, and a neighbour of the right index is half right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch.nn import functional
from transformers import Kosmos2ForConditionalGeneration, Kosmos2Processor
from transformers.models.kosmos2.processing_kosmos2 import coordinate_to_patch_index

from handlers.models.miniature import captioner, world
from handlers.models.miniature.seeded import seeded
from tools.miniature import muon, pool, training

PICTURES = 32_000
MOST_THINGS = 4
BATCH = 32
MUON_RATE = 0.02
LEARNING_RATE = 2e-3
# The part of the time that goes to the eyes alone.
WARM_UP = 0.4
# How far, in cells of the 32 × 32 grid, a patch index counts as nearly right.
SPREAD = 0.6
GRID = 8


@dataclass(frozen=True)
class Targets:
    """What each of the 8 × 8 places shows: indices into the world's tables, 0 for no thing; boxes in 0..1.

    ``rank`` counts things from left to right, from 1: the order in which a caption names them.
    """

    shape: torch.Tensor
    colour: torch.Tensor
    rank: torch.Tensor
    box: torch.Tensor
    background: torch.Tensor
    texture: torch.Tensor

    def of(self, chosen: torch.Tensor, device: torch.device) -> Targets:
        """Those of a batch."""
        return Targets(*(getattr(self, field.name)[chosen].to(device) for field in fields(self)))


class Eyes(torch.nn.Module):
    """The heads of the warm-up; they are thrown away at the end."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = (
            1 + len(world.SHAPES),
            1 + len(world.COLOURS),
            1 + MOST_THINGS,
            4,
            len(world.COLOURS),
            len(world.TEXTURES),
        )
        self.sizes = sizes
        self.read = torch.nn.Linear(width, sum(sizes))

    def loss(self, seen: torch.Tensor, truth: Targets) -> torch.Tensor:
        """Cross entropy of the words and ranks, and L1 of the boxes where there is a thing; ``seen`` [B, 64, width]."""
        shape, colour, rank, box, background, texture = self.read(seen).split(self.sizes, -1)
        places = seen.size(1)
        there = (truth.shape > 0)[..., None]
        boxes = ((box.sigmoid() - truth.box).abs() * there).sum() / (4 * there.sum())
        words = (
            functional.cross_entropy(shape.flatten(0, 1), truth.shape.flatten())
            + functional.cross_entropy(colour.flatten(0, 1), truth.colour.flatten())
            + functional.cross_entropy(rank.flatten(0, 1), truth.rank.flatten())
            + 0.2 * functional.cross_entropy(background.flatten(0, 1), truth.background.repeat_interleave(places))
            + 0.2 * functional.cross_entropy(texture.flatten(0, 1), truth.texture.repeat_interleave(places))
        )
        return words + 8 * boxes


def targets(pictures: pool.Pool) -> Targets:
    """The grid's truth for all pictures: a place belongs to the thing whose box holds its middle, the nearest one."""
    count = len(pictures.scenes)
    shape = torch.zeros(count, GRID * GRID, dtype=torch.long)
    colour, rank = torch.zeros_like(shape), torch.zeros_like(shape)
    box = torch.zeros(count, GRID * GRID, 4)
    colours = list(world.COLOURS)
    for index, (scene, boxes) in enumerate(zip(pictures.scenes, pictures.boxes, strict=True)):
        for place in range(GRID * GRID):
            x, y = (place % GRID + 0.5) / GRID, (place // GRID + 0.5) / GRID
            inside = [
                (math.dist(thing.centre, (x, y)), number)
                for number, thing in enumerate(scene.things)
                if boxes[number][0] <= x <= boxes[number][2] and boxes[number][1] <= y <= boxes[number][3]
            ]
            if inside:
                number = min(inside)[1]
                shape[index, place] = 1 + world.SHAPES.index(scene.things[number].shape)
                colour[index, place] = 1 + colours.index(scene.things[number].colour)
                rank[index, place] = 1 + number
                box[index, place] = torch.tensor(boxes[number])
    background = torch.tensor([colours.index(scene.background) for scene in pictures.scenes])
    texture = torch.tensor([world.TEXTURES.index(scene.texture) for scene in pictures.scenes])
    return Targets(shape, colour, rank, box, background, texture)


def grounded_caption(scene: world.Scene, boxes: tuple[tuple[float, float, float, float], ...]) -> str:
    """The caption of ``world.caption`` with Kosmos-2's tags: phrases with their two patch indices."""
    parts = []
    for number, (thing, box) in enumerate(zip(scene.things, boxes, strict=True)):
        first, last = coordinate_to_patch_index(box, 32)
        joint = "" if number == 0 else " and" if number == len(boxes) - 1 else ","
        parts.append(
            f"{joint}<phrase> {world.phrase(thing)}</phrase>"
            f"<object><patch_index_{first:04d}><patch_index_{last:04d}></object>"
        )
    return f"<grounding>An image of{''.join(parts)} on {world.background_phrase(scene)}."


def token_rows(pictures: pool.Pool, tools: Kosmos2Processor) -> list[list[int]]:
    """For each picture the ids of start, image places, caption and end."""
    tokenizer = tools.tokenizer
    image = [
        tokenizer.convert_tokens_to_ids("<image>"),
        *range(tokenizer.unk_token_id + 1, tokenizer.unk_token_id + 1 + captioner.LATENT_QUERIES),
        tokenizer.convert_tokens_to_ids("</image>"),
    ]
    rows = []
    for scene, boxes in zip(pictures.scenes, pictures.boxes, strict=True):
        said = tokenizer(grounded_caption(scene, boxes), add_special_tokens=False).input_ids
        rows.append([tokenizer.bos_token_id, *image, *said, tokenizer.eos_token_id])
    return rows


def code_patch_indices(model: Kosmos2ForConditionalGeneration, tools: Kosmos2Processor) -> None:
    """Start the 1024 patch indices' embeddings as Fourier codes of row and column, of the others' length."""
    first = tools.tokenizer.convert_tokens_to_ids("<patch_index_0000>")
    embeddings = model.get_input_embeddings().weight
    width = embeddings.size(1) // 4
    cells = (torch.arange(32).float() + 0.5) / 32
    frequencies = torch.pi * torch.arange(1, width + 1) / 2
    code = torch.cat([(cells[:, None] * frequencies).sin(), (cells[:, None] * frequencies).cos()], 1)
    # Slow waves weigh more: near cells are nearly alike, far ones are not.
    code /= torch.cat([1 + torch.arange(width) / 4] * 2)
    rows, columns = code.repeat_interleave(32, 0), code.repeat(32, 1)
    whole = torch.cat([rows, columns], 1)
    with torch.no_grad():
        length = embeddings[:first].norm(dim=1).mean()
        embeddings[first : first + 1024] = whole / whole.norm(dim=1, keepdim=True) * length


def open_eyes(model: Kosmos2ForConditionalGeneration) -> None:
    """Let the projection keep the features' length 1 spread over its width, so that its attention starts awake."""
    weight = model.image_to_text_projection.dense.weight
    torch.nn.init.orthogonal_(weight, gain=math.sqrt(weight.size(0)))


def look(model: Kosmos2ForConditionalGeneration, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The patches [B, 64, width] and the latent queries' view [B, 64, width], as the model's own forward makes it."""
    projection = model.image_to_text_projection
    seen = model.vision_model(pixel_values=pixel_values).last_hidden_state
    features = functional.normalize(model.vision_model.model.post_layernorm(seen), dim=-1)
    return projection.dense(features)[:, 1:], projection(features)[0]


class Speech:
    """The language loss: cross entropy of the next token, soft over neighbouring cells where that is a patch index."""

    def __init__(self, rows: list[list[int]], tools: Kosmos2Processor) -> None:
        tokenizer = tools.tokenizer
        opening = tokenizer("<grounding>An image of", add_special_tokens=False).input_ids
        self.rows = rows
        self.pad = tokenizer.pad_token_id
        self.given = 1 + 2 + captioner.LATENT_QUERIES + len(opening)
        self.first = tokenizer.convert_tokens_to_ids("<patch_index_0000>")
        cells = torch.arange(32.0)
        near = (-((cells[:, None] - cells) ** 2) / (2 * SPREAD**2)).softmax(1)
        self.near = torch.kron(near, near)

    def loss(
        self, model: Kosmos2ForConditionalGeneration, chosen: torch.Tensor, image_embeds: torch.Tensor
    ) -> torch.Tensor:
        """The mean over all tokens that are to be said."""
        device = image_embeds.device
        longest = max(len(self.rows[index]) for index in chosen.tolist())
        filled = [self.rows[index] + [self.pad] * (longest - len(self.rows[index])) for index in chosen.tolist()]
        ids = torch.tensor(filled, device=device)
        places = torch.zeros_like(ids)
        places[:, 2 : 2 + captioner.LATENT_QUERIES] = 1
        hidden = model.text_model.model(
            input_ids=ids,
            image_embeds=image_embeds,
            image_embeds_position_mask=places,
            attention_mask=(ids != self.pad).long(),
        ).last_hidden_state[:, self.given - 1 : -1]
        wanted = ids[:, self.given :]
        told = model.text_model.lm_head(hidden).log_softmax(-1)
        index = wanted - self.first
        is_patch = (index >= 0) & (index < len(self.near))
        is_word = (wanted != self.pad) & ~is_patch
        words = told[is_word].gather(1, wanted[is_word][:, None]).sum()
        patches = told[is_patch][:, self.first : self.first + len(self.near)]
        return -(words + (self.near.to(device)[index[is_patch]] * patches).sum()) / (wanted != self.pad).sum()


def main() -> None:
    """Train until the minutes are spent; the state file is ``captioner.pt``."""
    options = training.arguments("Train the Kosmos-2 miniature.", minutes=40).parse_args()
    device = training.set_up(options)
    pictures = pool.drawn(PICTURES, pool.TRAINING_SEED + 2, most_things=MOST_THINGS)
    tools = captioner.processor()
    speech = Speech(token_rows(pictures, tools), tools)
    truth = targets(pictures)
    mean = torch.tensor(tools.image_processor.image_mean)[:, None, None]
    std = torch.tensor(tools.image_processor.image_std)[:, None, None]
    with seeded(captioner.SEED):
        model = captioner.model(len(tools.tokenizer))
        code_patch_indices(model, tools)
        open_eyes(model)
        eyes = Eyes(model.config.text_config.embed_dim)
    average = training.Average([model.to(device), eyes.to(device)])
    optimizer = muon.optimizer_for(average.live, MUON_RATE, LEARNING_RATE)

    def step(number: int, fraction: float) -> torch.Tensor:
        random = torch.Generator().manual_seed(number)
        # All pictures of a batch show as many things: their captions are about as long.
        things = number % MOST_THINGS
        chosen = torch.randint(PICTURES // MOST_THINGS, (BATCH,), generator=random) * MOST_THINGS + things
        pixels = torch.from_numpy(pictures.pixels[chosen.numpy()]).permute(0, 3, 1, 2).float() / 255
        patches, image_embeds = look(model, ((pixels - mean) / std).to(device))
        part = truth.of(chosen, device)
        seen = 0.5 * (eyes.loss(patches, part) + eyes.loss(image_embeds, part))
        return seen if fraction < WARM_UP else speech.loss(model, chosen, image_embeds) + 0.2 * seen

    training.run(
        options.state / "captioner.pt", minutes=options.minutes, average=average, optimizer=optimizer, step=step
    )


if __name__ == "__main__":
    main()
