"""Measure the miniatures on fresh seeds: ``python -m tools.miniature.evaluate [--weights DIR] [--json]``.

The VAE by PSNR, drawing by ``judge`` (which knows nothing of the model), captions against the world's truth.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from transformers import Kosmos2ForConditionalGeneration, Kosmos2Processor

from handlers.models import miniature
from handlers.models.miniature import exam, judge, world
from handlers.search.model import Embedder
from handlers.train.families.unet import STEPS
from handlers.train.plan import MINIATURE_GUIDANCE
from tools.miniature import pool

BATCH = 25


@torch.no_grad()
def vae_figures(vae: AutoencoderKL, pictures: int) -> dict[str, float]:
    """Mean PSNR of fresh pictures of one to three things, there and back."""
    drawn = pool.drawn(pictures, pool.FRESH_SEED, most_things=3)
    found = []
    for pixels in drawn.pixels:
        values = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
        made = vae.decode(vae.encode(values).latent_dist.mean).sample.clamp(-1, 1)
        back = ((made[0] + 1) * 127.5).permute(1, 2, 0).numpy().astype(np.float64)
        found.append(judge.psnr(back, pixels.astype(np.float64)))
    return {"psnr": float(np.mean(found)), "psnr_worst_tenth": float(np.quantile(found, 0.1))}


def drawn_by_sdxl(pipeline: StableDiffusionXLPipeline, wishes: Sequence[exam.Wish]) -> list[Image.Image]:
    """Pictures by SDXL's own pipeline, with the schedule, steps and guidance of ``exam.drawn``."""
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    for start in range(0, len(wishes), BATCH):
        part = wishes[start : start + BATCH]
        images += pipeline(
            [prompt for prompt, _seed in part],
            height=64,
            width=64,
            num_inference_steps=STEPS,
            guidance_scale=MINIATURE_GUIDANCE,
            generator=[torch.Generator().manual_seed(seed) for _prompt, seed in part],
        ).images
    return images


def drawing_figures(pipeline: DiffusionPipeline, prompts: int, sheet: Path | None) -> dict[str, Any]:
    """Draw fresh prompts on plain backgrounds, as fastsd draws its samples, and judge them."""
    scenes = [
        world.random_scene(np.random.default_rng((pool.FRESH_SEED, index)), textures=("plain",))
        for index in range(prompts)
    ]
    draw = drawn_by_sdxl if isinstance(pipeline, StableDiffusionXLPipeline) else exam.drawn
    images = draw(pipeline, [(world.full_prompt(scene), index) for index, scene in enumerate(scenes)])
    right: dict[str, int] = defaultdict(int)
    wrong: dict[str, int] = defaultdict(int)
    for scene, image in zip(scenes, images, strict=True):
        seen, thing = judge.look(image), scene.things[0]
        right["colour"] += seen.colour == thing.colour
        right["shape"] += seen.shape == thing.shape
        right["background"] += seen.background == scene.background
        right["all"] += (seen.colour, seen.shape, seen.background) == (thing.colour, thing.shape, scene.background)
        if seen.shape != thing.shape:
            wrong[f"{thing.shape} drawn as {seen.shape}"] += 1
        if seen.colour != thing.colour:
            wrong[f"{thing.colour} drawn as {seen.colour}"] += 1
    if sheet:
        write_sheet(images, sheet)
    worst = dict(sorted(wrong.items(), key=lambda item: -item[1])[:8])
    return {f"{what}_right": count / prompts for what, count in right.items()} | {"confused": worst}


