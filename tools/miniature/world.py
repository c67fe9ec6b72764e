"""Write pictures of the miniatures' world: ``python -m tools.miniature.world DIR --count 5 --shape star --truth``.

The generator itself is ``handlers.models.miniature.world``: the demo needs it where this folder is not installed.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np

from handlers.models.miniature import world
from sessions import files


def main() -> None:
    """Write ``NAME (n).png`` and, with ``--truth``, a ``.json`` beside each."""
    everything = (*world.SHAPES, *world.UNSEEN_SHAPES)
    parser = argparse.ArgumentParser(description="Write pictures of the miniatures' world.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--things", type=int, default=1, choices=range(1, 5))
    parser.add_argument("--shape", choices=everything, help="only this one")
    parser.add_argument("--side", type=int, default=64, help="pixels")
    parser.add_argument("--name", default="zwx", help="of the files: the token to teach")
    parser.add_argument("--truth", action="store_true", help="write what is in them as well")
    options = parser.parse_args()
    shapes = (options.shape,) if options.shape else world.SHAPES
    for number in range(1, options.count + 1):
        rng = np.random.default_rng((options.seed, number))
        picture = world.draw(world.random_scene(rng, options.things, shapes), options.side)
        content = io.BytesIO()
        picture.image.save(content, "PNG")
        path = options.folder / f"{options.name} ({number}).png"
        files.write_bytes(path, content.getvalue())
        if options.truth:
            truth = {"caption": world.caption(picture.scene), "boxes": picture.boxes}
            files.write_json(path.with_suffix(".json"), truth)


if __name__ == "__main__":
    main()
