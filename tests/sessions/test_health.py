"""What is said of a set of pictures."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sessions.health import review


def picture(name: str, number: int = 0, **health: Any) -> dict[str, Any]:
    """A healthy picture; by default its hash differs in half of the bits from every other number's."""
    value = {
        "sharpness": 40.0,
        "exposure": {"mean": 0.5, "dark": 0.05, "bright": 0.05},
        "dhash": f"{hash_of(number):016x}",
        "shorter_side": 1024,
        **health,
    }
    return {"source": name, "sha256": f"sha of {name}", "picture": [1600, 1024], "health": value}


def hash_of(number: int) -> int:
    """Rows of a Hadamard matrix: any two differ in 32 of 64 bits."""
    return sum(((number & bit).bit_count() & 1) << bit for bit in range(64))


def pictures(count: int) -> list[dict[str, Any]]:
    return [picture(f"{number}.jpg", number) for number in range(count)]


def test_nothing_is_said_of_a_good_set_and_of_none() -> None:
    assert review(pictures(12)) == []
    assert review([]) == []


def test_few_pictures() -> None:
    assert review(pictures(4))[0].startswith("Only 4 pictures: ten to twenty")
    assert review(pictures(1))[0].startswith("Only one picture")


def test_copies_are_named_and_count_once() -> None:
    copies = [{**picture("copy (1).jpg"), "sha256": "sha of 1.jpg"}, {**picture("b/1.jpg"), "sha256": "sha of 1.jpg"}]
    lines = review([*pictures(5), *copies])
    assert lines == ["The same file more than once: 1.jpg = b/1.jpg = copy (1).jpg. One of each is enough."]
    assert review([*pictures(4), *copies])[0].startswith("Only 4 pictures")


@pytest.mark.parametrize(("bits", "near"), [(0, True), (6, True), (7, False)])
def test_pictures_that_look_the_same_are_named(bits: int, near: bool) -> None:
    like = f"{hash_of(3) ^ ((1 << bits) - 1):016x}"
    lines = review([*pictures(6), picture("burst.jpg", dhash=like)])
    said = ["Nearly the same picture: 3.jpg = burst.jpg. Other poses, places and light teach more."]
    assert lines == (said if near else [])


def test_near_pictures_are_found_wherever_their_bits_differ() -> None:
    for start in range(59):
        like = f"{hash_of(3) ^ (0b111111 << start):016x}"
        assert len(review([*pictures(6), picture("burst.jpg", dhash=like)])) == 1


def test_a_set_of_the_same_is_too_similar() -> None:
    burst = [picture(f"burst {number}.jpg", dhash=f"{hash_of(1) ^ number:016x}") for number in range(8)]
    lines = review([*burst, *pictures(1), picture("z.jpg", 5)])
    assert lines[0] == "The pictures are too similar: of 10, only 3 differ clearly."
    assert "burst 3.jpg and 4 more" in lines[1]


@pytest.mark.parametrize(
    ("health", "what"),
    [
        ({"sharpness": 4.0}, "Blurred"),
        ({"sharpness": 9.0}, "Blurred"),
        ({"exposure": {"mean": 0.05, "dark": 0.2, "bright": 0.0}}, "Too dark"),
        ({"exposure": {"mean": 0.98, "dark": 0.0, "bright": 0.95}}, "Too bright"),
        ({"shorter_side": 300}, "Smaller than 512 pixels"),
    ],
)
def test_what_is_wrong_with_a_picture(health: dict[str, Any], what: str) -> None:
    (line,) = review([*pictures(6), picture("odd.jpg", 9, **health)])
    assert line.startswith(f"{what}: odd.jpg. ")


@pytest.mark.parametrize(("resolution", "small"), [(1024, True), (1000, False), (64, False)])
def test_small_is_below_what_the_set_trains_at(resolution: int, small: bool) -> None:
    lines = review([*pictures(6), picture("odd.jpg", 9, shorter_side=1000)], resolution)
    told = f"Smaller than {resolution} pixels: odd.jpg. A larger version would train better."
    assert lines == [told] * small


@pytest.mark.parametrize(
    "health",
    [
        {"sharpness": 11.0},
        {"exposure": {"mean": 0.1, "dark": 0.5, "bright": 0.1}},
        {"exposure": {"mean": 0.93, "dark": 0.0, "bright": 0.85}},
        {"shorter_side": 512},
    ],
)
def test_what_is_no_reason_to_complain(health: dict[str, Any]) -> None:
    assert review([*pictures(6), picture("odd.jpg", 9, **health)]) == []


def test_a_soft_set_is_no_set_of_blurred_pictures() -> None:
    assert review([picture(f"{number}.jpg", number, sharpness=6.0) for number in range(8)]) == []


def test_many_names_are_capped() -> None:
    (line,) = review([picture(f"{number:02}.jpg", number, sharpness=0.0) for number in range(30)])
    assert line == "Blurred: 00.jpg, 01.jpg, 02.jpg, 03.jpg and 26 more. A blurred picture teaches blur."
    doubles = [{**picture(f"{number:02}.jpg", number % 10), "sha256": f"{number % 10}"} for number in range(20)]
    (line,) = review(doubles)
    assert line.endswith("02.jpg = 12.jpg; and 7 more. One of each is enough.")


def test_records_of_older_versions_are_no_trouble() -> None:
    old = [{"source": f"{number}.jpg", "sha256": f"{number}", "picture": [800, 600]} for number in range(6)]
    assert review(old) == []
    assert review([*old, {"source": "x.jpg"}, {"source": "y.jpg", "health": None, "picture": []}]) == []


_health = st.dictionaries(
    st.sampled_from(["sharpness", "exposure", "dhash", "shorter_side"]),
    st.one_of(st.none(), st.floats(), st.text(max_size=20), st.integers(), st.just({"mean": "x"}), st.booleans()),
)


@given(st.lists(st.tuples(st.text(max_size=5), _health), max_size=12))
def test_records_of_any_kind_can_be_reviewed(found: list[tuple[str, dict[str, Any]]]) -> None:
    lines = review([{"source": name, "sha256": name, "health": health} for name, health in found])
    assert len(lines) <= 7


def test_shapes_on_an_even_ground_are_not_taken_for_each_other() -> None:
    plain = [picture(f"{number}.jpg", dhash=f"{0b1111 << (8 * number):016x}") for number in range(6)]
    assert review(plain) == []
    assert "Nearly the same" in review([*plain, picture("copy.jpg", dhash=f"{0b1111:016x}")])[0]
    assert review([picture(f"{number}.jpg", dhash=f"{0:016x}") for number in range(6)]) == [], "it says nothing"
