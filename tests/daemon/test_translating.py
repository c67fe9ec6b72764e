"""languages: in fastsd.yaml: when translations are wanted, what waits for them, and what a missing model says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from daemon.config import BadSettings, load_settings
from daemon.jobs import Job
from handlers.outcome import Outcome
from tests.daemon.house import SPEC, House, _prepared

A = "Sessions/a"
_HEADER = json.dumps({"weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Callable[..., House]]:
    houses = []

    def make(**settings: Any) -> House:
        made = House(tmp_path, webui={"kind": "none"}, **settings)
        # The daemon looks at names and headers only.
        folder = made.root / "Models" / "mine"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"model_type": "m2m_100"}))
        (folder / "vocab.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(len(_HEADER).to_bytes(8, "little") + _HEADER + bytes(4))
        houses.append(made)
        return made

    yield make
    for house in houses:
        house.close()


def claim(house: House) -> Job | None:
    found = house.queue.claim("gpu", ["translate"], 1, house.now)
    return found[0] if found else None


def done(house: House) -> dict[str, Any]:
    """Take the job that waits, as a worker would; its payload."""
    job = claim(house)
    assert job is not None
    payload = asyncio.run(_prepared(house.hooks, job))
    assert payload is not None
    asyncio.run(house.hooks.on_outcome(job, Outcome("done", facts={"translated": {}})))
    house.queue.done(job, house.now)
    house._after()
    return payload


def lines(payload: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return {Path(shown["sidecar"]).stem: (shown["line"], shown["by"]) for shown in payload["pictures"]}


def settled(house: House) -> list[dict[str, Any]]:
    """Work until nothing is left to do; the payloads of the translate jobs."""
    payloads = []
    house.settle()
    while house.open_jobs("translate"):
        payloads.append(done(house))
        house.settle()
    return payloads


def test_captions_are_translated_once_they_stand_and_never_twice(build: Callable[..., House]) -> None:
    house = build(languages=["de", "en", "fr"], translator="mine")
    house.pictures(A, 2)
    *_, last = settled(house)
    assert last["languages"] == {"de": "mine", "fr": "mine"}
    assert lines(last) == {"0": ("a caption", "fastsd"), "1": ("a caption", "fastsd")}
    assert settled(house) == []
    house.restart("queue", "index")
    assert settled(house) == []


def test_they_wait_for_captions_and_training_does_not_wait_for_them(build: Callable[..., House]) -> None:
    house = build(languages=["de"], translator="mine")
    house.pictures(A, 3)
    house.write(f"{A}/train.yaml", SPEC)
    house.look()
    assert house.open_jobs("translate") == []
    house.settle()
    assert set(house.open_jobs("translate")) == {("translate", "captions")}
    assert len(house.open_jobs("train")) == 1


def test_what_a_person_writes_is_translated_from_their_text(build: Callable[..., House]) -> None:
    house = build(languages=["de"], translator="mine")
    house.pictures(A, 3)
    settled(house)
    house.write(f"{A}/captions/0.txt", "my own words\n")
    house.write(f"{A}/1.txt", "beside it\n")
    *_, last = settled(house)
    assert lines(last) == {
        "0": ("my own words", "person"),
        "1": ("beside it", "person"),
        "2": ("a caption", "fastsd"),
    }


def test_another_language_later_wants_no_caption_again(build: Callable[..., House]) -> None:
    house = build(languages=["de"], translator="mine")
    house.pictures(A)
    settled(house)
    house.close()
    captions = [made for made in house.made if made[0] == "caption"]
    later = build(languages=["de", "sv"], translator="mine")
    *_, last = settled(later)
    assert last["languages"] == {"de": "mine", "sv": "mine"}
    assert len(captions) == 3
    assert [made for made in later.made if made[0] == "caption"] == []


def test_the_token_of_settings_and_train_yaml_is_protected(build: Callable[..., House]) -> None:
    house = build(languages=["de"], translator="mine", caption={"instance": "zwx"})
    house.pictures(A, 2)
    house.write(f"{A}/train.yaml", "instance: ohwx\nclass: dog\n")
    *_, last = settled(house)
    assert last["words"] == ["ohwx", "zwx"]


@pytest.mark.parametrize(
    ("languages", "translator", "told"),
    [
        (["de", "fr"], "m2m100", "without de, fr: The translator m2m100 is not on this machine. Get it with: fastsd "),
        (["de"], "opus-mt", "fastsd models get opus-mt-en-de"),
        (["tlh"], "m2m100", "does not speak 'tlh'"),
        (["de"], "nobody", "No translator called 'nobody'"),
    ],
)
def test_a_missing_translator_is_told_and_captions_go_on_in_english(
    build: Callable[..., House], languages: list[str], translator: str, told: str
) -> None:
    house = build(languages=languages, translator=translator)
    house.pictures(A)
    assert settled(house) == []
    (reason,) = house.plans[A].waits
    assert told in reason
    assert reason.startswith("Captions stay English without")
    assert (house.root / A / "captions" / "0.txt").read_text() == "a caption\n"


def test_no_languages_no_jobs(build: Callable[..., House]) -> None:
    house = build()
    house.pictures(A)
    house.settle()
    assert house.open_jobs("translate") == []


def test_yaml_says_languages(tmp_path: Path) -> None:
    (tmp_path / "fastsd.yaml").write_text("languages: [de, no, FR]\ntranslator: opus-mt\n")
    found = load_settings(tmp_path)
    assert (found.languages, found.translator) == (["de", "no", "fr"], "opus-mt")
    (tmp_path / "fastsd.yaml").write_text("languages: [German]\n")
    with pytest.raises(BadSettings, match="two or three letters"):
        load_settings(tmp_path)