def write_sheet(images: list[Image.Image], path: Path, columns: int = 20) -> None:
    """Write pictures of 64 px side by side."""
    canvas = Image.new("RGB", (columns * 66, -(-len(images) // columns) * 66), "white")
    for index, image in enumerate(images):
        canvas.paste(image, (index % columns * 66, index // columns * 66))
    canvas.save(path)


@torch.no_grad()
def caption_figures(
    model: Kosmos2ForConditionalGeneration, processor: Kosmos2Processor, pictures: int
) -> dict[str, Any]:
    """Caption fresh pictures of one to four things; things are matched in order, as captions name them."""
    drawn = pool.drawn(pictures, pool.FRESH_SEED + 1, most_things=4)
    words: dict[str, list[bool]] = defaultdict(list)
    overlaps: dict[int, list[float]] = defaultdict(list)
    images = [Image.fromarray(pixels) for pixels in drawn.pixels]
    for start in range(0, pictures, BATCH):
        batch = images[start : start + BATCH]
        inputs = processor(images=batch, text=["<grounding>An image of"] * len(batch), return_tensors="pt")
        given = {
            key: inputs[key] for key in ("pixel_values", "input_ids", "attention_mask", "image_embeds_position_mask")
        }
        said = model.generate(**given, max_new_tokens=64, do_sample=False)
        for offset, raw in enumerate(processor.batch_decode(said, skip_special_tokens=True)):
            number = start + offset
            scene, boxes = drawn.scenes[number], drawn.boxes[number]
            caption, entities = processor.post_process_generation(raw)
            caption = caption.replace(" ,", ",")  # the tokenizer sets a space before what follows a tag
            words["whole caption"].append(caption == world.caption(scene))
            words["count"].append(len(entities) == len(boxes))
            words["background"].append(caption.endswith(f"on {world.background_phrase(scene)}."))
            for index, (thing, box) in enumerate(zip(scene.things, boxes, strict=True)):
                phrase, _span, found = entities[index] if index < len(entities) else ("", None, [])
                words["colour"].append(thing.colour in phrase.split())
                words["shape"].append(thing.shape in phrase.split())
                if len(boxes) == 1:
                    words["colour of one"].append(words["colour"][-1])
                    words["shape of one"].append(words["shape"][-1])
                overlaps[len(boxes)].append(judge.box_overlap(found[0], box) if found else 0.0)
    rates = {f"{what}_right": sum(rows) / len(rows) for what, rows in words.items()}
    return rates | {f"iou_{things}": float(np.mean(rows)) for things, rows in sorted(overlaps.items())}


def search_figures(
    embedder: Embedder, queries: int, gallery: int = 50, most_things: int = 4, seed: int = pool.FRESH_SEED + 2
) -> dict[str, float]:
    """How often its own caption finds a picture first among ``gallery`` fresh ones, and how it does in fewer words.

    Galleries are drawn until there are enough queries; a caption that fits two pictures of its gallery is not asked.
    ``bare`` queries leave the sentence around the things out. ``copies``: of each picture, saved anew as a small JPEG,
    the picture itself is the nearest of its gallery. ``thing``: what is found for "a red circle" shows one.
    """
    found: dict[str, list[bool]] = defaultdict(list)
    for number in itertools.count():
        drawn = pool.drawn(gallery, seed + 10_000 * number, most_things=most_things)
        captions = [world.caption(scene) for scene in drawn.scenes]
        images = [Image.fromarray(pixels) for pixels in drawn.pixels]
        seen = embedder.pictures(images)
        bare = [said.removeprefix("An image of ").removesuffix(".") for said in captions]
        asked = {"first": embedder.texts(captions), "bare": embedder.texts(bare)}
        asked["copies"] = embedder.pictures([_copied(image) for image in images])
        shown = [{(thing.colour, thing.shape) for thing in scene.things} for scene in drawn.scenes]
        names = [(scene.things[0].colour, scene.things[0].shape) for scene in drawn.scenes]
        things = embedder.texts([f"{world.article(colour)} {colour} {shape}" for colour, shape in names])
        for index, said in enumerate(captions):
            if captions.count(said) == 1:
                for way, vectors in asked.items():
                    found[way].append(int(np.argmax(seen @ vectors[index])) == index)
                found["thing"].append(names[index] in shown[int(np.argmax(seen @ things[index]))])
                if len(found["first"]) == queries:
                    return {f"{way}_right": sum(rows) / queries for way, rows in found.items()}
    raise AssertionError


def _copied(image: Image.Image) -> Image.Image:
    """A picture as somebody passes it on: a bit smaller, as a JPEG."""
    content = io.BytesIO()
    image.resize((56, 56), Image.Resampling.LANCZOS).save(content, "JPEG", quality=80)
    return Image.open(content)


def figures_of(name: str, folder: Path, count: int, sheet: Path | None) -> dict[str, Any]:
    """What one miniature can do."""
    if name == "miniature-captioner":
        model = Kosmos2ForConditionalGeneration.from_pretrained(folder).eval()
        return caption_figures(model, Kosmos2Processor.from_pretrained(folder), count)
    if name == "miniature-search":
        return search_figures(Embedder.load(folder, "cpu"), count)
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    where = sheet.with_name(f"{sheet.stem}-{name}.png") if sheet else None
    return vae_figures(pipeline.vae, count) | drawing_figures(pipeline, count, where)


def main() -> None:
    """Measure what there is; one JSON object."""
    parser = argparse.ArgumentParser(description="Measure the miniatures on fresh seeds.")
    parser.add_argument("--weights", type=Path, default=miniature.WEIGHTS, help="folder of the miniatures")
    parser.add_argument("--count", type=int, default=200, help="pictures and prompts each")
    parser.add_argument("--sheet", type=Path, help="write what was drawn here, a file a miniature")
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as cache:
        miniature.WEIGHTS = options.weights
        for name in filter(miniature.is_trained, miniature.NAMES):
            folder = miniature.ensure(name, Path(cache))
            figures[name] = figures_of(name, folder, options.count, options.sheet)
    figures["seconds"] = round(time.monotonic() - began, 1)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
