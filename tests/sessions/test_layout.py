from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sessions import layout
from sessions.layout import Role, Shape, place_of

SESSIONS = Shape(has_sessions=True)
BARE = Shape()
ROOT = Shape(root_is_session=True)

names = st.binary(min_size=1, max_size=255).map(os.fsdecode).filter(lambda name: "/" not in name and "\0" not in name)


@pytest.mark.parametrize(
    ("path", "shape", "session", "relative", "role"),
    [
        ("Sessions/zwx/a.jpg", SESSIONS, "Sessions/zwx", "a.jpg", Role.PICTURE),
        ("Sessions/zwx/instance_images/a.JPG", SESSIONS, "Sessions/zwx", "instance_images/a.JPG", Role.PICTURE),
        ("Sessions/zwx/deep/er/a.webp", SESSIONS, "Sessions/zwx", "deep/er/a.webp", Role.PICTURE),
        ("Sessions/zwx/concept_images/a.jpg", SESSIONS, "Sessions/zwx", "concept_images/a.jpg", Role.CONCEPT),
        ("Sessions/zwx/train.yaml", SESSIONS, "Sessions/zwx", "train.yaml", Role.SPEC),
        ("Sessions/zwx/train.yaml.txt", SESSIONS, "Sessions/zwx", "train.yaml.txt", Role.SPEC),
        ("Sessions/zwx/captions/a.txt", SESSIONS, "Sessions/zwx", "captions/a.txt", Role.CAPTION),
        ("Sessions/zwx/captions/a.json", SESSIONS, "Sessions/zwx", "captions/a.json", Role.OWN),
        ("Sessions/zwx/a.jpg.error.txt", SESSIONS, "Sessions/zwx", "a.jpg.error.txt", Role.OWN),
        ("Sessions/zwx/STATUS.txt", SESSIONS, "Sessions/zwx", "STATUS.txt", Role.OWN),
        ("Sessions/zwx/zwx-1.safetensors", SESSIONS, "Sessions/zwx", "zwx-1.safetensors", Role.MODEL),
        ("Sessions/zwx/zwx-1.preview.png", SESSIONS, "Sessions/zwx", "zwx-1.preview.png", Role.OWN),
        ("Sessions/zwx/zwx-261125-512d.yaml", SESSIONS, "Sessions/zwx", "zwx-261125-512d.yaml", Role.OWN),
        (
            "Sessions/zwx/zwx-261125-512d-step-500.yaml",
            SESSIONS,
            "Sessions/zwx",
            "zwx-261125-512d-step-500.yaml",
            Role.OWN,
        ),
        ("Sessions/zwx/trian.yaml", SESSIONS, "Sessions/zwx", "trian.yaml", Role.OTHER),
        ("Sessions/zwx/crops/a.jpg", SESSIONS, "Sessions/zwx", "crops/a.jpg", Role.OWN),
        ("Sessions/zwx/notes.pdf", SESSIONS, "Sessions/zwx", "notes.pdf", Role.OTHER),
        ("cats/a.png", BARE, "cats", "a.png", Role.PICTURE),
        ("a.png", ROOT, "", "a.png", Role.PICTURE),
        ("sub/a.png", ROOT, "", "sub/a.png", Role.PICTURE),
        ("instance_images/a.png", ROOT, "", "instance_images/a.png", Role.PICTURE),
    ],
)
def test_place(path: str, shape: Shape, session: str, relative: str, role: Role) -> None:
    place = place_of(path, shape)
    assert place is not None
    assert (place.session, place.relative, place.role) == (session, relative, role)


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("Models/a.png", BARE),
        ("Models/sub/x.safetensors", ROOT),
        ("Sessions/a.png", SESSIONS),
        ("elsewhere/a.png", SESSIONS),
        ("a.png", BARE),
    ],
)
def test_in_no_session(path: str, shape: Shape) -> None:
    assert place_of(path, shape) is None


