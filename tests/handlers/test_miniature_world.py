"""The miniatures' world and the judge of what they draw: truth that is known, told again from the pixels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from handlers.models.miniature import judge, world
from tools.miniature import pool, prompts

FRESH = 2_000_003


def scene(seed: int, things: int = 1, **options: tuple[str, ...]) -> world.Scene:
    return world.random_scene(np.random.default_rng((FRESH, seed)), things, **options)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), things=st.integers(1, 4))
def test_boxes_hold_the_drawn_pixels_and_nothing_less(seed: int, things: int) -> None:
    drawn = world.draw(scene(seed, things, textures=("plain",)))
    assert len(drawn.boxes) == things
    pixels = np.asarray(drawn.image, dtype=float)
    different = np.abs(pixels - np.array(drawn.scene.rgb)).sum(2) > 0
    covered = np.zeros_like(different)
    for x0, y0, x1, y1 in drawn.boxes:
        assert 0 <= x0 < x1 <= 1
        assert 0 <= y0 < y1 <= 1
        covered[int(y0 * 64) : int(np.ceil(y1 * 64)), int(x0 * 64) : int(np.ceil(x1 * 64))] = True
    assert not (different & ~covered).any()
    for x0, y0, x1, y1 in drawn.boxes:
        inside = different[int(y0 * 64) : int(np.ceil(y1 * 64)), int(x0 * 64) : int(np.ceil(x1 * 64))]
        assert inside.any(0).mean() > 0.85
        assert inside.any(1).mean() > 0.85


def test_the_same_seed_gives_the_same_picture_and_another_another() -> None:
    first, again, other = (pool.drawn(4, seed, most_things=4).pixels for seed in (5, 5, 6))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@given(seed=st.integers(0, 2**32))
def test_outlines_without_a_name_fill_the_unit_circle_and_no_more(seed: int) -> None:
    radii = np.linalg.norm(world.random_outline(np.random.default_rng(seed)), axis=1)
    assert radii.max() == pytest.approx(1)
    assert radii.min() > 0.03


def test_pictures_for_training_may_show_things_of_no_name_but_never_a_star() -> None:
    drawn = pool.drawn(60, 9, most_things=2, nameless=0.5)
    nameless = [scene for scene in drawn.scenes if scene.things[0].outline]
    assert 15 <= len(nameless) <= 45
    assert all(thing.outline and thing.shape not in world.SHAPES for scene in nameless for thing in scene.things)
    shapes = (*world.SHAPES, *world.UNSEEN_SHAPES)
    for index in range(40):
        outline = pool.unseen_outline(np.random.default_rng(index))
        thing = world.Thing("shape", "white", "large", (0.5, 0.5), 0.32, 0.0, (255, 255, 255), outline)
        scene_of_it = world.Scene((thing,), "black", "plain", (0, 0, 0), 0.0)
        assert judge.look(world.draw(scene_of_it).image, shapes).shape not in world.UNSEEN_SHAPES


def test_captions_tell_the_whole_truth() -> None:
    left = world.Thing("circle", "orange", "small", (0.2, 0.5), 0.15, 0.0, (0, 0, 0))
    right = world.Thing("heart", "blue", "medium", (0.8, 0.5), 0.2, 0.0, (0, 0, 0))
    two = world.Scene((left, right), "yellow", "striped", (0, 0, 0), 0.0)
    assert world.caption(two) == "An image of a small orange circle and a blue heart on a striped yellow background."


@given(seed=st.integers(0, 2**32))
def test_a_prompt_says_nothing_untrue(seed: int) -> None:
    one = scene(seed)
    thing = one.things[0]
    truth = (thing.shape, thing.colour, thing.size, thing.place, one.background, one.texture)
    said = prompts.answers(world.prompt(one, np.random.default_rng(seed)))
    for (question, known), answer, true in zip(prompts.QUESTIONS.items(), said, truth, strict=True):
        # "shape" is true of everything.
        assert answer == 0 or known[answer - 1] in {true, "shape"}, question


def test_the_judge_is_right_on_pictures_whose_truth_is_known() -> None:
    shapes = colours = backgrounds = 0
    count = 300
    for seed in range(count):
        one = scene(seed, textures=("plain",))
        seen = judge.look(world.draw(one).image)
        shapes += seen.shape == one.things[0].shape
        colours += seen.colour == one.things[0].colour
        backgrounds += seen.background == one.background
    assert shapes >= 0.99 * count
    assert colours >= 0.99 * count
    assert backgrounds >= 0.99 * count


def test_the_judge_tells_a_star_from_what_the_miniatures_know() -> None:
    everything = (*world.SHAPES, *world.UNSEEN_SHAPES)
    stars = [
        judge.look(world.draw(scene(seed, shapes=("star",), textures=("plain",))).image, everything)
        for seed in range(60)
    ]
    assert sum(seen.shape == "star" for seen in stars) >= 59


def test_the_judge_sees_nothing_in_an_empty_picture() -> None:
    empty = world.draw(world.Scene((), "blue", "plain", (40, 70, 210), 0.0)).image
    assert judge.look(empty) == judge.Seen(None, None, "blue", 0.0)


def test_the_judge_sees_a_faint_thing_among_bright_specks() -> None:
    """Half-learned pictures are like that."""
    image = Image.new("RGB", (64, 64), (0, 0, 0))
    image.paste((0, 128, 0), (20, 20, 44, 44))
    for number in range(16):
        image.paste((0, 224, 0), (4 * number, 4, 4 * number + 2, 6))
    seen = judge.look(image)
    assert (seen.shape, seen.colour) == ("square", "green")


@pytest.mark.parametrize(
    ("one", "other", "overlap"),
    [
        ((0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 1.0, 1.0), 1.0),
        ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0), 0.0),
        ((0.0, 0.0, 0.5, 1.0), (0.25, 0.0, 0.75, 1.0), 1 / 3),
    ],
)
def test_box_overlap(one: judge.Box, other: judge.Box, overlap: float) -> None:
    assert judge.box_overlap(one, other) == pytest.approx(overlap)
