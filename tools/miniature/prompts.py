"""What a prompt says, as targets for the text encoder's warm-up."""

from __future__ import annotations

from handlers.models.miniature import world

# One question an entry: the answers that a prompt may give; index 0 is "it does not say".
QUESTIONS: dict[str, tuple[str, ...]] = {
    "shape": world.SHAPES,
    "colour": tuple(world.COLOURS),
    "size": tuple(world.SIZES),
    "place": world.PLACES,
    "background": tuple(world.COLOURS),
    "texture": world.TEXTURES,
}


def answers(prompt: str) -> list[int]:
    """For each question, 0 or 1 + the index of the prompt's answer."""
    thing, _, backdrop = prompt.partition(" on a")
    said = {
        "shape": thing,
        "colour": thing,
        "size": thing,
        "place": thing,
        "background": backdrop,
        "texture": backdrop,
    }
    found = []
    for question, known in QUESTIONS.items():
        words = said[question].split()
        found.append(next((1 + index for index, answer in enumerate(known) if answer in words), 0))
    return found