def test_a_nested_folder_with_its_own_train_yaml_is_its_own_session() -> None:
    shape = Shape.of({"Sessions"}, set(), {"Sessions/pets/rex", "Sessions/pets"})
    inner = place_of("Sessions/pets/rex/instance_images/a.jpg", shape)
    outer = place_of("Sessions/pets/tom/a.jpg", shape)
    assert inner is not None
    assert outer is not None
    assert (inner.session, inner.relative) == ("Sessions/pets/rex", "instance_images/a.jpg")
    assert (outer.session, outer.relative) == ("Sessions/pets", "tom/a.jpg")


@pytest.mark.parametrize(
    ("folders", "files", "root_is_session"),
    [
        (set(), {"a.jpg"}, True),
        (set(), {"train.yaml"}, True),
        ({"instance_images"}, set(), True),
        (set(), {"notes.txt"}, False),
        ({"Sessions"}, {"a.jpg"}, False),
    ],
)
def test_shape(folders: set[str], files: set[str], root_is_session: bool) -> None:
    assert Shape.of(folders, files, ()).root_is_session is root_is_session


@pytest.mark.parametrize(
    ("path", "own"),
    [
        ("Sessions/zwx/crops", True),
        ("Sessions/zwx/deep/previews", True),
        ("Sessions/zwx/.fastsd", True),
        ("Sessions/runs", False),
        ("Sessions/.fastsd", True),
        ("Sessions/zwx/captions", False),
        ("crops", True),
    ],
)
def test_own_folders(path: str, own: bool) -> None:
    assert layout.is_own_folder(path) is own


@given(st.lists(names, unique=True, max_size=12))
def test_output_stems_never_collide_and_fit(sources: list[str]) -> None:
    taken: set[str] = set()
    for source in sources:
        stem = layout.output_stem(source, taken)
        for suffix in (".txt", ".json", ".jpg"):
            assert len(os.fsencode(stem + suffix)) <= 255
        assert layout.same_stem(stem + ".") not in taken
        taken.add(layout.same_stem(stem + "."))


def test_the_second_of_a_stem_carries_its_suffix() -> None:
    taken = {layout.same_stem("a.")}
    assert layout.output_stem("sub/A.PNG", taken) == "A~png"
    # The same letters, composed and decomposed, are one stem.
    assert layout.output_stem("caf\u00e9.png", {layout.same_stem("cafe\u0301.")}) == "caf\u00e9~png"


@given(names)
def test_error_names_fit_and_are_recognised(name: str) -> None:
    error = layout.error_name(name)
    assert len(os.fsencode(error)) <= 255
    place = place_of(f"s/{error}", BARE)
    assert place is not None
    assert place.role is Role.OWN


def test_two_long_names_have_two_error_files() -> None:
    assert layout.error_name("x" * 250 + "a.jpg") != layout.error_name("x" * 250 + "b.jpg")


@pytest.mark.parametrize(
    ("name", "stem"), [("zwx", "zwx-r1"), ("a/b:c", "a_b_c-r1"), ("  . ", "model-r1"), ("Ärger", "Ärger-r1")]
)
def test_model_stem(name: str, stem: str) -> None:
    assert layout.model_stem(name, "r1") == stem


def test_a_session_is_found_after_a_move(tmp_path: Path) -> None:
    old, new = tmp_path / "Sessions" / "old", tmp_path / "Sessions" / "deep" / "new"
    (old / ".fastsd").mkdir(parents=True)
    (old / ".fastsd" / "session.json").write_text(json.dumps({"id": "1234abcd", "name": "old"}))
    assert layout.find_session_folder(tmp_path, "1234abcd", old) == old
    new.parent.mkdir()
    old.rename(new)
    assert layout.find_session_folder(tmp_path, "1234abcd", old) == new
    with pytest.raises(FileNotFoundError, match="no longer in"):
        layout.find_session_folder(tmp_path, "feedbeef", old)


def test_no_preview_lies_where_the_contact_sheet_does() -> None:
    assert layout.output_stem("a/Crops.png", set()) == "Crops~png"
    assert layout.output_stem("a/crops2.png", set()) == "crops2"
