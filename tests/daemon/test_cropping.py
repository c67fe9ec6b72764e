"""Crops that follow their captions, train.yaml and crop.txt: each once, whatever is killed or lost in between."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from daemon.cropping import CropRules, crop_parameters, read_crop_rules, spoken_words
from handlers.models.segments import SegmentNetwork
from sessions.manifest import Manifest, Record
from sessions.wishes import Wishes, parse_wishes
from tests.daemon.house import House, without_syncs

A = "Sessions/a"
OWN = {"mode": "smart", "resolution": 512}
DOG = {"phrase": "a dog", "box": [0.5, 0.25, 0.75, 1.0]}
BALL = {"phrase": "two red balls", "box": [0.0, 0.5, 0.25, 0.75]}


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path, webui={"kind": "none"})
    yield made
    made.close()


def crop(house: House, name: str = "x.jpg") -> Record:
    found = Manifest.load(house.root / A).get("crop", name)
    assert found is not None
    return found


def crops_made(house: House, name: str = "x.jpg") -> int:
    return house.made.count(("crop", name))


def sees(house: House, content: bytes, *entities: dict[str, Any]) -> None:
    house.entities[content] = [{**entity, "span": [0, 3]} for entity in entities]


# Crop follows caption


def test_a_crop_without_a_face_is_made_again_with_the_boxes_of_its_caption(house: House) -> None:
    sees(house, b"dog", DOG, BALL)
    house.write(f"{A}/x.jpg", b"dog")
    house.look()
    house.work(kinds=("crop",))
    assert crop(house)["params"] == OWN
    house.settle()
    assert crop(house)["params"] == {**OWN, "entities": [DOG, BALL], "words": []}
    assert house.payloads[-1]["entities"] == [DOG, BALL]
    assert crops_made(house) == 2
    house.router.reroute()
    assert house.open_jobs() == []


@pytest.mark.parametrize("lost", [(), ("queue",), ("index",), ("index", "queue")])
def test_a_daemon_that_dies_at_any_point_crops_again_once(house: House, lost: tuple[str, ...]) -> None:
    sees(house, b"dog", DOG)
    house.write(f"{A}/x.jpg", b"dog")
    for _ in range(4):
        house.look()
        house.work(at_most=1)
        house.restart(*lost)
        house.look()
    house.settle()
    assert crop(house)["subject"] == "grounded"
    assert (crops_made(house), house.made.count(("caption", "x.jpg"))) == (2, 1)


def test_a_death_between_the_record_of_the_caption_and_the_next_crop_loses_nothing(house: House) -> None:
    sees(house, b"dog", DOG)
    house.write(f"{A}/x.jpg", b"dog")
    house.look()
    house.work(kinds=("crop",))
    job = house.claim("caption")
    assert job is not None
    house.finish(job)
    house.restart("queue")
    house.settle()
    assert crop(house)["subject"] == "grounded"
    assert crops_made(house) == 2


def test_a_face_is_trusted_more_than_a_caption(house: House) -> None:
    sees(house, b"man", DOG)
    house.faces.add(b"man")
    house.write(f"{A}/x.jpg", b"man")
    house.settle()
    assert crop(house)["params"] == OWN
    assert crops_made(house) == 1


def test_a_caption_that_comes_first_goes_into_the_first_crop(house: House) -> None:
    sees(house, b"dog", DOG)
    house.write(f"{A}/x.jpg", b"dog")
    house.look()
    house.work(kinds=("caption",))
    house.settle()
    assert crops_made(house) == 1, "the one that was queued without its boxes is not wanted any more"
    assert crop(house)["subject"] == "grounded"


def test_a_caption_made_again_with_the_same_boxes_crops_nothing(house: House) -> None:
    sees(house, b"dog", DOG)
    house.write(f"{A}/x.jpg", b"dog")
    house.settle()
    (house.root / A / "captions/x.json").unlink()
    house.router.reroute()
    assert house.open_jobs() == [("caption", "x.jpg")]
    house.settle()
    assert crops_made(house) == 2
    sees(house, b"dog", BALL)
    (house.root / A / "captions/x.json").unlink()
    house.router.reroute()
    house.settle()
    assert crops_made(house) == 3
    assert crop(house)["params"]["entities"] == [BALL]


def test_a_changed_picture_is_cropped_by_what_is_in_it_now(house: House) -> None:
    sees(house, b"dog", DOG)
    house.write(f"{A}/x.jpg", b"dog")
    house.settle()
    house.write(f"{A}/x.jpg", b"nothing at all")
    house.look()
    house.work(kinds=("crop",))
    assert crop(house)["params"] == OWN, "the boxes are those of the old picture"
    house.settle()
    assert crop(house)["params"] == OWN


def test_a_touched_picture_keeps_its_crop(house: House) -> None:
    sees(house, b"dog", DOG)
    picture = house.write(f"{A}/x.jpg", b"dog")
    house.settle()
    os.utime(picture, (1e9, 1e9))
    house.settle()
    assert crops_made(house) == 2


def test_training_waits_for_the_crop_that_follows_a_caption(house: House) -> None:
    for number in range(3):
        sees(house, f"picture {number}".encode(), DOG)
    house.pictures(A)
    house.write(f"{A}/train.yaml", "base: miniature\nstart: now\n")
    house.look()
    house.work(kinds=("crop",))
    assert house.plans[A].waits == ["Training waits for 3 captions."]
    house.work(kinds=("caption",))
    assert house.plans[A].waits == ["Training waits for 3 pictures to be cropped."]
    assert not house.open_jobs("train")
    house.work(kinds=("crop",))
    assert len(house.open_jobs("train")) == 1


def test_a_picture_that_goes_while_it_is_captioned_wants_nothing(house: House) -> None:
    sees(house, b"dog", DOG)
    picture = house.write(f"{A}/x.jpg", b"dog")
    house.look()
    house.work(kinds=("crop",))
    job = house.claim("caption")
    assert job is not None
    house.finish(job, picture.unlink)
    house.settle()
    assert house.open_jobs() == []
    assert not house.files(f"{A}/crops")


# train.yaml


def test_a_class_in_train_yaml_crops_again_what_speaks_of_it(house: House) -> None:
    sees(house, b"dog and ball", DOG, BALL)
    sees(house, b"dog alone", DOG)
    house.write(f"{A}/x.jpg", b"dog and ball")
    house.write(f"{A}/y.jpg", b"dog alone")
    house.settle()
    house.write(f"{A}/train.yaml", "class: ball\nstart: now\nbase: miniature\n")
    house.settle()
    assert crop(house)["params"]["words"] == ["ball"]
    assert (crops_made(house), crops_made(house, "y.jpg")) == (3, 2)
    house.write(f"{A}/train.yaml", "class: ball\nseed: 8\nstart: now\nbase: miniature\n")
    house.settle()
    assert (crops_made(house), crops_made(house, "y.jpg")) == (3, 2)


@pytest.mark.parametrize(("noun", "crops"), [("dog", 2), ("man", 1), ("person", 1), ("cat", 1)])
def test_the_thing_of_the_session_is_trusted_more_than_a_face(house: House, noun: str, crops: int) -> None:
    sees(house, b"man with dog", DOG, {"phrase": "a man", "box": [0.0, 0.0, 0.5, 1.0]})
    house.faces.add(b"man with dog")
    house.write(f"{A}/x.jpg", b"man with dog")
    house.settle()
    house.write(f"{A}/train.yaml", f"class: {noun}\nbase: miniature\n")
    house.settle()
    house.router.reroute()
    assert house.open_jobs("crop") == []
    assert crops_made(house) == crops


@pytest.mark.parametrize("mode", ["centre", "off"])
def test_the_mode_of_train_yaml_is_the_crops(house: House, mode: str) -> None:
    sees(house, b"dog", DOG)
    house.write(f"{A}/x.jpg", b"dog")
    house.write(f"{A}/train.yaml", f"crop: {mode}\nbase: miniature\n")
    house.settle()
    assert crop(house)["params"] == {**OWN, "mode": mode}
    assert crops_made(house) == 1
    house.write(f"{A}/train.yaml", "crop: smart\nbase: miniature\n")
    house.settle()
    assert crop(house)["params"] == {**OWN, "entities": [DOG], "words": []}
    (house.root / A / "train.yaml").unlink()
    house.settle()
    assert crops_made(house) == 2


def test_a_train_yaml_with_a_mistake_changes_no_crop(house: House) -> None:
    house.write(f"{A}/x.jpg", b"dog")
    house.write(f"{A}/train.yaml", "crop: centre\nbase: miniature\n")
    house.settle()
    house.write(f"{A}/train.yaml", "crop: centre\nbase: miniature\nstpes: 5\n")
    house.settle()
    assert crops_made(house) == 1
    house.write(f"{A}/y.jpg", b"another")
    house.settle()
    assert crop(house, "y.jpg")["params"] == OWN


# crop.txt


def test_a_line_of_crop_txt_makes_again_only_the_crops_that_it_concerns(house: House) -> None:
    for name in ("x", "y", "z"):
        house.write(f"{A}/instance_images/{name}.jpg", name)
    house.settle()
    house.made.clear()
    house.write(f"{A}/crop.txt", "x.jpg: 120 40 900 820\ny: 10% 5% 80% 90%\n")
    house.settle()
    assert sorted(house.made) == [("crop", "instance_images/x.jpg"), ("crop", "instance_images/y.jpg")]
    wishes = {Path(payload["source"]).name: payload.get("wish") for payload in house.payloads[-2:]}
    assert wishes == {
        "x.jpg": {"box": [120, 40, 900, 820], "unit": "pixels"},
        "y.jpg": {"box": [0.1, 0.05, 0.8, 0.9], "unit": "share"},
    }
    house.write(f"{A}/crop.txt", "# only this\ny: 10% 5% 80% 90%\n")
    house.settle()
    assert house.made[2:] == [("crop", "instance_images/x.jpg")]
    (house.root / A / "crop.txt").unlink()
    house.settle()
    assert house.made[3:] == [("crop", "instance_images/y.jpg")]
    assert "wish" not in house.payloads[-1]


@pytest.mark.parametrize("lost", [(), ("queue",), ("index", "queue")])
def test_a_wish_is_fulfilled_once_whatever_is_lost(house: House, lost: tuple[str, ...]) -> None:
    house.pictures(A)
    house.write(f"{A}/crop.txt", "subject: dog\n1.jpg: 0 0 10 10\n")
    house.look()
    house.work(at_most=2)
    house.restart(*lost)
    house.settle()
    house.restart(*lost)
    house.settle()
    assert [crops_made(house, f"{number}.jpg") for number in range(3)] == [1, 1, 1]
    assert crop(house, "1.jpg")["params"]["wish"] == {"box": [0, 0, 10, 10], "unit": "pixels"}
    assert crop(house, "2.jpg")["params"]["wish"] == {"subject": "dog"}


def test_pictures_and_their_wishes_may_settle_in_any_order(house: House) -> None:
    house.write(f"{A}/x.jpg")
    house.look()
    house.write(f"{A}/crop.txt", "x.jpg: centre\n")
    house.write(f"{A}/a.jpg")
    house.look()
    house.settle()
    assert crop(house)["params"]["wish"] == {"subject": "centre"}
    assert crops_made(house) == 1, "the crop that was queued before is not wanted any more"


def test_a_wish_for_a_noun_takes_the_captions_boxes_even_where_a_face_is(house: House) -> None:
    sees(house, b"man with dog", DOG)
    house.faces.add(b"man with dog")
    house.write(f"{A}/x.jpg", b"man with dog")
    house.settle()
    house.write(f"{A}/crop.txt", "Subject: Dog")
    house.settle()
    assert crop(house)["params"] == {**OWN, "wish": {"subject": "dog"}, "entities": [DOG], "words": []}


@pytest.mark.parametrize("line", ["x.jpg: 0 0 10 10", "x.jpg: centre", "subject: segment"])
def test_a_fixed_window_does_not_follow_the_caption(house: House, line: str) -> None:
    sees(house, b"dog", DOG)
    house.write(f"{A}/x.jpg", b"dog")
    house.write(f"{A}/crop.txt", line)
    house.settle()
    assert "entities" not in crop(house)["params"]
    assert crops_made(house) == 1


def test_the_nearer_word_wins(house: House) -> None:
    house.pictures(A, 2)
    house.write(f"{A}/train.yaml", "crop: off\nbase: miniature\n")
    house.write(f"{A}/crop.txt", "exclude: logo\n1.jpg: 0 0 10 10\n")
    house.settle()
    assert crop(house, "0.jpg")["params"] == {**OWN, "mode": "off"}
    assert crop(house, "1.jpg")["params"]["mode"] == "smart"


def test_a_line_that_cannot_be_used_is_told_and_the_others_count(house: House) -> None:
    house.pictures(A, 2)
    wishes = house.write(f"{A}/Crop.txt", "0.jpg: centre\n1.jpg: 5 5 1\n")
    house.settle()
    told = wishes.with_name("Crop.txt.error.txt")
    assert "`5 5 1` is no box." in told.read_text()
    assert "line 2" in told.read_text()
    assert "wish" in crop(house, "0.jpg")["params"]
    assert "wish" not in crop(house, "1.jpg")["params"]
    house.restart("index", "queue")
    house.settle()
    assert told.exists()
    wishes.write_text("0.jpg: centre\n1.jpg: 5 5 20 20\n")
    house.settle()
    assert not told.exists()
    assert "wish" in crop(house, "1.jpg")["params"]
    wishes.write_text("nonsense")
    house.settle()
    assert told.exists()
    wishes.unlink()
    house.settle()
    assert not told.exists()


@pytest.mark.parametrize("lost", [(), ("queue",), ("index", "queue")])
def test_a_wish_that_a_picture_cannot_fulfil_is_told_beside_crop_txt_and_it_is_cropped_without(
    house: House, lost: tuple[str, ...]
) -> None:
    house.least = 100
    house.pictures(A, 2)
    wishes = house.write(f"{A}/crop.txt", "subject: dog\n0.jpg: 0 0 10 10\n1.jpg: 0 0 200 200\n")
    house.settle()
    told = wishes.with_name("crop.txt.error.txt")
    assert "line 2" in told.read_text()
    assert "0.jpg: The box is too small." in told.read_text()
    assert not (house.root / A / "0.jpg.error.txt").exists()
    assert crop(house, "0.jpg")["params"] == OWN
    assert crop(house, "1.jpg")["params"]["wish"] == {"box": [0, 0, 200, 200], "unit": "pixels"}
    made = list(house.made)
    house.restart(*lost)
    house.settle()
    assert house.made == made
    assert told.exists()
    house.write(f"{A}/0.jpg", "a larger picture")
    house.settle()
    assert told.exists(), "another picture, the same mistake"
    wishes.write_text("0.jpg: 0 0 300 300\n")
    house.settle()
    assert not told.exists()
    assert crop(house, "0.jpg")["params"]["wish"] == {"box": [0, 0, 300, 300], "unit": "pixels"}
    (house.root / A / "0.jpg").unlink()
    house.settle()
    assert not [kind for kind, source in Manifest.load(house.root / A).records if source == "0.jpg"]


def test_what_crop_txt_asks_for_in_vain_is_worth_a_look(house: House) -> None:
    for number in range(5):
        sees(house, f"picture {number}".encode(), DOG)
    house.faces.add(b"picture 0")
    house.pictures(A, 5)
    house.write(f"{A}/crop.txt", "subject: cat\n3.jpg: faces\n")
    house.look()
    house.work(kinds=("crop",))
    assert not [line for line in house.plans[A].hints if "cat" in line], "its caption may show one"
    house.settle()
    said = house.plans[A].hints
    assert "crop.txt asks for cat, and the caption shows no cat in 0.jpg." in said
    assert "crop.txt asks for faces, and no face was found in 3.jpg." in said


def test_beside_a_picture_called_crop_it_is_no_caption(house: House) -> None:
    house.write(f"{A}/crop.jpg")
    house.write(f"{A}/crop.txt", "subject: dog\n")
    house.settle()
    assert (house.root / A / "captions/crop.txt").read_text() == "a caption\n"
    assert house.files(A) >= {"crop.jpg", "crop.txt", "crops/crop.jpg"}
    house.write(f"{A}/deep/crop.jpg", b"another")
    house.write(f"{A}/deep/crop.txt", "a person's words\n")
    house.settle()
    assert house.session(A).crop_rules.wishes == Wishes(subject="dog")


# The rules themselves


def made_with(subject: str, **params: Any) -> Record:
    return {"params": {**OWN, **params}, "subject": subject}


def test_rules_are_read_as_they_lie(tmp_path: Path) -> None:
    assert read_crop_rules(tmp_path) == CropRules()
    assert read_crop_rules(tmp_path / "gone") == CropRules()
    (tmp_path / "Train.YAML").write_text("class: dog\ninstance: zwx\ncrop: centre\n")
    assert read_crop_rules(tmp_path) == CropRules("centre", ("dog", "zwx"))
    (tmp_path / "Train.YAML").write_text("class: [")
    assert read_crop_rules(tmp_path).mode is None
    (tmp_path / "crop.txt").write_bytes(b"\xff\xfes\x00u\x00b\x00j\x00e\x00c\x00t\x00:\x00 \x00d\x00o\x00g\x00")
    assert read_crop_rules(tmp_path).wishes.subject == "dog"
    (tmp_path / "crop.txt").unlink()
    os.mkfifo(tmp_path / "crop.txt")
    assert read_crop_rules(tmp_path).wishes == Wishes()
    (tmp_path / "crop.txt").unlink()
    (tmp_path / "crop.txt").mkdir()
    problem = read_crop_rules(tmp_path).problem
    assert problem is not None
    assert "cannot be read" in problem.what


@pytest.mark.parametrize(
    ("phrases", "words", "spoken"),
    [
        (["a dog", "a ball"], ["dog"], ["dog"]),
        (["two dogs", "a ball"], ["dog"], ["dog"]),
        (["a horse", "a ball"], ["Horses"], ["Horses"]),
        (["a dog", "a ball"], ["cat", "zwx"], []),
        (["a dog"], ["dog"], ["dog"]),
        (["a golden retriever", "a ball"], ["retriever dog"], ["retriever dog"]),
    ],
)
def test_words_count_where_a_caption_speaks_of_them(phrases: list[str], words: list[str], spoken: list[str]) -> None:
    assert spoken_words(phrases, words) == spoken


_entities = st.lists(st.sampled_from([DOG, BALL]), max_size=2, unique_by=lambda entity: str(entity["phrase"]))
_rules = st.builds(
    CropRules,
    mode=st.sampled_from(["smart", "centre", "off", None]),
    words=st.sampled_from([(), ("dog",), ("ball", "zwx")]),
    wishes=st.sampled_from(["", "subject: dog", "exclude: ball", "x: centre", "x: 1 2 3 4", "subject: faces"]).map(
        lambda text: parse_wishes(text)[0]
    ),
)


@given(_rules, st.one_of(st.none(), _entities), st.sampled_from(["face", "saliency", "centre", "grounded", "segment"]))
def test_what_was_made_as_wanted_is_not_wanted_again(
    rules: CropRules, entities: list[dict[str, Any]] | None, subject: str
) -> None:
    caption = None if entities is None else {"entities": entities}
    made: Record | None = None
    for _ in range(2):
        wanted = crop_parameters(OWN, "x.jpg", rules, made, caption)
        if wanted is None:
            break
        made = {"params": wanted, "subject": subject}
    assert crop_parameters(OWN, "x.jpg", rules, made, caption) is None


_steps = st.lists(
    st.sampled_from(
        [
            ("crop.txt", "subject: dog"),
            ("crop.txt", "0.jpg: centre"),
            ("crop.txt", ""),
            ("train.yaml", "class: ball\nbase: miniature\n"),
            ("train.yaml", "crop: centre\nbase: miniature\n"),
            ("train.yaml", "crop: ["),
            ("0.jpg", "picture 1"),
            ("lose", "index queue"),
            ("lose", "queue"),
            ("crop", ""),
            ("caption", ""),
        ]
    ),
    max_size=8,
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_steps)
def test_whatever_happens_the_crops_end_as_the_tree_wants_them(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, str]]
) -> None:
    with without_syncs():
        house = House(tmp_path_factory.mktemp("house"), webui={"kind": "none"})
        sees(house, b"picture 0", DOG, BALL)
        sees(house, b"picture 1", BALL)
        house.pictures(A, 2)
        for what, how in steps:
            if what == "lose":
                house.restart(*how.split())
            elif what in ("crop", "caption"):
                house.work(kinds=(what,), at_most=1)
            else:
                house.write(f"{A}/{what}", how)
            house.look()
        house.settle()
        session = house.session(A)
        for record in session.manifest.of_kind("crop"):
            caption = session.manifest.get("caption", record["source"])
            assert crop_parameters(OWN, record["source"], read_crop_rules(session.folder), record, caption) is None
        made = list(house.made)
        house.restart("index", "queue")
        house.settle()
        assert house.made == made
        house.close()


@pytest.mark.parametrize("dies", ["when it tells", "when it takes back"])
def test_a_death_beside_an_error_file_leaves_none_behind(
    house: House, dies: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon is killed between the two writes of a refusal; then the line is mended."""
    wishes = house.write(f"{A}/crop.txt", "x.jpg: 1 2 3" if dies == "when it takes back" else "x.jpg: centre")
    house.write(f"{A}/x.jpg", b"dog")
    house.settle()
    append = Manifest.append

    def killed(manifest: Manifest, records: list[Record]) -> None:
        if any(record["kind"] == "refused" for record in records):
            raise KeyboardInterrupt
        append(manifest, records)

    with monkeypatch.context() as patched:
        patched.setattr(Manifest, "append", killed)
        wishes.write_text("x.jpg: 5 5 1" if dies == "when it tells" else "x.jpg: centre")
        with pytest.raises(KeyboardInterrupt):
            house.settle()
    house.restart("index", "queue")
    wishes.write_text("x.jpg: 0 0 20 20")
    house.settle()
    assert not wishes.with_name("crop.txt.error.txt").exists()
    assert Manifest.load(house.root / A).get("refused", "crop.txt") is None


