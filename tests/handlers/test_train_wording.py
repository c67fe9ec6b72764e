"""Which words a picture is trained with."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from handlers.train.wording import Wording, wording

PROMPTS = ["zwx star, red, on blue", "zwx star, green, on pink", "a circle, small, on white", "a ring, on black"]


def words_of(*, dropout: float = 0.0, class_dropout: float = 0.0, shuffle: bool = False, seed: int = 7) -> Wording:
    return wording(PROMPTS, 2, 2, dropout=dropout, class_dropout=class_dropout, shuffle=shuffle, seed=seed)


def said(words: Wording, steps: int, picture: int) -> Counter[str]:
    return Counter(words.texts[words.of(2, step, [picture])[0]] for step in range(steps))


def test_every_picture_is_told_its_prompt_where_nothing_is_left_out() -> None:
    words = words_of()
    assert list(words.texts) == PROMPTS
    assert all(words.of(2, step, [3, 0, 1, 2]) == [3, 0, 1, 2] for step in range(20))


def test_class_pictures_have_no_words_as_often_as_asked_and_the_subjects_keep_theirs() -> None:
    words = words_of(class_dropout=0.35)
    for picture in (0, 1):
        assert said(words, 400, picture) == {PROMPTS[picture]: 400}
    for picture in (2, 3):
        counts = said(words, 2000, picture)
        assert set(counts) == {"", PROMPTS[picture]}
        assert abs(counts[""] / 2000 - 0.35) < 4 * (0.35 * 0.65 / 2000) ** 0.5


def test_the_subjects_have_no_words_as_often_as_asked_and_class_pictures_keep_theirs() -> None:
    words = words_of(dropout=0.2)
    assert said(words, 400, 2) == {PROMPTS[2]: 400}
    assert abs(said(words, 2000, 0)[""] / 2000 - 0.2) < 4 * (0.2 * 0.8 / 2000) ** 0.5


def test_parts_change_places_behind_the_first_and_class_pictures_keep_their_order() -> None:
    words = words_of(shuffle=True)
    assert set(said(words, 200, 0)) == {PROMPTS[0], "zwx star, on blue, red"}
    assert set(said(words, 200, 2)) == {PROMPTS[2]}


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 2),
    st.integers(0, 100_000),
    st.lists(st.integers(0, 3), min_size=1, max_size=6),
)
def test_what_is_said_depends_on_the_step_and_the_picture_alone(
    seed: int, stage: int, step: int, pictures: list[int]
) -> None:
    words = words_of(dropout=0.5, class_dropout=0.5, shuffle=True, seed=seed)
    together = words.of(stage, step, pictures)
    again = words_of(dropout=0.5, class_dropout=0.5, shuffle=True, seed=seed)
    assert together == [again.of(stage, step, [picture])[0] for picture in pictures]
