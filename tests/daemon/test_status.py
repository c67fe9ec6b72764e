"""What people see: STATUS.txt and the lines of ``fastsd status``."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from daemon.jobs import Job
from daemon.planner import Plan
from daemon.status import STALE_AFTER, describe_progress, describe_session, session_json, write_status
from daemon.terminal import bar_words
from sessions.refusal import Refusal
from sessions.status import SessionStatus, render
from tests.daemon.house import House

A = "Sessions/a"
NOW = datetime(2026, 3, 14, 12, 0, 0, tzinfo=UTC)


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path)
    made.pictures(A)
    made.look()
    yield made
    made.close()


def told(house: House, plan: Plan | None = None, gates: dict[str, str] | None = None) -> SessionStatus:
    session = house.session(A)
    jobs = house.queue.jobs(session=session.id, states=("ready", "running", "waiting", "failed"))
    return describe_session(session, jobs, plan or Plan(), 3, gates=gates or {})


def with_progress(job: Job, **progress: Any) -> Job:
    return replace(job, progress=progress)


def test_what_is_to_do_is_counted(house: House) -> None:
    status = told(house)
    assert (status.name, status.pictures, status.cropped, status.captioned) == ("a", 3, 0, 0)
    assert status.state == "6 jobs to do"
    house.work(kinds=("crop",))
    assert (told(house).cropped, told(house).state) == (3, "3 jobs to do")
    house.work()
    assert told(house).state == "idle: a train.yaml starts training (rename train.example.yaml)"


def test_what_runs_is_told_with_how_far_it_is(house: House) -> None:
    job = house.claim("crop")
    assert job is not None
    assert told(house).state == f"cropping {job.subject}, 2 more to do"


def test_a_closed_gate_is_a_reason_to_wait(house: House) -> None:
    house.work(kinds=("crop",))
    status = told(house, gates={"caption": "The captioner is not here: fastsd models get kosmos-2"})
    assert status.state == "waiting (see below)"
    assert status.waits == ["The captioner is not here: fastsd models get kosmos-2"], "once, not once a job"


def test_what_a_job_waits_for_and_what_a_plan_waits_for_are_told(house: House) -> None:
    job = house.claim("crop")
    assert job is not None
    house.queue.wait(job, "Pillow is missing: pip install", 30.0, house.now)
    assert told(house, Plan(waits=["Training waits."])).waits == ["Training waits.", "Pillow is missing: pip install"]


def test_a_failure_that_is_tried_again_is_told(house: House) -> None:
    job = house.claim("crop")
    assert job is not None
    house.queue.fail(job, {"type": "OSError", "message": "the disk is odd", "traceback": ""}, house.now)
    assert told(house).waits == [f"crop of {job.subject} failed and is tried again: the disk is odd"]


def test_trouble_is_what_stands_beside_files(house: House) -> None:
    house.refuses = {b"picture 1"}
    house.settle()
    assert told(house).trouble == ["1.jpg: It is no picture."]
    (house.root / A / "1.jpg.error.txt").unlink()
    house.refuses = set()
    house.settle()
    assert told(house).trouble == []


def test_a_training_is_told_in_numbers(house: House) -> None:
    (job,) = house.queue.jobs(limit=1)
    from dataclasses import replace

    job = replace(job, kind="train", subject="run 1")
    facts = {"loss": 0.12345, "eta": 754.0, "seconds_per_step": 1.0}
    line = describe_progress(with_progress(job, done=1200, total=3000, note="stage 2 of 2: UNet", facts=facts))
    assert line == "training, stage 2 of 2: UNet, 1,200 of 3,000, loss 0.1235, about 13 min left"
    assert describe_progress(with_progress(job)) == "training"
    assert describe_progress(with_progress(job, done=1, total=0, facts=None)) == "training"


@pytest.mark.parametrize(
    ("publish", "words"),
    [
        ({}, "proven"),
        ({"proof": "picture", "sd_model_hash": "abc"}, "in the WebUI, proven by a picture (abc)"),
        ({"proof": "name"}, "in the WebUI, chosen by its name"),
        ({"proof": "none"}, "in the WebUI's folder, not chosen"),
    ],
)
def test_a_model_is_told_with_how_far_it_is_proven(house: House, publish: dict[str, str], words: str) -> None:
    house.work()
    convert = {"kind": "convert", "run": "r", "outputs": ["a-r.safetensors"], "bytes": 2_100_000_000}
    house.session(A).manifest.append([convert, *([{"kind": "publish", "run": "r", **publish}] if publish else [])])
    status = told(house)
    assert status.models == [f"a-r.safetensors  2.1 GB, {words}"]
    assert status.state == "done: the model is ready"


@pytest.mark.parametrize(
    ("publish", "words"),
    [
        ({}, "proven. Write into the prompt: <lora:a-r:1> zwx"),
        (
            {"proof": "picture", "lora_hash": "abc", "prompt": "<lora:a-r~12:1> zwx"},
            "in the WebUI, proven by a picture (abc). Write into the prompt: <lora:a-r~12:1> zwx",
        ),
        ({"proof": "name"}, "in the WebUI, drawn with by its name. Write into the prompt: <lora:a-r:1> zwx"),
        (
            {"proof": "listed", "note": "old is sdxl"},
            "in the WebUI's list, not drawn with: old is sdxl. Write into the prompt: <lora:a-r:1> zwx",
        ),
        (
            {"proof": "announced"},
            "in the WebUI's folder, not drawn with. Write into the prompt: <lora:a-r:1> zwx",
        ),
    ],
)
def test_a_lora_is_told_with_what_draws_with_it(house: House, publish: dict[str, str], words: str) -> None:
    house.work()
    convert = {"kind": "convert", "run": "r", "outputs": ["a-r.safetensors"], "bytes": 9_000_000}
    convert |= {"model_kind": "lora", "trigger": "zwx"}
    house.session(A).manifest.append([convert, *([{"kind": "publish", "run": "r", **publish}] if publish else [])])
    assert told(house).models == [f"a-r.safetensors  9.0 MB, {words}"]
    house.session(A).manifest.append([{**convert, "variant": "dora"}])
    assert told(house).models[0].endswith("(a DoRA: ComfyUI and Forge draw about as it was trained, A1111 does not)")


@pytest.mark.parametrize("state", ["failed", "cancelled", "refused"])
def test_a_run_that_ended_without_a_model_is_told(house: House, state: str) -> None:
    house.work()
    house.session(A).manifest.append([{"kind": "train", "run": "r", "state": state, "reason": "why"}])
    assert told(house).state == f"run r {state}: why"


def test_the_same_is_not_written_again_until_it_would_be_stale(house: House) -> None:
    session, file = house.session(A), house.root / A / "STATUS.txt"
    for state, again in (("3 jobs to do", True), ("idle: x", False)):
        write_status(session, SessionStatus("a", state), NOW)
        os.utime(file, (NOW.timestamp(), NOW.timestamp()))
        first = file.read_text()
        write_status(session, SessionStatus("a", state), NOW + timedelta(seconds=10))
        assert file.read_text() == first
        write_status(session, SessionStatus("a", state), NOW + STALE_AFTER)
        assert (file.read_text() != first) == again, "what is under way stays fresh; what is idle is left alone"


def test_news_is_written_at_once_and_over_anything(house: House) -> None:
    session, file = house.session(A), house.root / A / "STATUS.txt"
    file.write_bytes(b"\xff\xfe")
    write_status(session, SessionStatus("a", "one"), NOW)
    assert "one" in file.read_text()
    write_status(session, SessionStatus("a", "two"), NOW)
    assert "two" in file.read_text()


@pytest.mark.parametrize("way", ["renamed", "removed", "unmounted"])
def test_nothing_is_written_where_a_session_lay(house: House, way: str) -> None:
    session = house.session(A)
    match way:
        case "renamed":
            (house.root / A).rename(house.root / "Sessions/b")
        case "removed":
            shutil.rmtree(house.root / A)
        case _:
            house.root.rename(house.root.with_name("away"))
            house.root.mkdir()
    write_status(session, SessionStatus("a", "one"), NOW)
    assert not (house.root / A).exists()


def test_a_session_as_json(house: House) -> None:
    session = house.session(A)
    value = session_json(session, told(house))
    assert value["folder"] == os.fspath(house.root / A)
    assert value["id"] == session.id
    assert (value["pictures"], value["state"]) == (3, "6 jobs to do")


def test_what_failed_for_good_is_told_once(house: House) -> None:
    job = house.claim("crop")
    assert job is not None
    from daemon import outcomes

    outcomes.record_refused(house.session(A), "crop", job.payload, Refusal("failed", "crop: it died", "Retry."))
    house.queue._connection.execute("UPDATE job SET attempts=max_attempts WHERE id=?", (job.id,))
    from dataclasses import replace

    house.queue.fail(replace(job, attempts=job.max_attempts), {"message": "it died"}, house.now)
    assert told(house).trouble == [f"{job.subject}: crop: it died"]


def test_a_training_tells_its_pace_its_memory_and_what_was_decided(house: House) -> None:
    job = house.claim("crop")
    assert job is not None
    facts = {
        "loss": 0.1234,
        "eta": 700.0,
        "seconds_per_step": 0.6234,
        "gpu_memory": 7_100_000_000,
        "validation_loss": 0.1301,
        "validation_step": 600,
        "decided": ["base sd15, resolution 512", "unet 1,500 steps at 2e-6"],
    }
    running = with_progress(replace(job, kind="train"), done=620, total=1850, note="stage 2 of 2: UNet", facts=facts)
    status = describe_session(house.session(A), [running], Plan(), 3, gates={})
    text = render(status, NOW, STALE_AFTER)
    assert (
        "State      training, stage 2 of 2: UNet, 620 of 1,850, loss 0.1234, about 12 min left\n"
        "Run        0.623 s a step, 7.1 GB of GPU memory\n"
        "           held-out pictures: loss 0.1301 at step 600\n"
        "Decided    base sd15, resolution 512\n"
        "           unet 1,500 steps at 2e-6\n"
    ) in text
    assert bar_words("a", running.progress) == (
        "a · stage 2 of 2: UNet · 620/1,850 · loss 0.1234 · 12 min left · 0.623 s a step · 7.1 GB of GPU memory"
    )
