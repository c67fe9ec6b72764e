"""What Kosmos-2 says becomes a clean line and valid boxes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.kosmos2.processing_kosmos2 import coordinate_to_patch_index, patch_index_to_coordinate

from handlers.caption.boxes import GRID, Grounded, box_of, parse
from handlers.caption.clean import clean, place, without_repeats
from sessions.captions import one_line

SNOWMAN = (
    "<grounding> An image of<phrase> a snowman</phrase><object><patch_index_0044><patch_index_0863></object> warming "
    "himself by<phrase> a fire</phrase><object><patch_index_0005><patch_index_0911></object>."
)
CELLS = st.integers(0, GRID * GRID - 1)
PIECES = st.sampled_from(
    [
        "<phrase>",
        "</phrase>",
        "<object>",
        "</object>",
        "<patch_index_0044>",
        "<patch_index_0863>",
        "<patch_index_9999>",
        "</delimiter_of_multi_objects/>",
        "<grounding>",
        " a dog",
        " and ",
        "<b>",
        ",",
    ]
)


def test_the_example_of_the_model_card() -> None:
    said = parse(SNOWMAN)
    assert one_line(said.text) == "An image of a snowman warming himself by a fire."
    assert said.grounded == (
        Grounded("a snowman", ((0.390625, 0.046875, 0.984375, 0.828125),)),
        Grounded("a fire", ((0.171875, 0.015625, 0.484375, 0.890625),)),
    )
    assert said.dropped == 0
    caption = clean(said.text)
    assert caption == "a snowman warming himself by a fire"
    entities = place(said.grounded, caption)
    assert [caption[slice(*entity.span)] for entity in entities if entity.span] == ["a snowman", "a fire"]


@given(CELLS, CELLS)
def test_boxes_are_those_of_the_library_or_dropped(upper_left: int, lower_right: int) -> None:
    box = box_of(upper_left, lower_right)
    theirs = patch_index_to_coordinate(upper_left, lower_right, GRID)
    if box is None:
        assert theirs[0] >= theirs[2] or theirs[1] >= theirs[3]
    else:
        assert box == pytest.approx(theirs)
        assert 0 <= box[0] < box[2] <= 1
        assert 0 <= box[1] < box[3] <= 1
        assert coordinate_to_patch_index(box, GRID) == (upper_left, lower_right)


@pytest.mark.parametrize(
    ("raw", "grounded", "dropped"),
    [
        # inverted
        ("<phrase> a dog</phrase><object><patch_index_0863><patch_index_0044></object>", [], 1),
        # outside the grid
        ("<phrase> a dog</phrase><object><patch_index_0044><patch_index_1024></object>", [], 1),
        # half a pair, and nothing at all
        ("<phrase> a dog</phrase><object><patch_index_0044></object>", [], 1),
        ("<phrase> a dog</phrase><object></object>", [], 0),
        # several boxes, one of them inverted
        (
            (
                "<phrase> two dogs</phrase><object><patch_index_0000><patch_index_0033></delimiter_of_multi_objects/>"
                "<patch_index_0863><patch_index_0044></delimiter_of_multi_objects/><patch_index_0066><patch_index_0099></object>"
            ),
            [("two dogs", 2)],
            1,
        ),
        # never closed: the length limit struck
        ("<phrase> a dog</phrase><object><patch_index_0044><patch_index_0863>", [("a dog", 1)], 0),
        ("<phrase> a dog</phrase><object><patch_index_0044><patch_index_0863> in the snow", [("a dog", 1)], 0),
        ("<phrase> a dog", [], 0),
        # no phrase
        ("a dog<object><patch_index_0044><patch_index_0863></object>", [], 1),
        ("<phrase> a dog</phrase> runs<object><patch_index_0044><patch_index_0863></object>", [], 1),
    ],
)
def test_odd_output(raw: str, grounded: list[tuple[str, int]], dropped: int) -> None:
    said = parse(raw)
    assert [(item.phrase, len(item.boxes)) for item in said.grounded] == grounded
    assert said.dropped == dropped


def test_a_comma_stands_at_its_word() -> None:
    assert clean("An image of a red dog , a cat and 3 . 5 birds .") == "a red dog, a cat and 3. 5 birds"


def test_angle_brackets_that_are_no_tags_are_text() -> None:
    assert parse("<grounding> a sign that says <b>5 < 6</b>").text == " a sign that says <b>5 < 6</b>"


@given(st.lists(PIECES, max_size=25).map("".join))
def test_any_mixture_of_tags_gives_valid_boxes_and_clean_text(raw: str) -> None:
    said = parse(raw)
    assert "patch_index" not in said.text
    assert "phrase>" not in said.text
    for item in said.grounded:
        assert item.phrase.strip() == item.phrase != ""
        assert item.boxes
        assert all(0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1 for x0, y0, x1, y1 in item.boxes)
    caption = clean(said.text) or "a picture"
    for entity in place(said.grounded, caption):
        if entity.span:
            assert caption[slice(*entity.span)].casefold() == entity.phrase.casefold()


@pytest.mark.parametrize(
    ("text", "caption"),
    [
        (" An image of a dog.", "a dog"),
        ("An image of an image of a dog", "a dog"),
        ("A photo showing the dog, with a ball.", "the dog, with a ball"),
        ("This is a picture of a dog", "a dog"),
        ("Describe this image in detail: The image features a dog.", "a dog"),
        ("an imagery of dogs", "an imagery of dogs"),
        ("a painting of a dog", "a painting of a dog"),
        ("a dog, a dog, a dog.", "a dog"),
        ("a dog and a cat and a cat and a cat on grass", "a dog and a cat on grass"),
        ("A dog runs. A dog runs. A dog runs", "A dog runs"),
        ("no no no", "no"),
        ("a dog and a dog", "a dog and a dog"),
        ("a\n dog\t\u00a0sits \x07here", "a dog sits here"),
        ("Zwei Hunde im Schnee", "Zwei Hunde im Schnee"),
        ("An image of", None),
        ("An image of,,, .", None),
        (" , . - ! 5 7 x", None),
        ("", None),
    ],
)
def test_cleaning(text: str, caption: str | None) -> None:
    assert clean(text) == caption


@given(st.text())
def test_cleaning_ends_with_one_line_or_none_and_is_stable(text: str) -> None:
    caption = clean(text)
    if caption is not None:
        assert caption == one_line(caption) != ""


@given(st.lists(st.sampled_from(["a", "dog", "dog,", "cat.", "A", "the"]), max_size=30))
def test_no_repeat_is_left(words: list[str]) -> None:
    left = [word.strip(",.").casefold() for word in without_repeats(" ".join(words)).split()]
    for length in range(1, 6):
        for start in range(len(left) - 2 * length + 1):
            assert left[start : start + length] != left[start + length : start + 2 * length]
    assert set(left) == {word.strip(",.").casefold() for word in words}
