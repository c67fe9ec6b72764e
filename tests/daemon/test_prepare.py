"""The last look before work begins: payloads in absolute paths, and jobs that have nothing to do any more."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from daemon.jobs import Job
from daemon.material import noun_of, person_text
from daemon.prepare import Gone
from sessions.refusal import Refusal
from tests.daemon.house import SPEC, House

A = "Sessions/a"


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path, captioner="miniature", limits={"picture_pixels": 1234})
    yield made
    made.close()


def first_job(house: House, kind: str) -> Job:
    return next(job for job in house.queue.jobs() if job.kind == kind)


def payload(house: House, job: Job) -> dict[str, Any]:
    return house.preparer.payload(job.kind, job.session, job.payload)


def test_paths_are_absolute_and_settings_are_in(house: House) -> None:
    house.write(f"{A}/deep/x.jpg")
    (house.root / "Models").mkdir()
    house.look()
    folder = house.root / A
    crop, caption = payload(house, first_job(house, "crop")), payload(house, first_job(house, "caption"))
    assert crop == {
        "source": os.fspath(folder / "deep/x.jpg"),
        "output": os.fspath(folder / "crops/x.jpg"),
        "mode": "smart",
        "resolution": 512,
        "pixel_limit": 1234,
    }
    assert caption == {
        "source": os.fspath(folder / "deep/x.jpg"),
        "text": os.fspath(folder / "captions/x.txt"),
        "sidecar": os.fspath(folder / "captions/x.json"),
        "preview": os.fspath(folder / "previews/x.jpg"),
        "written": None,
        "captioner": "miniature",
        "precision": "auto",
        "check": "auto",
        "models": os.fspath(house.root / "Models"),
        "pixel_limit": 1234,
    }


@pytest.mark.parametrize(
    ("content", "stands"),
    [(b"a line\n", True), (b"\n\n later\n", True), (b"", False), (b" \n\t\n", False), (b"\xef\xbb\xbf", False)],
)
def test_an_empty_text_beside_a_picture_is_no_caption(house: House, content: bytes, stands: bool) -> None:
    house.write(f"{A}/x.jpg")
    house.write(f"{A}/x.txt", content)
    house.look()
    assert (payload(house, first_job(house, "caption"))["text"] is None) == stands
    assert (person_text(house.root / A / "x.jpg") is not None) == stands


def test_a_second_caption_knows_what_was_written_first(house: House) -> None:
    house.write(f"{A}/x.jpg", b"first")
    house.settle()
    house.write(f"{A}/x.jpg", b"the second")
    house.look()
    record = house.session(A).manifest.get("caption", "x.jpg")
    assert record is not None
    assert payload(house, first_job(house, "caption"))["written"] == record["text_sha256"]


@pytest.mark.parametrize("what", ["changed", "removed", "touched", "session removed"])
def test_a_job_whose_picture_is_another_one_by_now_is_dropped(house: House, what: str) -> None:
    file = house.write(f"{A}/x.jpg", mtime=1_700_000_000)
    house.look()
    job = first_job(house, "crop")
    house.write("Sessions/b/keeps the tree from being empty.txt", "x")
    match what:
        case "changed":
            house.write(f"{A}/x.jpg", b"other content", mtime=1_700_000_000)
        case "removed":
            file.unlink()
        case "touched":
            os.utime(file, (1, 1))
        case _:
            shutil.rmtree(house.root / A)
    with pytest.raises(Gone):
        payload(house, job)


def test_a_run_that_begins_gets_everything_it_needs(house: House) -> None:
    house.pictures(A)
    house.write(f"{A}/train.yaml", SPEC + "name: my model\n")
    house.settle()
    job = first_job(house, "train")
    given = payload(house, job)
    assert given["folder"] == os.fspath(house.root / A)
    assert given["root"] == os.fspath(house.root)
    assert given["session"] == house.session(A).id
    assert (given["name"], given["base"], given["run"]) == ("my model", "miniature", job.payload["run"])
    assert given["spec"]["base"] == "miniature"
    assert [Path(picture["source"]).name for picture in given["pictures"]] == ["0.jpg", "1.jpg", "2.jpg"]
    assert all(picture["sha256"] and picture["box"] for picture in given["pictures"])
    assert given["devices"] == [], "each GPU for itself"
    crew = replace(house.preparer, crew=("cuda:0", "cuda:1"))
    assert crew.payload(job.kind, job.session, job.payload)["devices"] == ["cuda:0", "cuda:1"]


def test_a_run_whose_spec_went_before_it_began_is_dropped(house: House) -> None:
    house.pictures(A)
    house.write(f"{A}/train.yaml", SPEC)
    house.settle()
    (house.root / A / "train.yaml").unlink()
    with pytest.raises(Gone):
        payload(house, first_job(house, "train"))


def test_what_is_on_record_is_not_done_twice(house: House) -> None:
    house.pictures(A)
    house.write(f"{A}/train.yaml", SPEC)
    house.settle()
    jobs: list[Job] = []
    for kind in ("train", "convert", "publish"):
        if kind == "publish":
            model = first_job(house, kind).payload["model"]
            house.session(A).manifest.append([{"kind": "publish", "run": jobs[0].payload["run"], "outputs": [model]}])
            jobs.append(first_job(house, kind))
        else:
            job = house.claim(kind)
            assert job is not None
            jobs.append(job)
            house.finish(job)
            house._after()
    for job in jobs:
        with pytest.raises(Gone):
            payload(house, job)


def test_a_lora_is_published_as_one(house: House) -> None:
    house.pictures(A)
    house.write(f"{A}/train.yaml", SPEC)
    house.settle()
    house.work(kinds=("train",))
    assert payload(house, first_job(house, "convert"))["models"] is None
    (house.root / "Models").mkdir()
    assert payload(house, first_job(house, "convert"))["models"] == str(house.root / "Models")
    house.work(kinds=("convert",))
    job = first_job(house, "publish")
    about = {"model_kind": "lora", "family": "sd1", "trigger": "zwx cat"}
    assert about.keys().isdisjoint(payload(house, job))
    given = payload(house, replace(job, payload={**job.payload, **about}))
    assert {key: given[key] for key in about} == about
    assert given["webui"]["loras"] is None


def test_a_model_that_is_gone_is_not_published(house: House) -> None:
    house.pictures(A)
    house.write(f"{A}/train.yaml", SPEC)
    house.settle()
    house.work(kinds=("train", "convert"))
    job = first_job(house, "publish")
    given = payload(house, job)
    assert Path(given["model"]).exists()
    assert given["webui"]["url"] == "http://127.0.0.1:7860"
    Path(given["model"]).unlink()
    with pytest.raises(Gone):
        payload(house, job)


@pytest.mark.parametrize("wanted", ["last", "run", "model"])
def test_a_run_that_goes_further_gets_the_model_of_the_one_before(wanted: str, house: House) -> None:
    house.pictures(A)
    house.write(f"{A}/train.yaml", SPEC)
    house.settle()
    house.work(kinds=("train", "convert"))
    [made] = house.session(A).manifest.of_kind("convert")
    model = made["outputs"][0]
    named = {"last": "last", "run": made["run"], "model": Path(model).stem}[wanted]
    house.write(f"{A}/train.yaml", f"start: now\ncontinue: {named}\n")
    house.settle()
    job = first_job(house, "train")
    assert job.payload["run"] != made["run"]
    assert payload(house, job)["continued"] == {"run": made["run"], "model": model}
    (house.root / A / model).unlink()
    with pytest.raises(Refusal, match=r"model .* is gone"):
        payload(house, job)


@pytest.mark.parametrize("wanted", ["last", "a", "a.ckpt"])
def test_an_old_session_goes_on_from_its_model(wanted: str, house: House) -> None:
    """A session of fast-stable-diffusion: no runs, and a model of its name."""
    house.pictures(A)
    house.write(f"{A}/a.ckpt", "weights")
    house.write(f"{A}/train.yaml", f"start: now\ncontinue: {wanted}\n")
    house.settle()
    house.work(kinds=("crop", "caption"))
    house.settle()
    assert payload(house, first_job(house, "train"))["continued"] == {"run": "", "model": "a.ckpt"}


def test_a_run_that_nobody_knows_cannot_be_gone_on_from(house: House) -> None:
    house.pictures(A)
    house.write(f"{A}/train.yaml", "start: now\ncontinue: yesterday\n")
    house.settle()
    house.work()
    assert not [job for job in house.queue.jobs() if job.kind == "train"]
    assert "no finished run yesterday" in (house.root / A / "train.yaml.error.txt").read_text()


def test_the_last_run_is_waited_for(house: House) -> None:
    house.pictures(A)
    house.write(f"{A}/train.yaml", SPEC)
    house.settle()
    house.work(kinds=("train",))
    house.write(f"{A}/train.yaml", "start: now\ncontinue: last\n")
    house.settle()
    assert len({job.payload["run"] for job in house.queue.jobs() if job.kind == "train"}) == 1
    assert any("continue: last waits for the model of run" in line for line in house.plans[A].waits)
    house.work(kinds=("convert",))
    house.settle()
    assert len({job.payload["run"] for job in house.queue.jobs() if job.kind == "train"}) == 2


@pytest.mark.parametrize(("phrase", "noun"), [("a snowman", "snowman"), ("The red car", "red car"), ("a", "a")])
def test_nouns(phrase: str, noun: str) -> None:
    assert noun_of(phrase) == noun
