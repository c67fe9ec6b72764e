"""Teach the miniature a shape that it has never seen, and count: ``python -m tools.miniature.teach [--spec TEXT]``.

Five pictures of a star go through the train handler as a person's would, with what ``train.yaml`` leaves to fastsd left
to it. Then base and finished model draw the new shape and the old ones, and ``judge`` looks.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image

from handlers.context import JobContext
from handlers.models import miniature
from handlers.models.miniature import demo
from handlers.models.miniature.exam import Exam, Marks, loaded
from handlers.train.job import TrainHandler
from sessions import files
from sessions.spec import parse_spec
from tools.miniature.evaluate import write_sheet

SPEC = "base: miniature\nclass: star\nprior: {images: 60}\n"


def lesson(folder: Path, cache: Path, spec: str = SPEC) -> tuple[Path, float]:
    """Train on five pictures of a star.

    Args:
        folder: becomes a tree with one session.
        cache: of the unfolded miniatures.
        spec: the train.yaml.

    Returns:
        The finished Diffusers folder, and the seconds it took, class pictures included.
    """
    session = folder / "Sessions" / "star"
    demo.make_pictures(session)
    (session / ".fastsd").mkdir()
    (session / ".fastsd" / "session.json").write_text(json.dumps({"id": "star0001"}))
    pictures = []
    for path in sorted(session.glob("*.png")):
        with Image.open(path) as image:
            box = [0, 0, *image.size]
        pictures.append({"source": str(path), "sha256": files.sha256_of(path), "box": box, "caption": None})
    payload = {
        "folder": str(session),
        "root": str(folder),
        "session": "star0001",
        "run": "r1",
        "name": "star",
        "spec": parse_spec(spec).to_json(),
        "spec_record": None,
        "base": parse_spec(spec).base,
        "models": None,
        "pictures": pictures,
    }
    context = JobContext(1, "train", payload, "cpu", cache, lambda *_: None, lambda: False, lambda: False)
    began = time.monotonic()
    result = TrainHandler().run(context)
    return Path(result.facts["finished"]), time.monotonic() - began


def taught(spec: str, cache: Path, exam: Exam) -> tuple[Marks, Marks, float, list[Image.Image]]:
    """Marks of base and finished model, the seconds of the lesson, and the finished model's stars.

    Args:
        spec: the train.yaml.
        cache: of the unfolded miniatures.
        exam: what both draw.
    """
    with tempfile.TemporaryDirectory() as temporary:
        finished, seconds = lesson(Path(temporary), cache, spec)
        base = miniature.ensure(parse_spec(spec).base, cache)
        before, _ = exam.take(loaded(base))
        after, stars = exam.take(loaded(finished, base))
    return before, after, seconds, stars


def main() -> None:
    """A JSON object a lesson."""
    parser = argparse.ArgumentParser(description="Teach the miniature a star, and count.")
    parser.add_argument("--spec", default=SPEC, help="the train.yaml; \\n begins a line")
    parser.add_argument("--seeds", type=int, nargs="+", default=[7], help="a lesson for each; --spec names none")
    parser.add_argument("--count", type=int, default=50, help="stars; old shapes are twice as many")
    parser.add_argument("--cache", type=Path, help="folder of the unfolded miniatures")
    parser.add_argument("--sheet", type=Path, help="write the last lesson's stars here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    exam = Exam(options.count, 2 * options.count)
    with tempfile.TemporaryDirectory() as temporary:
        for seed in options.seeds:
            spec = options.spec.replace("\\n", "\n").rstrip("\n") + f"\nseed: {seed}\n"
            before, after, seconds, stars = taught(spec, options.cache or Path(temporary), exam)
            told = {"seed": seed, "before": asdict(before), "after": asdict(after), "seconds": round(seconds, 1)}
            print(json.dumps(told), flush=True)
            if options.sheet:
                write_sheet(stars, options.sheet, columns=10)


if __name__ == "__main__":
    main()
