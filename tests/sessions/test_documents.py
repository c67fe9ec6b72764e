"""YAML that a person wrote: read kindly, and refused with line, reason and fix."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field

from sessions.documents import read_document
from sessions.refusal import Refusal


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")

    rate: float = 1.0
    name: str = "none"


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")

    inner: Inner = Field(default_factory=Inner)
    words: list[str] = Field(default_factory=list)
    either: int | bool = 0
    maybe: str | None = None


def refused(text: str) -> Refusal:
    with pytest.raises(Refusal) as caught:
        read_document(text, Outer, "document")
    assert caught.value.code == "document"
    assert caught.value.what
    assert caught.value.advice
    return caught.value


@pytest.mark.parametrize("written", ["1e-6", "1E-6", "1.0e-6", "+1e-6", ".1e-5", "0.000001"])
def test_numbers_are_read_as_people_write_them(written: str) -> None:
    assert read_document(f"inner: {{rate: {written}}}", Outer, "document").inner.rate == pytest.approx(1e-6)


@given(st.floats(min_value=1e-12, max_value=1e12))
def test_every_number_that_python_writes_is_read(number: float) -> None:
    assert read_document(f"inner:\n  rate: {number!r}\n", Outer, "document").inner.rate == number


@pytest.mark.parametrize("written", ["e5", "1e", "1e5x", "x1e-6", "'1e-6'"])
def test_what_only_looks_like_a_number_stays_text(written: str) -> None:
    assert read_document(f"inner: {{name: {written}}}", Outer, "document").inner.name == written.strip("'")


@pytest.mark.parametrize(
    "text", ["", "#", "\n", "---\n", "{}", "\ufeff", "inner:\n", "inner:\nmaybe:\n", "maybe: null\n"]
)
def test_nothing_said_is_the_default(text: str) -> None:
    assert read_document(text, Outer, "document") == Outer()


def test_the_line_is_that_of_the_key() -> None:
    found = refused("# a comment\n\ninner:\n\n  # another\n  rate: fast\n")
    assert found.line == 6
    assert "`inner.rate`" in found.what
    assert "'fast'" in found.what
    assert "inner.rate" in found.advice


def test_the_line_of_an_unknown_key_in_a_section() -> None:
    found = refused("words: []\ninner:\n  rate: 1\n  nmae: x\n")
    assert (found.line, found.advice) == (4, "Did you mean `name`?")
    assert refused("inner: {zzzzz: 1}").advice == "Known here: name, rate."


def test_a_wrong_item_of_a_list_names_its_key() -> None:
    found = refused("words:\n  - a\n  - [b]\n")
    assert found.line == 1
    assert "words" in found.what


def test_a_wrong_branch_of_a_union_names_its_key() -> None:
    found = refused("maybe: x\neither: [1]\n")
    assert found.line == 2
    assert "`either`" in found.what


@pytest.mark.parametrize("text", ["words: []\nwords: []\n", "inner:\n  rate: 1\n  rate: 2\n"])
def test_a_key_that_stands_there_twice_is_refused(text: str) -> None:
    found = refused(text)
    assert "twice" in found.what
    assert found.line == len(text.splitlines())


@pytest.mark.parametrize(
    "text",
    [
        "- a\n",
        "words",
        "42",
        "inner:\n\trate: 1\n",
        "a: b: c\n",
        "[",
        "{",
        "'",
        "key\nother: 1\n",
        "---\na: 1\n---\nb: 2\n",
        "1: 2\n",
        "true: 2\n",
        "? [a]\n: b\n",
        "inner: !!python/object:os.system x\n",
        "x: &a [*a]\n",
        "\x00",
        "\x07bell: 1\n",
        "maybe: 2001-13-45\n",
        "words: 1\n",
        "inner: []\n",
        "[" * 3000,
    ],
)
def test_every_mistake_is_a_refusal_with_a_fix(text: str) -> None:
    found = refused(text)
    assert "\n" not in found.what
    assert found.line is None or found.line >= 1


def outcome(text: str) -> Outer | Refusal:
    try:
        return read_document(text, Outer, "document")
    except Refusal as refusal:
        return refusal


@given(st.one_of(st.text(max_size=60), st.text(alphabet="inerwodsayb:{}[]&*!#'\" \n\t-?|>1e.", max_size=60)))
def test_any_text_is_read_or_refused(text: str) -> None:
    found = outcome(text)
    assert isinstance(found, Outer) or (found.what and found.advice)
