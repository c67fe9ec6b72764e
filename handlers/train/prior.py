"""Class pictures for prior preservation (Ruiz et al. 2023, "DreamBooth", section 3.3).

While a model learns a subject it also trains on pictures of the class that its base drew, so that it does not forget
what it could draw before. They lie in ``concept_images/``: people's own count, and what is missing is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

from PIL import Image

from handlers.context import Stopping
from handlers.train.dataset import Rendered, render_pictures, upright_size
from handlers.train.place import Place, folder_in
from handlers.train.plan import Plan, is_small_miniature
from handlers.train.prompts import class_prompt, with_article
from sessions import files
from sessions.layout import CONCEPT_IMAGES, is_picture_name
from sessions.refusal import Refusal

_BATCH = 8
_MINIATURE_BATCH = 32
# Of so many class pictures of a miniature one shows no thing, and one what it takes the class for: after a lesson the
# class alone then draws no subject. Not so for the small ones of SD 2 and SDXL: beside one in twelve, which was tried,
# their lesson no longer holds (in three of four, 52 to 75 % of stars for 80 to 88).
_WORLD_TURN = 6

Wanted = tuple[str, int]
"""A prompt and a seed."""


def class_pictures(
    place: Place,
    plan: Plan,
    draw: Callable[[Sequence[Wanted]], list[Image.Image]],
    progress: Callable[[int, int], None],
) -> Rendered:
    """The session's class pictures, ``plan.prior_images`` of them; missing ones are drawn first.

    Args:
        place: the session.
        plan: how many, of what class.
        draw: draws a picture for each prompt and seed with the base; gives none when it was stopped.
        progress: called with how many of how many are drawn or read; may raise to stop.

    Returns:
        The pictures with their entries of a run's inputs (``source``, absolute; ``sha256``; ``box``, the whole picture;
        ``prompt``; ``prior``, true), and what could not be read.

    Raises:
        Refusal: code ``spec``: there is no class to draw.
        Stopping: the drawing was stopped; what was finished stays and is not drawn again.
    """
    missing = plan.prior_images - len(_found(place.now()))
    names = list(islice(_free_names(place.now()), max(0, missing)))
    batch = batch_of(plan)
    for start in range(0, len(names), batch):
        progress(start, missing)
        part = names[start : start + batch]
        wanted = [(_prompt_of(plan, number), plan.seed + number) for number, _name in part]
        drawn = draw(wanted)
        if not drawn:
            raise Stopping
        for (_number, name), (prompt, _seed), image in zip(part, wanted, drawn, strict=True):
            place.write(partial(_write, name=name, prompt=prompt, image=image))
    entries: list[dict[str, Any]] = []
    left_out: list[dict[str, str]] = []
    for path in _found(place.now())[: plan.prior_images]:
        try:
            entries.append(_entry(path, plan))
        except (Refusal, OSError) as error:
            left_out.append({"source": str(path), "reason": error.what if isinstance(error, Refusal) else str(error)})
    rendered = render_pictures(entries, plan.resolution, lambda done: progress(done, len(entries)))
    return Rendered(rendered.images, rendered.pictures, [*left_out, *rendered.left_out])


def batch_of(plan: Plan) -> int:
    """How many class pictures are drawn at once; a miniature's fit by the dozen."""
    return _MINIATURE_BATCH if plan.miniature else _BATCH


def _found(session: Path) -> list[Path]:
    folder = session / CONCEPT_IMAGES
    return sorted(path for path in folder.glob("*") if is_picture_name(path.name)) if folder.is_dir() else []


def _free_names(session: Path) -> Iterator[tuple[int, str]]:
    """Numbers and names that no class picture has yet."""
    taken = {path.stem for path in _found(session)}
    return ((number, f"class-{number:04d}") for number in count(1) if f"class-{number:04d}" not in taken)


def _prompt_of(plan: Plan, number: int) -> str:
    if plan.miniature:
        return _prompt_of_the_world(plan, number)
    if not plan.class_:
        raise Refusal(
            "spec",
            f"prior.images is {plan.prior_images}, but there is no class to draw pictures of.",
            "Write the noun for your subject into train.yaml, like class: dog, or put class pictures into "
            f"{CONCEPT_IMAGES}.",
        )
    return class_prompt(plan.class_, plan.concept)


def _prompt_of_the_world(plan: Plan, number: int) -> str:
    """A miniature's class is its whole world: the shapes that it draws, no thing, and what it takes the noun for."""
    import numpy as np

    from handlers.models.miniature import world

    scene = world.random_scene(np.random.default_rng((plan.seed, number)), textures=("plain",))
    turn = None if is_small_miniature(plan.family, miniature=plan.miniature) else number % _WORLD_TURN
    if turn == 0:
        return world.background_phrase(scene)
    if turn == 1 and plan.class_:
        return f"{with_article(plan.class_)} on {world.background_phrase(scene)}"
    return world.full_prompt(scene)


def _write(session: Path, *, name: str, prompt: str, image: Image.Image) -> None:
    folder = folder_in(session, CONCEPT_IMAGES)
    files.write_text(folder / f"{name}.txt", f"{prompt}\n")
    # The picture last: it is the picture that counts as drawn.
    with files.atomic_path(folder / f"{name}.png") as temporary:
        image.save(temporary, format="PNG", compress_level=1)


def _entry(path: Path, plan: Plan) -> dict[str, Any]:
    size = upright_size(path)
    try:
        said = " ".join(path.with_suffix(".txt").read_text(encoding="utf-8-sig", errors="replace").split())
    except OSError:
        said = ""
    return {
        "source": str(path),
        "sha256": files.sha256_of(path),
        "box": [0, 0, *size],
        "prompt": said or class_prompt(plan.class_, plan.concept),
        "prior": True,
    }
