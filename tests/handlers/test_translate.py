"""Captions in other languages: real M2M100 and Marian classes, tiny and untrained, with sentencepiece tokenizers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers.context import JobContext, Stopping
from handlers.models import registry
from handlers.models.registry import MissingModel
from handlers.translate.job import TranslateHandler
from handlers.translate.languages import known_language, translator_of
from handlers.translate.model import Translator
from handlers.translate.protect import translated
from sessions import captions, files
from sessions.refusal import Refusal
from tests.handlers import translators

LINES = ("a small green heart", "a dog runs behind a cat", "zwx on a grey ground, the sun shines", "a red star zwx")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("Models")
    translators.m2m100(folder / "many")
    translators.marian(folder / "pair")
    return folder


@pytest.fixture(scope="module")
def many(models: Path) -> Translator:
    return Translator.load(models / "many", "cpu")


@pytest.fixture
def job(tmp_path: Path, models: Path) -> Callable[..., JobContext]:
    def make(languages: dict[str, str], lines: Sequence[str] = LINES, **more: Any) -> JobContext:
        shown = [{"sidecar": str(tmp_path / f"{n}.json"), "line": line, "by": "fastsd"} for n, line in enumerate(lines)]
        stopping = more.pop("is_stopping", lambda: False)
        payload = {"languages": languages, "words": ["zwx"], "models": str(models), "pictures": shown, **more}
        return JobContext(1, "translate", payload, "cpu", tmp_path, lambda *_: None, lambda: False, stopping)

    for number, line in enumerate(LINES):
        files.write_json(tmp_path / f"{number}.json", {"caption": line, "raw": "kept"})
    return make


def sidecars(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{number}.json").read_text()) for number in range(len(LINES))]


def test_captions_get_their_translations_beside_all_else(job: Callable[..., JobContext], tmp_path: Path) -> None:
    result = TranslateHandler().run(job({"de": "many", "fr": "pair"}))
    assert result.facts == {"translated": {"de": 4, "fr": 4}}
    for line, sidecar in zip(LINES, sidecars(tmp_path), strict=True):
        assert (sidecar["caption"], sidecar["raw"]) == (line, "kept")
        for language, name in (("de", "many"), ("fr", "pair")):
            entry = sidecar["translations"][language]
            assert entry["text"]
            assert "__" not in entry["text"]
            assert entry["model"] == name
            assert entry["of_sha256"] == captions.sha256_of(captions.file_bytes(line))
            assert entry["text"].split().count("zwx") + entry["text"].split().count("zwx,") == ("zwx" in line)
            assert entry["token"] in (("kept", "around", "in front") if "zwx" in line else (None,))


def test_what_is_translated_stays_and_an_edited_line_is_done_anew(
    job: Callable[..., JobContext], tmp_path: Path
) -> None:
    handler = TranslateHandler()
    handler.run(job({"de": "many"}))
    before = sidecars(tmp_path)
    assert handler.run(job({"de": "many"})).facts == {"translated": {"de": 0}}
    assert sidecars(tmp_path) == before
    # A language more: what is there stays, and nothing is captioned again.
    assert handler.run(job({"de": "many", "sv": "many"})).facts == {"translated": {"de": 0, "sv": 4}}
    edited = ("my own words", *LINES[1:])
    assert handler.run(job({"de": "many", "sv": "many"}, edited)).facts == {"translated": {"de": 1, "sv": 1}}
    after = sidecars(tmp_path)
    assert after[0]["translations"]["de"]["of_sha256"] == captions.sha256_of(b"my own words\n")
    assert after[1]["translations"]["de"] == before[1]["translations"]["de"]


def test_a_sidecar_that_is_not_there_or_broken_costs_only_itself(
    job: Callable[..., JobContext], tmp_path: Path
) -> None:
    (tmp_path / "1.json").unlink()
    (tmp_path / "2.json").write_text("no json")
    assert TranslateHandler().run(job({"de": "many"})).facts == {"translated": {"de": 2}}
    assert not (tmp_path / "1.json").exists()
    assert (tmp_path / "2.json").read_text() == "no json"


def test_a_missing_translator_names_its_command_and_the_others_are_done(
    job: Callable[..., JobContext], tmp_path: Path
) -> None:
    with pytest.raises(MissingModel, match="fastsd models get opus-mt-en-de"):
        TranslateHandler().run(job({"de": "opus-mt-en-de", "fr": "pair"}))
    assert all(list(sidecar["translations"]) == ["fr"] for sidecar in sidecars(tmp_path))


def test_stopping_ends_it_within_a_token(job: Callable[..., JobContext], tmp_path: Path) -> None:
    with pytest.raises(Stopping):
        TranslateHandler().run(job({"de": "many"}, is_stopping=lambda: True))
    assert all("translations" not in sidecar for sidecar in sidecars(tmp_path))


def test_languages_differ_and_batches_are_singles(many: Translator) -> None:
    german, french = many.translate(LINES, "de"), many.translate(LINES, "fr")
    assert german != french
    assert [many.translate([line], "de")[0] for line in LINES] == german


def test_out_of_memory_halves_the_batch(models: Path, many: Translator, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = Translator.load(models / "many", "cpu")
    written = narrow._written

    def small(lines: Sequence[str], *rest: Any) -> list[str]:
        if len(lines) > 1:
            raise MemoryError
        return written(lines, *rest)

    monkeypatch.setattr(narrow, "_written", small)
    assert narrow.translate(LINES, "de") == many.translate(LINES, "de")
    assert narrow.pace.ceiling == 1


def test_translators_are_known_by_name(models: Path) -> None:
    assert registry.check("many", "translator", models, models).family == "m2m100"
    assert registry.check("pair", "translator", models, models).family == "marian"
    assert [translator_of("de", setting) for setting in ("m2m100", "opus-mt", "own")] == [
        "m2m100",
        "opus-mt-en-de",
        "own",
    ]
    known_language("de", "m2m100")
    with pytest.raises(Refusal, match="does not speak 'tlh'"):
        known_language("tlh", "m2m100")


# What any model may make of a line: leave it, lose words, shout, double, say the token where none was, say nothing.
_WORDS = st.sampled_from(
    ["zwx", "ZWX", "a", "dog", "zw-x", "zwx.", "(zwx)", "Hund,", ",", ".", "-", "x_y", "zwxes", "ü"]
)
_TEXTS = st.lists(_WORDS, max_size=8).map(" ".join)
_TOKENS = st.lists(st.sampled_from(["zwx", "zw-x", "x_y", "sks dog", "a"]), min_size=1, max_size=3)


def count(text: str, tokens: Sequence[str]) -> list[str]:
    """The protected words of a text, in order, found without the code under test."""
    known = {word for phrase in tokens for word in phrase.split()}
    found = []
    place = 0
    while place < len(text):
        fits = [
            text[place : place + len(word)]
            for word in sorted(known, key=len, reverse=True)
            if text[place : place + len(word)].lower() == word
            and not (place and (text[place - 1].isalnum() or text[place - 1] == "_"))
            and not (text[place + len(word) :][:1].isalnum() or text[place + len(word) :][:1] == "_")
        ]
        found += fits[:1]
        place += len(fits[0]) if fits else 1
    return found


@given(st.lists(_TEXTS, min_size=1, max_size=4), _TOKENS, st.data())
def test_whatever_the_model_says_each_token_comes_back_as_it_was(
    lines: list[str], tokens: list[str], data: st.DataObject
) -> None:
    results = translated(lines, tokens, lambda asked: [data.draw(_TEXTS) for _ in asked])
    for line, result in zip(lines, results, strict=True):
        assert count(result.text, tokens) == count(line, tokens), (line, result)
        assert bool(result.how) == bool(count(line, tokens))


@given(st.text(), st.lists(st.text(min_size=1), max_size=3), st.data())
def test_any_text_and_any_words_can_be_had(line: str, words: list[str], data: st.DataObject) -> None:
    (result,) = translated([line], words, lambda asked: [data.draw(st.text()) for _ in asked])
    assert result.text == captions.one_line(result.text)


def test_what_became_of_the_token_is_told() -> None:
    def loses(lines: Sequence[str]) -> list[str]:
        return [" ".join(word.upper() for word in line.split() if word.lower() != "zwx") for line in lines]

    results = translated(["a zwx dog, here", "zwx sits", "a dog"], ["zwx"], loses)
    assert [(result.text, result.how) for result in results] == [
        ("A zwx DOG, HERE", "around"),
        ("zwx SITS", "in front"),
        ("A DOG", ""),
    ]
    (kept,) = translated(["a zwx dog"], ["zwx"], lambda _: ["ein zwx Hund"])
    assert (kept.text, kept.how) == ("ein zwx Hund", "kept")
