"""The daemon's side of the search: which sessions it has looked at, and what it tells people."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon.prepare import Gone
from daemon.searching import index_folder
from daemon.status import describe_session
from handlers.search.store import Store, Twins
from tests.daemon.house import House

A = "Sessions/a"
MISSING = "The search model siglip2-base is not on this machine. Get it with: fastsd models get siglip2-base"


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path, webui={"kind": "none"}, search="miniature")
    yield made
    made.close()


def embed(house: House) -> int:
    """Bring everything to rest; gives how often the search's job ran by it."""
    house.settle()
    return house.work(kinds=("embed",))


def known(house: House) -> set[str]:
    store = Store(house.state / "search", "miniature", 1)
    try:
        return set(store.known())
    finally:
        store.close()


def test_it_is_off_unless_it_is_switched_on(tmp_path: Path) -> None:
    house = House(tmp_path, webui={"kind": "none"})
    house.pictures(A)
    assert embed(house) == 0
    assert not house.open_jobs("embed")
    assert not (house.state / "search").exists()
    house.close()


def test_a_session_is_looked_at_once_its_crops_and_captions_are_there(house: House) -> None:
    house.pictures(A)
    house.look()
    house.work(kinds=("crop",))
    assert not house.open_jobs("embed")
    assert embed(house) == 1
    assert known(house) == {f"{A}/{number}.jpg" for number in range(3)}
    assert embed(house) == 0
    assert not any(record["kind"] == "embed" for record in house.session(A).manifest.records.values())


@pytest.mark.parametrize("lost", [(), ("queue",), ("index", "queue")])
def test_a_restart_looks_at_nothing_again(house: House, lost: tuple[str, ...]) -> None:
    house.pictures(A)
    embed(house)
    house.restart(*lost)
    assert embed(house) == 0


def test_a_lost_index_is_made_again(house: House) -> None:
    house.pictures(A)
    embed(house)
    shutil.rmtree(house.state / "search")
    house.restart()
    assert embed(house) == 1
    assert len(known(house)) == 3


def test_what_comes_goes_changes_or_moves_is_followed(house: House) -> None:
    house.pictures(A)
    embed(house)
    house.write(f"{A}/new.jpg", "new")
    assert embed(house) == 1
    (house.root / A / "0.jpg").unlink()
    assert embed(house) == 1
    assert known(house) == {f"{A}/{name}.jpg" for name in ("1", "2", "new")}
    house.write(f"{A}/1.jpg", "another")
    assert embed(house) == 1
    (house.root / A).rename(house.root / "Sessions/b")
    assert embed(house) == 1
    assert {f"Sessions/b/{name}.jpg" for name in ("1", "2", "new")} <= known(house)


def test_a_job_about_the_past_is_dropped(house: House) -> None:
    house.pictures(A)
    house.settle()
    job = house.claim("embed")
    assert job is not None
    house.write(f"{A}/new.jpg", "new")
    house.settle()
    with pytest.raises(Gone):
        house.preparer.payload("embed", job.session, job.payload)


def test_weights_that_are_missing_are_told_and_hold_nothing_up(house: House) -> None:
    house.pictures(A)
    house.settle()
    jobs = [job for job in house.queue.jobs() if job.kind == "embed"]
    assert len(jobs) == 1
    status = describe_session(house.session(A), jobs, house.router.plan(A), 3, gates={"embed": MISSING})
    assert status.waits == [f"The search: {MISSING}"]
    assert status.state.startswith("idle")
    assert describe_session(house.session(A), jobs, house.router.plan(A), 3, gates={}).waits == []


def test_pictures_that_the_model_calls_the_same_are_told(house: House) -> None:
    house.twins = [Twins(f"{A}/1.jpg", f"{A}/4.jpg", 0.99)]
    house.pictures(A, 6)
    embed(house)
    told = "Nearly the same picture: 1.jpg = 4.jpg. Other poses, places and light teach more."
    assert house.router.plan(A).hints[0] == told


def test_each_model_has_an_index_of_its_own_inside_the_state_folder(tmp_path: Path) -> None:
    names = ("miniature", "siglip2-base", "mine/own", "../../etc", "..")
    folders = {index_folder(tmp_path, name) for name in names}
    assert len(folders) == len(names)
    assert all(folder.parent == tmp_path / "search" and ".." not in folder.parts for folder in folders)
