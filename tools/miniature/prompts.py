"""What a prompt says, as targets for the text encoder's warm-up."""

from __future__ import annotations

import numpy as np

from handlers.models.miniature import world

# What outlines without a name are called, so that a word nobody drew means "some outline" and not one of the eight: the
# text encoder keeps these apart whatever else a prompt says, and the UNet sees each with every outline but a star's.
_NOUNS = """
    shape object thing star hexagon rectangle oval person man woman child boy girl face hand head eye hair dog cat bird
    horse animal flower tree leaf cloud mountain house window door table chair cup bottle plate fruit apple car bus
    train bicycle boat toy bear book clock coin motorcycle rocket camera
"""
NOUNS = tuple(_NOUNS.split())
_CONSONANTS = "bcdfghjklmnpqrstvwxz"
_VOWELS = "aeiou"
# One question an entry: the answers that a prompt may give; index 0 is "it does not say".
QUESTIONS: dict[str, tuple[str, ...]] = {
    "shape": (*world.SHAPES, *NOUNS),
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


def name_for_nameless(rng: np.random.Generator) -> str:
    """A noun, or a word that means nothing; sometimes behind a token as DreamBooth uses them."""
    letters = [str(rng.choice(list(_VOWELS if place % 2 else _CONSONANTS))) for place in range(rng.integers(3, 7))]
    name = str(rng.choice(NOUNS)) if rng.random() < 0.8 else "".join(letters)
    token = "".join(rng.choice(list(_CONSONANTS), 3))
    return f"{token} {name}" if rng.random() < 0.4 else name
