"""A small session with pictures, for the tests of training."""

import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from handlers.crop.window import square_window
from sessions import files
from sessions.spec import parse_spec

COLOURS = ("white", "yellow", "gray")


def make_session(folder: Path, identity: str = "abcd1234") -> Path:
    """A session of three pictures with a purple triangle each; returns its folder."""
    (folder / ".fastsd").mkdir(parents=True)
    (folder / ".fastsd" / "session.json").write_text(json.dumps({"id": identity}))
    for number, colour in enumerate(COLOURS):
        image = Image.new("RGB", (90, 120), colour)
        ImageDraw.Draw(image).polygon([(45, 30), (80, 95), (10, 95)], fill="purple")
        image.save(folder / f"zwx ({number}).png")
    return folder


def make_long_session(folder: Path, identity: str = "abcd1234") -> Path:
    """A session of two wide pictures, two tall ones and a square one, each with a purple disc; returns its folder.

    Three class pictures, one of them wide, lie there already.
    """
    (folder / ".fastsd").mkdir(parents=True)
    (folder / ".fastsd" / "session.json").write_text(json.dumps({"id": identity}))
    (folder / "concept_images").mkdir()
    for number, size in enumerate([(160, 96), (200, 120), (84, 108), (90, 120), (100, 100)]):
        image = Image.new("RGB", size, COLOURS[number % len(COLOURS)])
        across, down = size[0] // 2, size[1] // 2
        ImageDraw.Draw(image).ellipse([across - 30, down - 30, across + 30, down + 30], "purple")
        image.save(folder / f"zwx ({number}).png")
    for number, size in enumerate([(64, 64), (128, 72), (64, 64)]):
        Image.new("RGB", size, COLOURS[number]).save(folder / "concept_images" / f"{number}.png")
    return folder


def payload_of(folder: Path, spec: str, **changes: Any) -> dict[str, Any]:
    """The payload of a train job of such a session, whose tree is two levels up."""
    boxes = {path: box if (box := _middle_of(path)) else [0, 15, 90, 105] for path in sorted(folder.glob("*.png"))}
    pictures = [
        {"source": str(path), "sha256": files.sha256_of(path), "box": box, "caption": None}
        for path, box in boxes.items()
    ]
    return {
        "folder": str(folder),
        "root": str(folder.parent.parent),
        "session": "abcd1234",
        "run": "r1",
        "name": "dog",
        "spec": parse_spec(spec).to_json(),
        "spec_record": {"path": "train.yaml", "sha256": "0", "mtime_ns": 0},
        "base": "miniature",
        "models": None,
        "pictures": pictures,
        **changes,
    }


def _middle_of(path: Path) -> list[int]:
    """The square in the middle of a picture; of a broken one none."""
    try:
        with Image.open(path) as image:
            return list(square_window(image.size, []))
    except OSError:
        return []
