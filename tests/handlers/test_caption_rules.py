"""What people want of the lines that train, and what the model can be asked."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers.caption.boxes import GRID, box_of, parse, without_tags
from handlers.caption.clean import Entity
from handlers.caption.prompts import BRIEF, DETAILED, Question, caption_prompt, cells_of, is_instruction
from handlers.caption.rules import Line, Rules, applied, named, placed, without
from handlers.train.prompts import training_prompt
from sessions.captions import one_line
from sessions.refusal import Refusal

TEXT = "a small dog with a red ball on the grass"
DOG = Entity("a small dog", (0, 11), (0.1, 0.1, 0.5, 0.5))
BALL = Entity("a red ball", (17, 27), (0.5, 0.5, 0.6, 0.6))
GRASS = Entity("the grass", (31, 40), (0.0, 0.4, 1.0, 1.0))
LINE = Line(TEXT, (DOG, BALL, GRASS))


def spoken(line: Line) -> list[str | None]:
    return [line.text[slice(*entity.span)] if entity.span else None for entity in line.entities]


@pytest.mark.parametrize(
    ("noun", "concept", "text", "phrases"),
    [
        ("dog", "object", "zwx dog with a red ball on the grass", ["zwx dog", "a red ball", "the grass"]),
        ("ball", "object", "a small dog with zwx ball on the grass", ["a small dog", "zwx ball", "the grass"]),
        # No class: the largest of all.
        ("", "object", "a small dog with a red ball on zwx", ["a small dog", "a red ball", "zwx"]),
        # Nothing of that class, and no person: in front.
        ("cat", "object", f"zwx cat, {TEXT}", ["a small dog", "a red ball", "the grass"]),
        ("", "face", f"zwx, {TEXT}", ["a small dog", "a red ball", "the grass"]),
        ("ink", "style", f"{TEXT}, in the style of zwx ink", ["a small dog", "a red ball", "the grass"]),
    ],
)
def test_the_token_takes_the_subjects_place_once(noun: str, concept: str, text: str, phrases: list[str]) -> None:
    subject = f"zwx {noun}".strip()
    line = named(LINE, subject, noun, concept)
    assert line.text == text
    assert spoken(line) == phrases
    assert line.text.count("zwx") == 1
    assert named(line, subject, noun, concept).text == text, "once"


def test_a_person_has_many_names() -> None:
    woman = Entity("a young woman", (0, 13), (0.2, 0.0, 0.8, 1.0))
    hat = Entity("a huge hat", (17, 27), (0.0, 0.0, 1.0, 1.0))
    line = Line("a young woman in a huge hat", (woman, hat))
    assert named(line, "zwx person", "person", "face").text == "zwx person in a huge hat"
    assert named(line, "zwx", "", "face").text == "zwx in a huge hat"
    assert named(line, "zwx man", "man", "object").text == "zwx man in a huge hat"


def test_words_are_left_out_whole_and_their_gaps_close() -> None:
    line = without(LINE, ["red", "SMALL", "gras", "on the grass"])
    assert line is not None
    assert line.text == "a dog with a ball"
    assert spoken(line) == [None, None, None], "phrases that are no longer in the line have no place in it"
    assert without(LINE, ["blue"]) == LINE
    assert without(Line("a dog", ()), ["a dog"]) is None


def test_everything_together() -> None:
    rules = Rules.of(
        {"prefix": "photo,", "suffix": ", 4k", "drop": ["red"], "instance": "zwx", "class": "dog", "blacklist": ["cat"]}
    )
    line = applied(TEXT, LINE.entities, rules)
    assert line is not None
    assert line.text == "photo, zwx dog with a ball on the grass, 4k"
    assert spoken(line) == ["zwx dog", None, "the grass"]
    assert len(line.edits) == 2
    assert rules.never == ("cat",)
    plain = applied(TEXT, LINE.entities, Rules.of({"suffix": "outside"}))
    assert plain is not None
    assert plain.text == f"{TEXT} outside"
    with pytest.raises(ValueError, match="concept"):
        Rules.of({"concept": "thing"})


@given(
    st.fixed_dictionaries(
        {
            "prefix": st.text(max_size=20),
            "suffix": st.text(max_size=20),
            "drop": st.lists(st.sampled_from(["red", "a", "dog", "", " ", "grass"]), max_size=3),
            "instance": st.sampled_from(["", "zwx", "zwx (1)"]),
            "class": st.sampled_from(["", "dog", "cat"]),
            "concept": st.sampled_from(["object", "face", "style"]),
        }
    )
)
def test_whatever_is_wanted_gives_one_line_with_spans_inside(asked: dict[str, Any]) -> None:
    instance = asked["instance"]
    line = applied(TEXT, LINE.entities, Rules.of(asked))
    assert line is not None
    assert one_line(line.text) == line.text != ""
    for entity in line.entities:
        if entity.span is not None:
            assert 0 <= entity.span[0] < entity.span[1] <= len(line.text)
            said = line.text[slice(*entity.span)]
            assert said.casefold() == entity.phrase.casefold() or instance in said
    if instance:
        assert instance in line.text


def test_training_puts_its_token_where_the_subject_is_named() -> None:
    entities = [entity.to_json() for entity in LINE.entities]
    caption = placed(TEXT, entities, "zwx dog", "dog", "object")
    assert caption == "zwx dog with a red ball on the grass"
    assert training_prompt("zwx", "dog", "object", "a.jpg", caption) == caption
    assert training_prompt("zwx", "dog", "object", "a.jpg", TEXT) == f"zwx dog, {TEXT}"
    # Spans of another line do not count, and a style is named by the training itself.
    assert placed("a cat", entities, "zwx dog", "dog", "object") == "a cat"
    assert placed(TEXT, entities, "zwx", "", "style") == TEXT
    assert placed(TEXT, [], "zwx dog", "dog", "object") == TEXT


def test_the_prompts_are_those_that_the_model_was_taught() -> None:
    assert caption_prompt("brief", None) == (BRIEF, 64)
    assert caption_prompt("detailed", " ")[0] == DETAILED
    assert caption_prompt("brief", " A photo\n of ")[0] == "<grounding>A photo of"
    assert caption_prompt("brief", "<grounding>An image of<phrase> a dog</phrase>")[0].endswith("</phrase>")
    assert [is_instruction(prompt) for prompt in (BRIEF, DETAILED)] == [False, True]
    assert Question("ask", "What colour?").prompt() == "<grounding>Question: What colour? Answer:"
    assert Question("ground", "the <phrase>dog</phrase>").prompt() == "<grounding><phrase> the dog</phrase>"
    box = (0.390625, 0.046875, 0.984375, 0.828125)
    cells = "<patch_index_0044><patch_index_0863>"
    assert Question("refer", box=box).prompt() == f"<grounding><phrase> It</phrase><object>{cells}</object> is"


@pytest.mark.parametrize(
    "question",
    [
        Question("ask", " <image> "),
        Question("ground"),
        Question("refer"),
        Question("refer", box=(0.5, 0.5, 0.5, 0.9)),
        Question("refer", box=(0.0, 0.0, float("nan"), 1.0)),
        Question("refer", box=(-0.1, 0.0, 1.0, 1.0)),
    ],
)
def test_what_asks_nothing_is_refused(question: Question) -> None:
    with pytest.raises(Refusal):
        question.prompt()


def test_a_prompt_with_a_picture_in_it_and_an_unknown_mode_are_refused() -> None:
    with pytest.raises(Refusal, match="picture"):
        caption_prompt("brief", "An <image> of")
    with pytest.raises(Refusal, match="mode"):
        caption_prompt("long", None)


@given(st.integers(0, GRID * GRID - 1), st.integers(0, GRID * GRID - 1))
def test_a_box_of_the_model_is_asked_about_with_its_own_cells(first: int, last: int) -> None:
    box = box_of(first, last)
    if box is not None:
        assert cells_of(box) == (first, last)


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_any_box_lies_within_its_cells(sides: list[float]) -> None:
    x0, x1 = sorted(sides[:2])
    y0, y1 = sorted(sides[2:])
    if x0 < x1 and y0 < y1:
        first, last = cells_of((x0, y0, x1, y1))
        assert box_of(first, last) is not None
        assert (first % GRID) / GRID <= x0 + 1e-6
        assert (last % GRID + 1) / GRID >= x1 - 1e-6


@given(
    st.lists(st.sampled_from(["<phr", "<phrase>", "ase>", "a", "<patch_index_0001>", " ", "<im", "<image>", "age>"]))
)
def test_nobodys_words_are_taken_for_tags(pieces: list[str]) -> None:
    text = without_tags("".join(pieces))
    assert parse(text).text == text