# Salient-object networks


def test_a_network_that_comes_makes_the_crops_that_are_wished_for_with_one(house: House) -> None:
    house.pictures(A, 1)
    house.write(f"{A}/x.jpg", b"dog")
    house.write(f"{A}/crop.txt", "x.jpg: segment")
    house.settle()
    assert crop(house)["params"] == {**OWN, "wish": {"subject": "segment"}}
    assert "x.jpg: There is no network." in house.plans[A].hints
    house.network = SegmentNetwork(house.root / "Models" / "u2netp.onnx", 7)
    house.router.reroute()
    house.settle()
    assert crop(house)["params"] == {
        **OWN,
        "wish": {"subject": "segment"},
        "network": {"name": "u2netp", "bytes": 7},
    }
    assert house.payloads[-1]["segment"].endswith("Models/u2netp.onnx")
    assert house.payloads[-1]["segment_memory"] == 512_000_000
    assert not any("network" in line for line in house.plans[A].hints)
    assert (crops_made(house), crops_made(house, "0.jpg")) == (2, 1), "the others stand as they are"
    # What one has made stands on a machine that has none, or another.
    for network in (None, SegmentNetwork(house.root / "Models" / "u2net.onnx", 9)):
        house.network = network
        house.restart("index", "queue")
        house.settle()
        assert crops_made(house) == 2


