"""What happens when people change things: real files, a real index and queue, jobs that end as workers' do."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon.prepare import Gone
from sessions.layout import error_name
from sessions.manifest import Manifest, read_identity
from tests.daemon.house import TODAY, House

A = "Sessions/a"


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path)
    yield made
    made.close()


def trash(house: House, session: str = A) -> set[str]:
    return house.files(f"{session}/.fastsd/trash/{TODAY.isoformat()}")


def records(house: House, session: str = A) -> set[tuple[str, str]]:
    return set(Manifest.load(house.root / session).records)


def test_a_picture_is_cropped_and_captioned_once(house: House) -> None:
    house.write(f"{A}/instance_images/x.jpg")
    house.settle()
    assert records(house) == {("crop", "instance_images/x.jpg"), ("caption", "instance_images/x.jpg")}
    made = {"crops/x.jpg", "captions/x.txt", "captions/x.json", "previews/x.jpg", "train.example.yaml"}
    assert house.files(A) >= made
    house.look()
    house.router.reroute()
    assert house.open_jobs() == []
    assert len(house.made) == 2


def test_the_outputs_of_a_picture_that_goes_are_in_the_trash(house: House) -> None:
    picture = house.write(f"{A}/x.jpg")
    house.settle()
    picture.unlink()
    house.settle()
    assert trash(house) == {"crops/x.jpg", "captions/x.txt", "captions/x.json", "previews/x.jpg"}
    assert not house.files(f"{A}/crops") | house.files(f"{A}/captions") | house.files(f"{A}/previews")
    assert records(house) == set()


def test_a_caption_that_a_person_edited_stays_when_its_picture_goes(house: House) -> None:
    picture = house.write(f"{A}/x.jpg")
    house.settle()
    house.write(f"{A}/captions/x.txt", "my own words\n")
    house.settle()
    picture.unlink()
    house.settle()
    assert house.files(f"{A}/captions") == {"x.txt"}
    assert "captions/x.json" in trash(house)


def test_a_caption_beside_the_picture_is_never_touched(house: House) -> None:
    picture = house.write(f"{A}/x.jpg")
    house.write(f"{A}/x.txt", "beside\n")
    house.settle()
    assert house.files(f"{A}/captions") == {"x.json"}, "no second text that says otherwise"
    picture.unlink()
    house.settle()
    assert (house.root / A / "x.txt").read_text() == "beside\n"


def test_a_picture_that_changes_is_made_again_and_a_persons_caption_stays(house: House) -> None:
    house.write(f"{A}/x.jpg", b"first")
    house.settle()
    house.write(f"{A}/captions/x.txt", "my own words\n")
    house.write(f"{A}/x.jpg", b"the second")
    house.settle()
    assert (house.root / A / "crops/x.jpg").read_bytes() == b"the second"
    assert (house.root / A / "captions/x.txt").read_text() == "my own words\n"
    assert [kind for kind, _ in house.made].count("crop") == 2


def test_two_pictures_of_one_stem_have_outputs_of_their_own(house: House) -> None:
    house.write(f"{A}/x.jpg", b"jpg")
    house.write(f"{A}/sub/X.png", b"png")
    house.settle()
    crops = {name: (house.root / A / "crops" / name).read_bytes() for name in house.files(f"{A}/crops")}
    assert sorted(crops.values()) == [b"jpg", b"png"]
    (house.root / A / "x.jpg").unlink()
    house.settle()
    left = {(house.root / A / "crops" / name).read_bytes() for name in house.files(f"{A}/crops")}
    assert left == {b"png"}
    house.write(f"{A}/x.webp", b"webp")
    house.settle()
    left = {(house.root / A / "crops" / name).read_bytes() for name in house.files(f"{A}/crops")}
    assert left == {b"png", b"webp"}


def test_a_renamed_session_is_the_same_and_nothing_is_queued(house: House) -> None:
    house.pictures(A)
    house.settle()
    identity, made = house.session(A).id, list(house.made)
    (house.root / A).rename(house.root / "Sessions/b")
    house.look()
    assert house.session("Sessions/b").id == identity
    assert A not in house.sessions
    assert house.open_jobs() == []
    assert house.made == made
    assert not (house.root / A).exists(), "nothing may bring the old folder back"


def test_jobs_of_a_session_that_was_renamed_go_to_its_new_place(house: House) -> None:
    house.write(f"{A}/x.jpg")
    house.look()
    job = house.claim("crop")
    assert job is not None
    (house.root / A).rename(house.root / "Sessions/b")
    payload = house.preparer.payload(job.kind, job.session, job.payload)
    assert payload["source"] == os.fspath(house.root / "Sessions/b/x.jpg")
    assert payload["output"] == os.fspath(house.root / "Sessions/b/crops/x.jpg")


def test_a_session_renamed_while_a_job_writes_leaves_nothing_behind(house: House) -> None:
    house.write(f"{A}/x.jpg")
    house.look()
    job = house.claim("crop")
    assert job is not None

    def rename_and_write_late() -> None:
        (house.root / A).rename(house.root / "Sessions/b")
        house.write(f"{A}/crops/x.jpg", "late")
        (house.root / "Sessions/b/crops/x.jpg").unlink()

    with pytest.raises(OSError, match="renamed"):
        house.finish(job, rename_and_write_late)
    assert not (house.root / A).exists()
    assert Manifest.load(house.root / "Sessions/b").get("crop", "x.jpg") is None


def test_swapped_sessions_keep_their_own_manifests(house: House) -> None:
    house.write(f"{A}/x.jpg", b"of a")
    house.write("Sessions/b/x.jpg", b"of b, longer")
    house.settle()
    first, second, made = house.session(A).id, house.session("Sessions/b").id, len(house.made)
    (house.root / A).rename(house.root / "aside")
    (house.root / "Sessions/b").rename(house.root / A)
    (house.root / "aside").rename(house.root / "Sessions/b")
    house.settle()
    assert (house.session(A).id, house.session("Sessions/b").id) == (second, first)
    assert len(house.made) == made


def test_a_session_removed_and_made_anew_at_once_is_another_one(house: House) -> None:
    house.pictures(A)
    house.settle()
    identity = house.session(A).id
    shutil.rmtree(house.root / A)
    house.write(f"{A}/0.jpg", "a new picture")
    house.settle()
    assert house.session(A).id != identity
    assert records(house) == {("crop", "0.jpg"), ("caption", "0.jpg")}


@pytest.mark.parametrize("copy", ["Sessions/a (copy)", "Sessions/0 copy", "Sessions/z copy"])
@pytest.mark.parametrize("lost", [(), ("index", "queue")], ids=["running", "database lost"])
def test_a_copied_session_gets_an_identity_of_its_own(house: House, copy: str, lost: tuple[str, ...]) -> None:
    house.pictures(A)
    house.settle()
    identity, made = house.session(A).id, list(house.made)
    if lost:
        house.close()
    shutil.copytree(house.root / A, house.root / copy)
    if lost:
        house.restart(*lost)
    house.settle()
    assert house.session(A).id == identity
    assert house.session(copy).id not in ("", identity)
    assert house.made == made, "a copy carries what was made, too"
    house.restart("index", "queue")
    house.settle()
    assert read_identity(house.root / A) != read_identity(house.root / copy)
    assert house.session(A).id == identity
    assert house.made == made


def test_a_nested_folder_with_its_own_spec_splits_off(house: House) -> None:
    house.write(f"{A}/x.jpg", b"outer")
    house.write(f"{A}/sub/y.jpg", b"inner")
    house.settle()
    assert records(house) >= {("crop", "sub/y.jpg")}
    house.write(f"{A}/sub/train.yaml", "base: miniature\n")
    house.settle()
    assert records(house) == {("crop", "x.jpg"), ("caption", "x.jpg")}
    assert records(house, f"{A}/sub") >= {("crop", "y.jpg"), ("caption", "y.jpg")}
    assert "crops/y.jpg" in trash(house)
    (house.root / A / "sub/train.yaml").unlink()
    house.settle()
    assert records(house) >= {("crop", "x.jpg"), ("crop", "sub/y.jpg")}
    assert f"{A}/sub" not in house.sessions


def test_a_spec_and_its_pictures_that_come_at_once_split_off_at_once(house: House) -> None:
    house.write(f"{A}/x.jpg", b"outer")
    house.write(f"{A}/sub/y.jpg", b"inner")
    house.write(f"{A}/sub/train.yaml", "base: miniature\n")
    house.settle()
    assert records(house) == {("crop", "x.jpg"), ("caption", "x.jpg")}
    # The reroute that follows must not forget a train.yaml that the index does not hold yet.
    house.write(f"{A}/deep/z.jpg", b"deep")
    spec = house.write(f"{A}/deep/train.yaml", "base: miniature\n")
    facts = [fact for fact in house._walk() if fact.path.startswith(f"{A}/deep/")]
    house.router.settled(facts)
    house.router.reroute()
    house.index.record(facts)
    assert f"{A}/deep" in house.router.shape.nested
    assert spec.exists()


@pytest.mark.parametrize("output", ["crops/x.jpg", "captions/x.json", "captions/x.txt", "previews/x.jpg"])
def test_outputs_that_somebody_removed_are_made_again(house: House, output: str) -> None:
    house.write(f"{A}/x.jpg")
    house.settle()
    before = len(house.made)
    (house.root / A / output).unlink()
    house.restart()
    house.settle()
    assert (house.root / A / output).exists()
    assert len(house.made) == before + 1
    record = Manifest.load(house.root / A).get("caption", "x.jpg")
    assert record is not None
    assert record["text_sha256"], "the text that stands is still known as ours"


def test_a_touched_picture_is_stamped_and_not_made_again(house: House) -> None:
    house.write(f"{A}/x.jpg", mtime=1_700_000_000)
    house.settle()
    os.utime(house.root / A / "x.jpg", (1_700_000_500, 1_700_000_500))
    house.look()
    assert house.open_jobs() == []
    for kind in ("crop", "caption"):
        record = Manifest.load(house.root / A).get(kind, "x.jpg")
        assert record is not None
        assert record["mtime_ns"] == 1_700_000_500 * 10**9


def test_other_content_of_equal_size_is_made_again(house: House) -> None:
    house.write(f"{A}/x.jpg", b"one", mtime=1_700_000_000)
    house.settle()
    house.write(f"{A}/x.jpg", b"two", mtime=1_700_000_500)
    house.look()
    assert house.open_jobs() == [("caption", "x.jpg"), ("crop", "x.jpg")]
    house.settle()
    assert (house.root / A / "crops/x.jpg").read_bytes() == b"two"


def test_a_picture_that_goes_while_it_is_compared_leaves_nothing(house: House) -> None:
    picture = house.write(f"{A}/x.jpg", b"one", mtime=1_700_000_000)
    house.settle()
    house.write(f"{A}/x.jpg", b"two", mtime=1_700_000_500)
    facts = list(house._walk())
    picture.unlink()
    house.router.settled([fact for fact in facts if fact.path.endswith("x.jpg")])
    house._after()
    house.settle()
    assert not house.files(f"{A}/crops") | house.files(f"{A}/captions")
    assert records(house) == set()


def test_a_picture_that_goes_while_it_is_worked_on_leaves_nothing(house: House) -> None:
    picture = house.write(f"{A}/x.jpg")
    house.look()
    job = house.claim("crop")
    assert job is not None

    def remove_and_notice() -> None:
        picture.unlink()
        house.look()

    house.finish(job, remove_and_notice)
    house.settle()
    assert not house.files(f"{A}/crops")
    assert records(house) == set()


def test_a_picture_that_went_while_nobody_looked_and_the_index_was_lost(house: House) -> None:
    house.pictures(A)
    house.settle()
    house.close()
    (house.root / A / "0.jpg").unlink()
    house.restart("index")
    house.settle()
    assert house.files(f"{A}/crops") == {"1.jpg", "2.jpg"}
    assert "crops/0.jpg" in trash(house)


@pytest.mark.parametrize("lost", [(), ("index",), ("queue",), ("index", "queue")], ids=str)
@pytest.mark.parametrize("worked", [0, 3, 100])
def test_a_lost_database_changes_nothing(house: House, lost: tuple[str, ...], worked: int) -> None:
    house.pictures(A)
    house.pictures("Sessions/b", 2)
    house.look()
    house.work(at_most=worked)
    wanted, made = house.open_jobs(), len(house.made)
    house.restart(*lost)
    house.look()
    assert house.open_jobs() == wanted
    house.settle()
    assert len(house.made) == 10
    assert len(house.made) - made == len(wanted)


def test_a_job_whose_result_is_on_record_is_not_done_again_after_a_kill(house: House) -> None:
    house.write(f"{A}/x.jpg")
    house.look()
    job = house.claim("crop")
    assert job is not None
    payload = house.preparer.payload(job.kind, job.session, job.payload)
    assert payload["output"].endswith("crops/x.jpg")
    house.finish(job)
    with pytest.raises(Gone, match="done"):
        house.preparer.payload(job.kind, job.session, job.payload)


def test_a_refused_picture_is_told_once_and_tried_again_when_it_is_mended(house: House) -> None:
    house.refuses = {b"broken"}
    house.write(f"{A}/x.jpg", b"broken")
    house.settle()
    error = house.root / A / "x.jpg.error.txt"
    assert "Save it anew." in error.read_text()
    house.restart("queue", "index")
    house.settle()
    assert house.made.count(("crop", "x.jpg")) == 1
    house.write(f"{A}/x.jpg", b"whole now")
    house.settle()
    assert not error.exists()
    assert records(house) == {("crop", "x.jpg"), ("caption", "x.jpg")}


def test_a_deleted_error_file_has_its_picture_tried_again(house: House) -> None:
    house.refuses = {b"broken"}
    house.write(f"{A}/x.jpg", b"broken")
    house.settle()
    house.look()
    house.refuses = set()
    (house.root / A / "x.jpg.error.txt").unlink()
    house.settle()
    assert records(house) == {("crop", "x.jpg"), ("caption", "x.jpg")}


def test_a_long_name_has_its_error_file_found_again(house: House) -> None:
    house.refuses = {b"broken"}
    name = "ä" * 120 + ".jpg"
    house.write(f"{A}/{name}", b"broken")
    house.settle()
    error = house.root / A / error_name(name)
    assert error.exists()
    house.look()
    house.refuses = set()
    error.unlink()
    house.settle()
    assert len(house.files(f"{A}/crops")) == 1


def test_the_error_file_of_a_picture_that_goes_goes_with_it(house: House) -> None:
    house.refuses = {b"broken"}
    house.write(f"{A}/x.jpg", b"broken")
    house.settle()
    (house.root / A / "x.jpg").unlink()
    house.settle()
    assert not (house.root / A / "x.jpg.error.txt").exists()
    assert records(house) == set()


def test_a_name_that_is_no_utf8_has_a_session_as_any_other(house: House) -> None:
    folder = os.fsdecode(b"Sessions/caf\xe9")
    house.write(f"{folder}/\udce9.jpg")
    house.settle()
    identity = house.session(folder).id
    house.restart("index", "queue")
    house.settle()
    assert house.session(folder).id == identity
    assert len(house.made) == 2


def test_an_unmounted_tree_is_not_an_empty_one(house: House) -> None:
    house.pictures(A)
    house.look()
    job = house.claim("crop")
    assert job is not None
    away = house.root.with_name("away")
    house.root.rename(away)
    house.root.mkdir()
    from handlers.context import Waiting

    with pytest.raises(Waiting, match="mounted"):
        house.preparer.payload(job.kind, job.session, job.payload)
    shape = house.router.shape
    house.router.reroute()
    assert house.router.shape == shape
    assert list(house.root.iterdir()) == []
    house.root.rmdir()
    away.rename(house.root)
    assert house.preparer.payload(job.kind, job.session, job.payload)["source"].endswith("0.jpg")


def test_a_root_with_pictures_is_one_session(house: House) -> None:
    house.write("x.jpg", b"top")
    house.write("deep/y.jpg", b"deep")
    house.settle()
    assert list(house.sessions) == [""]
    assert house.files("crops") == {"x.jpg", "y.jpg"}


def test_sessions_that_are_none_any_more_have_no_jobs(house: House) -> None:
    house.write("deep/y.jpg", b"deep")
    house.look()
    assert list(house.sessions) == ["deep"]
    house.write("x.jpg", b"top")
    house.settle()
    assert list(house.sessions) == [""]
    assert {source for _, source in house.made} == {"x.jpg", "deep/y.jpg"}
    assert not (house.root / "deep/crops").exists()


def test_more_sessions_than_stay_in_memory(house: House) -> None:
    for number in range(20):
        house.write(f"Sessions/{number}/x.jpg", f"picture {number}")
    house.settle()
    for number in range(20):
        (house.root / f"Sessions/{number}/crops/x.jpg").unlink()
    house.restart()
    house.settle()
    assert all((house.root / f"Sessions/{number}/crops/x.jpg").exists() for number in range(20))
    assert len(house.made) == 60


def test_what_the_manifest_holds_can_be_read_by_people(house: House) -> None:
    house.write(f"{A}/x.jpg")
    house.settle()
    lines = (house.root / A / ".fastsd/manifest.jsonl").read_text().splitlines()
    assert all("stale" not in json.loads(line) for line in lines)
