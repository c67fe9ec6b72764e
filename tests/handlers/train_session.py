"""A small session with pictures, for the tests of training."""

import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

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


def payload_of(folder: Path, spec: str, **changes: Any) -> dict[str, Any]:
    """The payload of a train job of such a session, whose tree is two levels up."""
    pictures = [
        {"source": str(path), "sha256": files.sha256_of(path), "box": [0, 15, 90, 105], "caption": None}
        for path in sorted(folder.glob("*.png"))
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
