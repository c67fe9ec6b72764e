"""The window: inside, exactly square, and around as many subjects as any window can hold."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers.crop.faces import head_of, main_heads
from handlers.crop.window import Box, PixelBox, square_window, whole_picture

SIZES = st.tuples(st.integers(64, 6000), st.integers(64, 6000))


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    x = sorted(draw(st.tuples(st.floats(0, 1), st.floats(0, 1))))
    y = sorted(draw(st.tuples(st.floats(0, 1), st.floats(0, 1))))
    return (x[0], y[0], x[1], y[1])


def inside(window: PixelBox, size: tuple[int, int], box: Box, share: float = 0.95) -> bool:
    """Whether so much of the box's width and height is in the window."""
    x0, y0, x1, y1 = box[0] * size[0], box[1] * size[1], box[2] * size[0], box[3] * size[1]
    wide = min(x1, window[2]) - max(x0, window[0])
    high = min(y1, window[3]) - max(y0, window[1])
    return wide >= share * (x1 - x0) - 1 and high >= share * (y1 - y0) - 1


@given(SIZES, st.lists(boxes(), max_size=6))
def test_inside_and_exactly_square(size: tuple[int, int], subjects: list[Box]) -> None:
    x0, y0, x1, y1 = square_window(size, subjects)
    assert 0 <= x0 < x1 <= size[0]
    assert 0 <= y0 < y1 <= size[1]
    assert x1 - x0 == y1 - y0 == min(size)


@given(SIZES, boxes())
def test_one_subject_is_whole_where_it_fits(size: tuple[int, int], box: Box) -> None:
    side = min(size)
    fits = (box[2] - box[0]) * size[0] <= side and (box[3] - box[1]) * size[1] <= side
    assert inside(square_window(size, [box]), size, box) or not fits


@given(SIZES, st.lists(boxes(), min_size=1, max_size=5))
def test_no_other_window_holds_more(size: tuple[int, int], subjects: list[Box]) -> None:
    side = min(size)
    fitting = [box for box in subjects if (box[2] - box[0]) * size[0] <= side and (box[3] - box[1]) * size[1] <= side]
    got = square_window(size, fitting)
    kept = sum(inside(got, size, box) for box in fitting)
    length = max(size)
    for step in range(21):
        start = (length - side) * step // 20
        other = (start, 0, start + side, side) if size[0] >= size[1] else (0, start, side, start + side)
        assert sum(inside(other, size, box, share=1.0) for box in fitting) <= kept


@given(SIZES, st.lists(boxes(), max_size=4), st.integers(2, 4))
def test_a_bigger_copy_gives_the_same_window(size: tuple[int, int], subjects: list[Box], times: int) -> None:
    small = square_window(size, subjects)
    big = square_window((size[0] * times, size[1] * times), subjects)
    tolerance = 0.02 * min(size) + 1
    assert all(abs(b / times - s) <= tolerance for s, b in zip(small, big, strict=True))


@given(SIZES, st.lists(boxes(), max_size=4))
def test_a_transposed_picture_gives_the_transposed_window(size: tuple[int, int], subjects: list[Box]) -> None:
    x0, y0, x1, y1 = square_window(size, subjects)
    turned = square_window((size[1], size[0]), [(b[1], b[0], b[3], b[2]) for b in subjects])
    assert turned == (y0, x0, y1, x1)


@pytest.mark.parametrize(
    ("size", "subjects", "window"),
    [
        ((600, 400), [], (100, 0, 500, 400)),
        ((400, 600), [], (0, 100, 400, 500)),
        # centred on the subject, as far as the picture goes
        ((600, 400), [(0.6, 0.1, 0.7, 0.3)], (190, 0, 590, 400)),
        ((600, 400), [(0.9, 0.1, 1.0, 0.3)], (200, 0, 600, 400)),
        ((400, 600), [(0.4, 0.0, 0.6, 0.1)], (0, 0, 400, 400)),
        # two of three can be held: the two, centred
        ((1000, 400), [(0.0, 0, 0.1, 0.5), (0.5, 0, 0.6, 0.5), (0.8, 0, 0.9, 0.5)], (500, 0, 900, 400)),
        # one of two: the wider
        ((1000, 400), [(0.0, 0, 0.1, 0.5), (0.8, 0, 1.0, 0.5)], (600, 0, 1000, 400)),
        # a panorama full of one thing
        ((1000, 100), [(0.0, 0.0, 1.0, 1.0)], (450, 0, 550, 100)),
    ],
)
def test_windows(size: tuple[int, int], subjects: list[Box], window: PixelBox) -> None:
    assert square_window(size, subjects) == window


def test_the_whole_picture() -> None:
    assert whole_picture((600, 400)) == (0, 0, 600, 400)


@given(boxes())
def test_a_head_holds_its_face_and_stays_inside(face: Box) -> None:
    head = head_of(face)
    assert head[0] <= face[0]
    assert head[1] <= face[1]
    assert head[2] >= face[2]
    assert head[3] >= face[3]
    assert all(0 <= value <= 1 for value in head)


def test_people_far_behind_do_not_count() -> None:
    near, also, far = (0.1, 0.1, 0.3, 0.5), (0.6, 0.1, 0.8, 0.3), (0.9, 0.1, 0.95, 0.2)
    assert main_heads([far, also, near]) == [near, also]
    assert main_heads([]) == []
