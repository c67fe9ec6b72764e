"""crop.txt: what people write on a phone, and what is told of lines that cannot be used."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sessions.wishes import PictureWish, Wishes, parse_wishes


def only(text: str) -> Wishes:
    wishes, problem = parse_wishes(text)
    assert problem is None
    return wishes


def test_every_kind_of_line() -> None:
    wishes = only(
        "# what I want\n"
        "Subject: Dog   # the brown one\n"
        "exclude: logo, Water mark\n"
        "\n"
        "IMG_1.jpg: 120 40 900 820\n"
        "IMG_2.jpg : 10% 5% 80% 90%\n"
        "IMG_3.jpg: center\n"
        "IMG_4.jpg: faces\n"
        "IMG_5.jpg: auto\n"
        "IMG_6.jpg: red car\n"
    )
    assert wishes.of("IMG_1.jpg") == {"box": [120, 40, 900, 820], "unit": "pixels"}
    assert wishes.of("IMG_2.jpg") == {"box": [0.1, 0.05, 0.8, 0.9], "unit": "share"}
    assert wishes.of("IMG_3.jpg") == {"subject": "centre"}
    assert wishes.of("IMG_4.jpg") == {"subject": "faces", "exclude": ["logo", "water mark"]}
    assert wishes.of("IMG_5.jpg") == {"exclude": ["logo", "water mark"]}
    assert wishes.of("IMG_6.jpg") == {"subject": "red car", "exclude": ["logo", "water mark"]}
    assert wishes.of("else.jpg") == {"subject": "dog", "exclude": ["logo", "water mark"]}


@pytest.mark.parametrize(
    "written", ["IMG_1.jpg", "img_1.JPG", "IMG_1", "instance_images/IMG_1.jpg", '"IMG_1.jpg"', " IMG_1.jpg "]
)
def test_a_picture_is_known_by_every_name_that_people_give_it(written: str) -> None:
    assert only(f"{written}: centre").of("instance_images/IMG_1.jpg") == {"subject": "centre"}


def test_the_fullest_name_wins() -> None:
    wishes = only("IMG_1: centre\nIMG_1.png: faces\ndeep/IMG_1.png: dog\n")
    subjects = [wishes.of(name)["subject"] for name in ("IMG_1.jpg", "IMG_1.png", "deep/IMG_1.png")]
    assert subjects == ["centre", "faces", "dog"]


def test_composed_and_decomposed_names_are_the_same() -> None:
    assert only("Ka\u0308fer.jpg: centre").of("K\u00e4fer.jpg") == {"subject": "centre"}


@pytest.mark.parametrize("value", ["1,2,3,4", "1, 2, 3, 4", "1 2 3 4", "1;2;3;4", " 1   2\t3 4 "])
def test_the_numbers_of_a_box_may_be_set_apart_as_one_likes(value: str) -> None:
    assert only(f"x.jpg: {value}").pictures["x.jpg"] == PictureWish((1, 2, 3, 4))


@pytest.mark.parametrize(
    ("text", "line", "what", "advice"),
    [
        ("\nIMG_1.jpg 1 2 3 4", 2, "There is no colon", "`IMG_1.jpg: 1 2 3 4`"),
        ("just words", 1, "There is no colon", "`subject: dog`"),
        ("IMG_1.jpg:", 1, "says nothing", "remove the line"),
        ("subjct: dog", 1, "There is no key `subjct`", "`subject`"),
        ("excludes: dog", 1, "There is no key `excludes`", "`exclude`"),
        ("IMG_1.jpg: 1 2 3", 1, "`1 2 3` is no box", "four numbers"),
        ("IMG_1.jpg: 1 2 3 4 5", 1, "is no box", "four numbers"),
        ("IMG_1.jpg: -1 2 3 4", 1, "is no box", "four numbers"),
        ("IMG_1.jpg: 1 2% 3 4", 1, "mixes pixels and percent", "all four with %"),
        ("IMG_1.jpg: 1% 2% 3% 101%", 1, "beyond 100 %", "0% to 100%"),
        ("IMG_1.jpg: 9 2 3 4", 1, "empty box", "right is more than left"),
        ("IMG_1.jpg: 1 4 3 4", 1, "empty box", "in this order"),
        ("subject: 1 2 3 4", 1, "belongs to one picture", "`IMG_1.jpg: 1 2 3 4`"),
        ("subject: dog\nsubject: cat", 2, "twice (first in line 1)", "Keep one"),
        ("a.jpg: dog\nA.JPG: cat", 2, "twice (first in line 1)", "Keep one"),
        ("a.jpg: ???", 1, "no word for a thing", "a noun"),
        (f"a.jpg: {'x' * 61}", 1, "no word for a thing", "a noun"),
    ],
)
def test_what_is_wrong_is_told_with_line_reason_and_fix(text: str, line: int, what: str, advice: str) -> None:
    _, problem = parse_wishes(text)
    assert problem is not None
    assert problem.line == line
    assert what in problem.what
    assert advice in problem.advice


def test_a_bad_line_costs_only_itself() -> None:
    wishes, problem = parse_wishes("a.jpg: 1\nb.jpg: centre\nc.jpg: 2\n")
    assert list(wishes.pictures) == ["b.jpg"]
    assert problem is not None
    assert problem.advice.endswith("The other lines count. (Look at line 3 as well.)")


def test_names_that_no_picture_has_are_known() -> None:
    wishes = only("IMG_1: centre\nImg_9.jpg: faces\n")
    assert wishes.unmatched(["instance_images/img_1.jpg"]) == ["Img_9.jpg"]


@given(st.text(max_size=200))
def test_any_text_can_be_read(text: str) -> None:
    wishes, problem = parse_wishes(text)
    assert problem is None or problem.line is not None
    for name in wishes.pictures:
        wishes.of(name)
    parse_wishes(f"a.jpg: {text}\nsubject: {text}")
