"""The demo's pictures and its last step. Run as a process of its own: the daemon and the command line import no torch.

python -m handlers.models.miniature.demo pictures FOLDER
python -m handlers.models.miniature.demo draw MODEL CACHE PICTURE
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sessions.files import atomic_path

WORD = "zwx"
SHAPE = "star"
PROMPTS = (
    "a zwx star on a blue background",
    "a zwx star on a yellow background",
    "a red circle on a white background",
    "a green square on a black background",
)
_PICTURES = 5
_JUDGED = 20
_SIDE = 256


def make_pictures(folder: Path) -> None:
    """Five pictures of a shape that the miniatures have never seen."""
    import numpy as np

    from handlers.models.miniature.world import COLOURS, UNSEEN_SHAPES, draw, random_scene

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(5)
    colours = list(COLOURS)
    rng.shuffle(colours)
    for number in range(_PICTURES):
        # Large, and no colour twice: what the five have in common is the shape.
        pair = colours[2 * number : 2 * number + 2]
        scene = random_scene(rng, shapes=UNSEEN_SHAPES, colours=pair, textures=("plain",), sizes=("large",))
        with atomic_path(folder / f"{WORD} ({number + 1}).png") as temporary:
            draw(scene, _SIDE).image.save(temporary, format="PNG")


def draw_before_and_after(model: Path, cache: Path, picture: Path) -> dict[str, Any]:
    """Draw the same prompts with the same noise by the base and by the finished file, side by side, and count.

    Args:
        model: the finished file, loaded as any Diffusers user would load it.
        cache: where the miniatures are.
        picture: the PNG to write: a row a prompt; left before, right after.

    Returns:
        ``pictures``: how many were judged of each kind; ``before`` and ``after``: the marks (``exam.Marks``).
    """
    from diffusers import StableDiffusionPipeline

    from handlers.models import miniature
    from handlers.models.miniature import exam
    from handlers.train.charts import grid

    base = miniature.ensure("miniature", cache)
    pipelines = (
        StableDiffusionPipeline.from_pretrained(base, safety_checker=None),
        StableDiffusionPipeline.from_single_file(str(model), config=str(base), local_files_only=True),
    )
    before, after = (exam.drawn(pipeline, [(prompt, 3) for prompt in PROMPTS]) for pipeline in pipelines)
    titles = [f"{when}: {prompt}" for prompt in PROMPTS for when in ("before", "after")]
    sheet = grid([image for pair in zip(before, after, strict=True) for image in pair], titles, columns=2)
    with atomic_path(picture) as temporary:
        sheet.save(temporary, format="PNG")
    taken = [exam.Exam(_JUDGED, _JUDGED).take(pipeline)[0] for pipeline in pipelines]
    return {
        "picture": str(picture),
        "pictures": _JUDGED,
        **{when: asdict(marks) for when, marks in zip(("before", "after"), taken, strict=True)},
    }


def main() -> None:
    """Do what the arguments say; one JSON object on stdout."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("pictures").add_argument("folder", type=Path)
    last = commands.add_parser("draw")
    for name in ("model", "cache", "picture"):
        last.add_argument(name, type=Path)
    arguments = parser.parse_args()
    if arguments.command == "pictures":
        make_pictures(arguments.folder)
        print(json.dumps({"pictures": _PICTURES}))
    else:
        import torch

        torch.set_num_threads(1)  # what a miniature computes is too small for two
        print(json.dumps(draw_before_and_after(arguments.model, arguments.cache, arguments.picture)))


if __name__ == "__main__":
    main()
