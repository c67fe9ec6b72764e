"""Sessions: who they are, wherever their folder goes, and what their outputs are called."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.session import Session, Sessions
from sessions.layout import same_stem
from sessions.manifest import Manifest, read_identity


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        (tmp_path / "Sessions" / name).mkdir(parents=True)
    return tmp_path


def test_an_identity_is_given_once(root: Path) -> None:
    first = Sessions(root).at("Sessions/a").id
    assert Sessions(root).at("Sessions/a").id == first
    assert Sessions(root).at("Sessions/b").id != first


@pytest.mark.parametrize("forgetful", [False, True], ids=["running", "started anew"])
def test_a_renamed_session_is_found_by_its_identity(root: Path, forgetful: bool) -> None:
    sessions = Sessions(root)
    identity = sessions.at("Sessions/a").id
    (root / "elsewhere").mkdir()
    (root / "Sessions/a").rename(root / "elsewhere/c")
    if forgetful:
        sessions = Sessions(root)
    assert sessions.by_id(identity).path == "elsewhere/c"
    assert list(sessions) == ["elsewhere/c"]
    found = read_identity(root / "elsewhere/c")
    assert found is not None
    assert found.name == "c"


def test_a_session_that_is_gone_is_not_found_and_does_not_come_back(root: Path) -> None:
    sessions = Sessions(root)
    identity = sessions.at("Sessions/a").id
    sessions.release()
    shutil.rmtree(root / "Sessions/a")
    with pytest.raises(LookupError):
        sessions.by_id(identity)
    with pytest.raises(FileNotFoundError):
        sessions.at("Sessions/a")
    assert not (root / "Sessions/a").exists()
    assert list(sessions) == []
    assert dict(sessions.unwritable) == {}


def test_looking_for_one_does_not_forget_the_root(root: Path) -> None:
    sessions = Sessions(root)
    sessions.at("")
    with pytest.raises(LookupError):
        sessions.by_id("no such")
    assert "" in sessions


@pytest.mark.parametrize("order", [("a", "copy"), ("copy", "a")], ids=" then ".join)
def test_the_original_keeps_its_identity_whichever_is_met_first(root: Path, order: tuple[str, str]) -> None:
    identity = Sessions(root).at("Sessions/a").id
    shutil.copytree(root / "Sessions/a", root / "Sessions/copy")
    sessions = Sessions(root)
    found = {name: sessions.at(f"Sessions/{name}").id for name in order}
    assert found["a"] == identity
    assert found["copy"] != identity
    again = Sessions(root)
    assert {name: again.at(f"Sessions/{name}").id for name in reversed(order)} == found


def test_of_two_copies_whose_original_is_gone_one_keeps_the_identity(root: Path) -> None:
    identity = Sessions(root).at("Sessions/a").id
    for name in ("c", "d"):
        shutil.copytree(root / "Sessions/a", root / "Sessions" / name)
    shutil.rmtree(root / "Sessions/a")
    sessions = Sessions(root)
    ids = [sessions.at(f"Sessions/{name}").id for name in ("c", "d")]
    assert ids[0] == identity
    assert ids[1] != identity


def test_another_session_in_a_known_folder_is_seen(root: Path) -> None:
    sessions = Sessions(root)
    first = sessions.at("Sessions/a").id
    shutil.rmtree(root / "Sessions/a")
    (root / "Sessions/a").mkdir()
    assert sessions.at("Sessions/a").id == first
    sessions.refresh("Sessions/a")
    assert "Sessions/a" not in sessions
    assert sessions.at("Sessions/a").id != first


def test_an_identity_that_cannot_be_read_now_is_not_replaced(root: Path) -> None:
    identity = root / "Sessions/a/.fastsd/session.json"
    identity.mkdir(parents=True)  # whoever reads it gets an error, even the superuser
    sessions = Sessions(root)
    with pytest.raises(OSError, match="directory"):
        sessions.at("Sessions/a")
    assert "Sessions/a" in sessions.unwritable
    assert identity.is_dir()


def test_a_damaged_identity_is_replaced(root: Path) -> None:
    Sessions(root).at("Sessions/a")
    (root / "Sessions/a/.fastsd/session.json").write_text('{"id": ')
    identity = Sessions(root).at("Sessions/a").id
    assert Sessions(root).at("Sessions/a").id == identity


def test_temporary_files_of_dead_processes_are_swept(root: Path) -> None:
    crops = root / "Sessions/a/crops"
    crops.mkdir()
    dead, ours = crops / ".fastsd-tmp-4194305-aa.jpg", crops / f".fastsd-tmp-{os.getpid()}-aa.jpg"
    dead.write_bytes(b"x")
    ours.write_bytes(b"x")
    Sessions(root).at("Sessions/a")
    assert not dead.exists()
    assert ours.exists()


def test_only_some_manifests_stay_in_memory(tmp_path: Path) -> None:
    sessions = Sessions(tmp_path)
    for number in range(40):
        (tmp_path / str(number)).mkdir()
        sessions.at(str(number)).manifest.append([{"kind": "crop", "source": "x.jpg", "stem": "x"}])
    assert len(list(sessions)) == 40
    assert len(sessions._loaded) < 40
    assert sessions.at("0").manifest.get("crop", "x.jpg")


def test_what_is_outdated_is_still_known_as_ours(root: Path) -> None:
    session = Sessions(root).at("Sessions/a")
    session.manifest.append([{"kind": "crop", "source": "x.jpg", "size": 1, "mtime_ns": 2, "outputs": ["crops/x.jpg"]}])
    session.outdate("crop", "x.jpg")
    session.outdate("crop", "no such.jpg")
    record = session.manifest.get("crop", "x.jpg")
    assert record is not None
    assert record["stale"]
    assert record["outputs"] == ["crops/x.jpg"]
    assert "stale" not in (Manifest.load(session.folder).get("crop", "x.jpg") or {})


def test_paths_go_in_and_out(root: Path) -> None:
    sessions = Sessions(root)
    for path in ("", "Sessions/a"):
        session = sessions.at(path)
        assert session.relative(session.tree_path("deep/x.jpg")) == "deep/x.jpg"
        assert session.inside(session.folder / "deep/x.jpg") == "deep/x.jpg"
    assert sessions.at("").name == root.name


SOURCES = st.text(alphabet="aAäÄ~.-2", min_size=1, max_size=6).flatmap(
    lambda stem: st.sampled_from([f"{stem}.jpg", f"{stem}.png", f"deep/{stem}.jpg", f"{stem}.JPG"]),
)


@given(st.lists(st.tuples(SOURCES, st.booleans()), max_size=20))
def test_no_two_living_pictures_share_a_stem(steps: list[tuple[str, bool]]) -> None:
    session = Session(Path("/nowhere"), "s", "id", Manifest(Path("/nowhere/s")))
    alive: dict[str, str] = {}
    for source, comes in steps:
        if comes:
            stem = session.stem_for(source)
            assert alive.setdefault(source, stem) == stem, "the same as long as the picture stays"
            assert session.source_of(f"{stem}.txt") == source
        else:
            session.release_stem(source)
            alive.pop(source, None)
        folded = [same_stem(stem + ".") for stem in alive.values()]
        assert len(set(folded)) == len(folded)