def test_a_network_that_failed_and_is_another_now_is_tried_again() -> None:
    rules = CropRules(wishes=parse_wishes("subject: segment")[0])

    def wanted(made: Record | None, size: int | None) -> dict[str, Any] | None:
        network = {"name": "u2netp", "bytes": size}
        return crop_parameters(OWN, "x.jpg", rules, made, None, network=lambda: network if size else None)

    first = wanted(None, 5)
    assert first is not None
    made = {"params": first, "subject": "saliency"}
    assert wanted(made, 5) is None
    assert wanted(made, None) is None
    again = wanted(made, 6)
    assert again is not None
    assert again["network"] == {"name": "u2netp", "bytes": 6}
    assert wanted({"params": again, "subject": "segment"}, 5) is None


def test_a_picture_without_that_wish_is_asked_of_the_network_that_is_here_and_never_made_again(house: House) -> None:
    house.network = SegmentNetwork(house.root / "Models" / "u2netp.onnx", 7)
    house.write(f"{A}/x.jpg", b"dog")
    house.settle()
    assert crop(house)["params"] == OWN
    assert house.payloads[-1]["segment"].endswith("u2netp.onnx")
    house.network = None
    house.restart("index", "queue")
    house.settle()
    assert crops_made(house) == 1
    house.write(f"{A}/y.jpg", b"cat")
    house.settle()
    assert "segment" not in house.payloads[-1]


# Small pictures


@pytest.mark.parametrize(
    ("spec", "base", "smaller"),
    [
        (None, "auto", 512),
        (None, "sdxl", 1024),
        ("base: miniature\n", "sdxl", 64),
        ("base: sd15\nresolution: 640\n", "sdxl", 640),
        ("base: miniature\nresolution: 96\n", "auto", 96),
        ("base: [\n", "sdxl", 1024),
        ("base: nobody\n", "auto", 512),
    ],
)
def test_small_is_what_the_session_trains_at(tmp_path: Path, spec: str | None, base: str, smaller: int) -> None:
    house = House(tmp_path, webui={"kind": "none"}, base=base)
    house.pictures(A, 2)
    if spec:
        house.write(f"{A}/train.yaml", spec)
    house.settle()
    assert [line.split(":")[0] for line in house.plans[A].hints if line.startswith("Smaller")] == [
        f"Smaller than {smaller} pixels"
    ]
    house.close()
