"""Where the subject is: wishes, grounded boxes, faces, what stands out; and the figures of health."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from benchmarks.crop import judged
from benchmarks.scenes import scenes
from handlers.crop.faces import Face, distinct, overlap
from handlers.crop.grounded import Entity, boxes_of_words, entities_of, main_boxes
from handlers.crop.health import health
from handlers.crop.saliency import content_box, salient_box
from handlers.crop.subject import Clues, Finders, find_subject
from handlers.crop.window import held_by_square, square_window
from handlers.crop.wish import Wish
from sessions.refusal import Refusal
from tests import pictures

DOG = Entity("a brown dog", (0.1, 0.3, 0.3, 0.8))
MAN = Entity("a man in a hat", (0.6, 0.1, 0.95, 1.0))
FIELD = Entity("a grassy field", (0.0, 0.4, 1.0, 1.0))
ALL = Entity("a photo", (0.0, 0.0, 1.0, 1.0))


@cache
def finders() -> Finders:
    return Finders()


@cache
def astronaut() -> Image.Image:
    with Image.open(pictures.photograph("astronaut.png")) as image:
        return image.convert("RGB")


def test_words_of_the_session_choose_among_the_boxes() -> None:
    entities = [MAN, DOG, FIELD, ALL]
    assert boxes_of_words(entities, ["dog"]) == [DOG.box]
    assert boxes_of_words(entities, ["Dogs"]) == [DOG.box]
    assert boxes_of_words(entities, ["brown dog"]) == [DOG.box]
    assert boxes_of_words(entities, ["do", "hot dog", ""]) == []
    assert boxes_of_words(entities, ["photo"]) == []  # nearly the whole picture says nothing


@pytest.mark.parametrize(
    ("word", "phrase"),
    [
        ("horse", "two horses"),
        ("leaf", "red leaves"),
        ("child", "children playing"),
        ("puppy", "three puppies"),
        ("box", "boxes"),
    ],
)
def test_plurals(word: str, phrase: str) -> None:
    assert boxes_of_words([Entity(phrase, DOG.box)], [word])


def test_the_caption_is_about_what_it_names_first_and_not_about_the_ground() -> None:
    assert main_boxes([DOG, FIELD, ALL]) == [DOG.box]
    assert main_boxes([FIELD, DOG]) == [DOG.box]
    assert main_boxes([FIELD, ALL]) == []
    second = Entity("a dog", (0.5, 0.3, 0.8, 0.9))
    assert main_boxes([DOG, second, FIELD]) == [second.box, DOG.box]


NUMBERS = st.floats() | st.integers() | st.text(max_size=3)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.fixed_dictionaries({"phrase": st.text(max_size=9), "box": st.lists(NUMBERS, max_size=5)}), max_size=3)
)
def test_entities_of_anything(values: list[Any]) -> None:
    for entity in entities_of([*values, None, 5, {"phrase": "a dog", "box": [0, 0, 1, 1]}]):
        assert 0 <= entity.box[0] < entity.box[2] <= 1
        assert 0 <= entity.box[1] < entity.box[3] <= 1


def subject(image: Image.Image, *, entities: Any = (), words: Any = (), **wish: Any) -> Any:
    return find_subject(image, finders(), Clues(entities, words, Wish.of(wish)))


def test_the_order_of_trust() -> None:
    picture = astronaut()
    shuttle = Entity("a space shuttle", (0.68, 0.0, 0.95, 0.55))
    woman = Entity("a woman", (0.0, 0.0, 0.75, 1.0))
    assert subject(picture).finding == "face"
    assert subject(picture, entities=[shuttle, woman]).finding == "face"
    # the thing that the session is about, if it is no person
    assert subject(picture, entities=[shuttle, woman], words=["shuttle"]).boxes == (shuttle.box,)
    assert subject(picture, entities=[shuttle, woman], words=["woman"]).finding == "face"
    # a person's word
    assert subject(picture, entities=[shuttle, woman], subject="shuttle").boxes == (shuttle.box,)
    missing = subject(picture, entities=[woman], subject="shuttle")
    assert missing.finding == "face"
    assert "shuttle" in missing.warning
    assert subject(picture, subject="centre").finding == "centre"
    assert subject(picture, subject="segment").finding == "saliency"
    assert subject(picture, entities=[shuttle, woman], exclude=["woman"]).boxes == (shuttle.box,)
    assert subject(picture, exclude=["faces"]).finding == "saliency"
    with Image.open(pictures.photograph("coffee.png")) as coffee:
        cup = Entity("a cup of coffee", (0.3, 0.05, 0.7, 0.55))
        assert subject(coffee.convert("RGB"), entities=[cup]).boxes == (cup.box,)
        none = subject(coffee.convert("RGB"), subject="faces")
    assert none.finding == "saliency"
    assert "face" in none.warning


def test_scenes_with_a_known_subject() -> None:
    """A small sample of what ``benchmarks/crop.py`` measures: most subjects are whole, and more than by luck."""
    found = {"ours": 0, "centre": 0}
    for scene in scenes(16, seed=5):
        found["ours"] += judged(scene, square_window(scene.image.size, find_subject(scene.image, finders()).boxes))[0]
        found["centre"] += judged(scene, square_window(scene.image.size, []))[0]
    assert found["ours"] >= 14
    assert found["ours"] > found["centre"]


def test_bars_of_a_film_or_a_screenshot_are_no_border() -> None:
    scene = pictures.scene((600, 300), (0.2, 0.5), radius=0.25)
    framed = Image.new("RGB", (600, 500))
    framed.paste(scene, (0, 100))
    x0, y0, x1, y1 = content_box(framed)
    assert (x0, x1) == (0, 600)
    assert abs(y0 - 100) <= 12
    assert abs(y1 - 400) <= 12
    box = salient_box(framed)
    assert box is not None
    assert abs((box[0] + box[2]) / 2 - 0.2) < 0.05
    # an even ground that a subject grows into stays
    assert content_box(pictures.scene((600, 300))) == (0, 0, 600, 300)


def test_one_face_found_twice_counts_once() -> None:
    faces = [
        Face((0.1, 0.1, 0.3, 0.3), 0.8, 30),
        Face((0.11, 0.1, 0.3, 0.31), 0.9, 60),
        Face((0.6, 0.1, 0.8, 0.3), 0.7, 30),
    ]
    assert distinct(faces) == [faces[1], faces[2]]
    assert overlap(faces[0].box, faces[2].box) == 0


SIZES = st.tuples(st.integers(64, 5000), st.integers(64, 5000))


@given(SIZES, st.tuples(st.floats(0, 0.99), st.floats(0, 0.99), st.floats(0.005, 1), st.floats(0.005, 1)))
def test_a_fixed_box_is_held_by_a_square_inside_the_picture(
    size: tuple[int, int], shares: tuple[float, float, float, float]
) -> None:
    x0, y0 = int(shares[0] * (size[0] - 1)), int(shares[1] * (size[1] - 1))
    box = (x0, y0, min(size[0], x0 + 1 + int(shares[2] * size[0])), min(size[1], y0 + 1 + int(shares[3] * size[1])))
    left, top, right, bottom = held_by_square(size, box)
    assert 0 <= left < right <= size[0]
    assert 0 <= top < bottom <= size[1]
    assert right - left == bottom - top
    if max(box[2] - box[0], box[3] - box[1]) <= min(size):
        assert left <= box[0] < box[2] <= right
        assert top <= box[1] < box[3] <= bottom
    if box[2] - box[0] == box[3] - box[1]:
        assert (left, top, right, bottom) == box


@pytest.mark.parametrize(
    ("wish", "window"),
    [
        ({"box": [100, 50, 300, 250]}, (100, 50, 300, 250)),
        ({"box": [100, 50, 300, 150], "unit": "pixels"}, (100, 0, 300, 200)),
        ({"box": [0.25, 0.0, 0.5, 0.5], "unit": "share"}, (150, 0, 300, 150)),
        ({"subject": "dog"}, None),
        (None, None),
    ],
)
def test_wishes(wish: Any, window: Any) -> None:
    assert Wish.of(wish).window((600, 300)) == window


@pytest.mark.parametrize(
    "wish",
    [
        {"box": [1, 2, 3]},
        {"box": "left"},
        {"box": [5, 5, 5, 9]},
        {"box": [0, 0, float("nan"), 9]},
        {"box": [-1, 0, 100, 100]},
        {"box": [0, 0, 1.5, 1], "unit": "share"},
        {"box": [0, 0, 100, 100], "unit": "inches"},
        {"box": [500, 0, 700, 200]},
        {"box": [0, 0, 20, 20]},
        {"subject": 5},
        {"exclude": "dog"},
        ["dog"],
    ],
)
def test_wishes_that_are_none_are_refused_plainly(wish: Any) -> None:
    with pytest.raises(Refusal) as caught:
        Wish.of(wish).window((600, 300))
    assert caught.value.code == "wish"
    assert "crop.txt" in caught.value.advice


def test_health_tells_sharp_from_blurred_and_dark_from_bright() -> None:
    sharp = astronaut()
    whole = health(sharp, sharp.size)
    blurred = health(sharp.filter(ImageFilter.GaussianBlur(6)), sharp.size)
    assert whole["sharpness"] > 2 * blurred["sharpness"]
    assert whole["shorter_side"] == 512
    black, white = (health(Image.new("RGB", (300, 200), (v, v, v)), (300, 200))["exposure"] for v in (0, 255))
    assert black == {"mean": 0.0, "dark": 1.0, "bright": 0.0}
    assert white == {"mean": 1.0, "dark": 0.0, "bright": 1.0}


@pytest.mark.parametrize("scale", [0.6, 2.0])
def test_health_does_not_depend_on_the_scale_of_decoding(scale: float) -> None:
    picture = astronaut()
    other = picture.resize((round(512 * scale), round(512 * scale)), Image.Resampling.LANCZOS)
    one, two = health(picture, (512, 512)), health(other, (512, 512))
    assert abs(one["exposure"]["mean"] - two["exposure"]["mean"]) < 0.01
    assert abs(one["sharpness"] / two["sharpness"] - 1) < 0.35
    assert distance(one["dhash"], two["dhash"]) <= 2


def distance(one: str, two: str) -> int:
    assert len(one) == len(two) == 16
    return (int(one, 16) ^ int(two, 16)).bit_count()


def test_copies_are_alike_and_others_are_not(tmp_path: Path) -> None:
    picture = astronaut()
    copy = tmp_path / "copy.jpg"
    picture.save(copy, quality=60)
    with Image.open(copy) as image:
        near = health(image.convert("RGB"), picture.size)["dhash"]
    with Image.open(pictures.photograph("chelsea.png")) as image:
        far = health(image.convert("RGB"), image.size)["dhash"]
    own = health(picture, picture.size)["dhash"]
    assert distance(own, near) <= 3
    assert distance(own, far) >= 16
    assert np.frombuffer(bytes.fromhex(own), np.uint8).size == 8
