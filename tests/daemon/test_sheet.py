"""The contact sheet: drawn when the crops have settled, again when it would show something else, missed by nobody."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon.jobs import JobState
from daemon.prepare import Gone
from daemon.status import describe_session
from sessions.layout import SHEET
from sessions.manifest import Manifest
from tests.daemon.house import House

A = "Sessions/a"
FAILED: tuple[JobState, ...] = ("failed",)


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path, webui={"kind": "none"})
    yield made
    made.close()


def sheet(house: House) -> list[str]:
    """The lines of the sheet; workers of these tests write text."""
    return (house.root / A / SHEET).read_text().splitlines()


def draw(house: House) -> int:
    """Let everything settle, and draw the sheets that are wanted. Returns how many."""
    house.settle()
    return house.work(kinds=("sheet",))


def test_it_is_drawn_once_all_crops_and_captions_are_there(house: House) -> None:
    house.faces.add(b"picture 1")
    house.pictures(A)
    house.look()
    house.work(kinds=("crop",))
    assert not house.open_jobs("sheet")
    assert draw(house) == 1
    assert sheet(house) == ["0.jpg centre", "1.jpg face", "2.jpg centre"]
    assert draw(house) == 0


def test_without_a_captioner_the_crops_are_enough(house: House) -> None:
    house.captions_wait = "no captioner"
    house.pictures(A)
    assert draw(house) == 1


@pytest.mark.parametrize("lost", [(), ("queue",), ("index", "queue")])
def test_it_is_not_drawn_again_when_nothing_changed(house: House, lost: tuple[str, ...]) -> None:
    house.pictures(A)
    draw(house)
    house.restart(*lost)
    assert draw(house) == 0
    assert house.made.count(("sheet", "contact sheet")) == 1


def test_it_is_drawn_again_for_another_window_or_another_picture_or_when_somebody_removed_it(house: House) -> None:
    house.pictures(A)
    draw(house)
    house.write(f"{A}/crop.txt", "1: centre\n")
    assert draw(house) == 1, "the same window, and a person wants it"
    house.write(f"{A}/new.jpg", "new")
    assert draw(house) == 1
    (house.root / A / "0.jpg").unlink()
    assert draw(house) == 1
    assert [line.split()[0] for line in sheet(house)] == ["1.jpg", "2.jpg", "new.jpg"]
    (house.root / A / SHEET).unlink()
    house.router.plan(A)
    assert draw(house) == 1


def test_it_goes_with_the_last_picture(house: House) -> None:
    house.pictures(A)
    draw(house)
    for number in range(3):
        (house.root / A / f"{number}.jpg").unlink()
    assert draw(house) == 0
    assert not (house.root / A / SHEET).exists()
    assert Manifest.load(house.root / A).get("sheet", "") is None
    house.restart("index", "queue")
    house.pictures(A)
    assert draw(house) == 1


def test_while_pictures_arrive_it_is_not_drawn_for_each(house: House) -> None:
    house.needed = 60.0
    for number in range(3):
        house.write(f"{A}/{number}.jpg", f"{number}")
        house.now += 9.0
        assert draw(house) == 0
    house.now += 11.0
    house.router.plan(A)
    assert draw(house) == 1
    assert len(sheet(house)) == 3


def test_one_that_would_show_the_past_is_not_drawn(house: House) -> None:
    house.pictures(A)
    house.settle()
    job = house.claim("sheet")
    assert job is not None
    house.write(f"{A}/new.jpg", "new")
    house.settle()
    with pytest.raises(Gone):
        house.preparer.payload("sheet", job.session, job.payload)


def test_a_large_session_shows_its_newest_pictures(house: House) -> None:
    for number in range(203):
        house.write(f"{A}/{number:03}.jpg", f"{number}", mtime=1e9 + number)
    assert draw(house) == 1
    assert [line.split()[0] for line in sheet(house)] == [f"{number:03}.jpg" for number in range(3, 203)]


def test_a_picture_called_crops_keeps_its_own_preview(house: House) -> None:
    house.write(f"{A}/crops.jpg", "of people harvesting")
    assert draw(house) == 1
    assert house.files(f"{A}/previews") == {"crops.jpg", "crops~jpg.jpg"}
    house.write(f"{A}/captions/crops.txt", "a person's words\n")
    house.settle()
    payload = house.payloads[-1]
    assert Path(payload["output"]).name == "crops~jpg.jpg"


def test_its_failure_is_nobodys_trouble(house: House) -> None:
    house.pictures(A)
    house.settle()
    job = house.claim("sheet")
    assert job is not None
    for _ in range(2):
        house.queue.fail(job, {"type": "OSError", "message": "odd", "traceback": ""}, house.now)
        house.now += 1000
        job = house.claim("sheet") or job
    session = house.session(A)
    failed = house.queue.jobs(states=FAILED)
    assert [job.kind for job in failed] == ["sheet"]
    status = describe_session(session, failed, house.router.plan(A), 3, gates={})
    assert status.trouble == []
    assert status.state.startswith("idle")
    assert draw(house) == 0


def test_what_the_set_lacks_is_in_the_plan(house: House) -> None:
    house.pictures(A, 2)
    house.write(f"{A}/copy.jpg", "picture 1")
    house.write(f"{A}/crop.txt", "9.jpg: centre\n")
    house.look()
    assert not any("same file" in line for line in house.plans[A].hints), "not before all are there"
    house.settle()
    assert house.plans[A].hints == [
        "Only 2 pictures: ten to twenty that differ in pose, place and light teach far more.",
        "The same file more than once: 1.jpg = copy.jpg. One of each is enough.",
        "Smaller than 512 pixels: 0.jpg, 1.jpg. A larger version would train better.",
        "crop.txt names what is no picture here: 9.jpg.",
    ]
