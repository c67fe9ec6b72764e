"""train.yaml: when a run is wanted, when it waits and why, and when it is over."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from daemon.jobs import Job
from daemon.refusals import standing_errors
from handlers.outcome import Outcome
from sessions.manifest import Manifest
from sessions.refusal import Refusal
from tests.daemon.house import SPEC, House, _prepared

A = "Sessions/a"
WHEN = 1_760_000_000.25


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path, webui={"kind": "none"})
    yield made
    made.close()


def ready(house: House, spec: str = SPEC, count: int = 3) -> None:
    """A session with settled pictures and a train.yaml."""
    house.pictures(A, count)
    house.write(f"{A}/train.yaml", spec, mtime=WHEN)
    house.settle()


def runs(house: House) -> list[str]:
    """The runs in the queue that have not ended."""
    return sorted(subject for kind, subject in house.open_jobs("train"))


def claim_run(house: House) -> Job:
    job = house.claim("train")
    assert job is not None
    return job


def begin(house: House, run: str, **changes: Any) -> Path:
    """run.json, as the handler writes it before the first step."""
    identity = house.session(A).id
    spec = (house.root / A / "train.yaml").stat()
    job = next(job for job in house.queue.jobs() if job.kind == "train" and job.payload["run"] == run)
    record = {"session": identity, "spec_record": job.payload["spec_record"], "state": "training", **changes}
    assert spec.st_size > 0
    return house.write(f"{A}/runs/{run}/run.json", json.dumps(record))


def end(house: House, job: Job, outcome: Outcome) -> None:
    """The end of a job, as the dispatcher tells it."""
    import asyncio

    asyncio.run(house.hooks.on_outcome(job, outcome))
    if outcome.state == "refused" and outcome.refusal:
        house.queue.refuse(job, outcome.refusal, house.now)
    elif outcome.state == "cancelled":
        house.queue.end_cancelled(job, house.now)
    else:
        house.queue.fail(job, outcome.error, house.now)
    house._after()


def error_of(house: House, name: str = "train.yaml") -> Path:
    return house.root / A / f"{name}.error.txt"


def test_a_spec_asks_for_one_run_with_the_same_name_always(house: House) -> None:
    ready(house)
    (first,) = runs(house)
    assert first.startswith("run 251009-")
    for lost in (("queue",), ("index", "queue")):
        house.restart(*lost)
        house.settle()
        assert runs(house) == [first]


@pytest.mark.parametrize("name", ["train.yaml", "train.yml", "train.yaml.txt", "Train.yaml"])
def test_every_name_of_a_spec_counts(house: House, name: str) -> None:
    house.pictures(A)
    house.write(f"{A}/{name}", SPEC)
    house.settle()
    assert len(runs(house)) == 1


def test_an_unfinished_run_goes_on_and_a_finished_one_is_over(house: House) -> None:
    ready(house)
    job = claim_run(house)
    begin(house, job.payload["run"])
    house.restart("queue", "index")
    house.settle()
    assert runs(house) == [f"run {job.payload['run']}"]
    house.work(kinds=("train",))
    house.restart("queue", "index")
    house.settle()
    assert runs(house) == []
    assert house.open_jobs("convert") == [("convert", f"model of run {job.payload['run']}")]
    house.work(kinds=("convert",))
    house.restart("queue", "index")
    house.settle()
    assert house.open_jobs() == []
    assert Manifest.load(house.root / A).get("convert", job.payload["run"]) is not None


def test_new_pictures_start_nothing_and_saving_again_does(house: House) -> None:
    ready(house)
    (first,) = runs(house)
    house.work(kinds=("train", "convert"))
    house.write(f"{A}/new.jpg", "new")
    house.settle()
    assert runs(house) == []
    os.utime(house.root / A / "train.yaml", (WHEN + 2, WHEN + 2))
    house.settle()
    (second,) = runs(house)
    assert second != first
    house.work(kinds=("train", "convert"))
    house.write(f"{A}/train.yaml", SPEC + "seed: 8\n", mtime=WHEN + 2)
    house.settle()
    assert len(runs(house)) == 1


def test_fractions_of_a_second_are_no_other_saving(house: House) -> None:
    """A mount that keeps whole seconds shows the same file with another time."""
    ready(house)
    house.work(kinds=("train", "convert"))
    os.utime(house.root / A / "train.yaml", (int(WHEN), int(WHEN)))
    house.settle()
    assert runs(house) == []


def test_a_spec_saved_anew_before_its_run_began_trains_once(house: House) -> None:
    ready(house)
    old = claim_run(house)
    house.write(f"{A}/train.yaml", SPEC + "seed: 8\n", mtime=WHEN + 100)
    house.settle()
    assert len(runs(house)) == 2
    assert not house.finish(old), "the older saving has nobody waiting for it"
    house.work(kinds=("train",))
    assert len([made for made in house.made if made[0] == "train"]) == 1


def test_a_run_that_has_begun_goes_on_though_its_spec_was_saved_anew_or_removed(house: House) -> None:
    ready(house)
    job = claim_run(house)
    run = job.payload["run"]
    begin(house, run)
    (house.root / A / "train.yaml").unlink()
    house.restart("queue", "index")
    house.settle()
    assert runs(house) == [f"run {run}"]
    house.write(f"{A}/train.yaml", SPEC + "seed: 8\n", mtime=WHEN + 100)
    house.restart("queue", "index")
    house.settle()
    assert len(runs(house)) == 2
    assert f"run {run}" in runs(house)


def test_a_copy_of_a_session_does_not_go_on_with_the_originals_run(house: House) -> None:
    ready(house)
    run = claim_run(house).payload["run"]
    begin(house, run)
    shutil.copytree(house.root / A, house.root / "Sessions/copy")
    house.settle()
    assert runs(house) == [f"run {run}"]
    assert {job.session for job in house.queue.jobs() if job.kind == "train"} == {house.session(A).id}


@pytest.mark.parametrize("state", ["failed", "refused", "cancelled"])
def test_a_run_that_ended_without_a_model_is_over(house: House, state: str) -> None:
    ready(house)
    job = claim_run(house)
    begin(house, job.payload["run"])
    outcome = {
        "failed": Outcome.failure("ValueError", "it went wrong"),
        "refused": Outcome("refused", refusal=Refusal("diverged", "The loss is no number.", "Lower the rate.")),
        "cancelled": Outcome("cancelled"),
    }[state]
    while not job.last_attempt and state == "failed":
        house.queue.give_back(job)
        house.queue._connection.execute("UPDATE job SET attempts=max_attempts-1 WHERE id=?", (job.id,))
        job = claim_run(house)
    end(house, job, outcome)
    assert error_of(house).exists() == (state != "cancelled")
    house.restart("queue", "index")
    house.settle()
    assert runs(house) == []
    assert bool(standing_errors(house.session(A))) == (state != "cancelled")


@pytest.mark.parametrize("state", ["failed", "refused"])
def test_a_deleted_error_file_has_the_run_tried_again(house: House, state: str) -> None:
    test_a_run_that_ended_without_a_model_is_over(house, state)
    house.look()
    error_of(house).unlink()
    house.settle()
    assert len(runs(house)) == 1


def test_what_a_run_said_against_its_spec_goes_when_it_is_saved_anew(house: House) -> None:
    test_a_run_that_ended_without_a_model_is_over(house, "refused")
    house.write(f"{A}/train.yaml", SPEC + "seed: 8\n", mtime=WHEN + 100)
    house.settle()
    assert not error_of(house).exists()
    assert len(runs(house)) == 1, "the run that diverged is still over"


def test_training_waits_for_pictures_and_captions(house: House) -> None:
    house.pictures(A)
    house.write(f"{A}/train.yaml", SPEC)
    house.look()
    assert house.plans[A].waits == ["Training waits for 3 pictures to be cropped."]
    house.work(kinds=("crop",))
    house._after()
    assert house.plans[A].waits == ["Training waits for 3 captions."]
    house.work(kinds=("caption",), at_most=2)
    assert house.plans[A].waits == ["Training waits for 1 caption."]
    house.work()
    assert len(runs(house)) == 1


@pytest.mark.parametrize(
    ("spec", "trains"),
    [
        ("", True),
        ("concept: face\n", True),
        ("captions: true\n", False),
        ("concept: style\n", False),
        ("concept: style\ncaptions: false\n", True),
    ],
)
def test_without_a_captioner_a_run_waits_only_for_captions_that_it_needs(house: House, spec: str, trains: bool) -> None:
    house.captions_wait = "The captioner is not here: fastsd models get kosmos-2"
    ready(house, SPEC + spec)
    assert bool(runs(house)) == trains
    assert house.plans[A].waits == ([] if trains else [house.captions_wait])


def test_training_waits_until_the_session_is_quiet(house: House) -> None:
    house.needed = 60.0
    ready(house, "base: miniature\n")
    assert runs(house) == []
    assert "`start: now`" in house.plans[A].waits[0]
    assert house.plans[A].again_in == pytest.approx(10.0), "the contact sheet rests less"
    house.now += 11.0
    plan = house.router.plan(A)
    assert plan.again_in == pytest.approx(49.0)
    house.now += 48.0
    house.router.plan(A)
    assert runs(house) == []
    house.now += 1.0
    house.router.plan(A)
    assert len(runs(house)) == 1


def test_start_now_skips_the_quiet_time(house: House) -> None:
    house.needed = 60.0
    ready(house)
    assert len(runs(house)) == 1


def test_what_moves_and_has_not_settled_is_no_quiet(house: House) -> None:
    house.needed = 60.0
    ready(house, "base: miniature\n")
    house.now += 1000.0
    house.quiet = 3.0
    house.router.plan(A)
    assert runs(house) == []


def test_our_own_captions_do_not_disturb_the_quiet(house: House) -> None:
    house.needed = 60.0
    ready(house, "base: miniature\n")
    house.now += 61.0
    house.write(f"{A}/captions/0.txt", "a caption\n")
    house.look()
    assert len(runs(house)) == 1
    house.write(f"{A}/captions/0.txt", "a person's words\n")
    house.look()
    assert house.router.quiet_for(house.session(A)) == 0.0


def test_too_few_pictures_are_told_beside_the_spec_until_there_are_enough(house: House) -> None:
    ready(house, count=2)
    assert "2 usable pictures" in error_of(house).read_text()
    assert runs(house) == []
    house.pictures(A, 3)
    house.settle()
    assert not error_of(house).exists()
    assert len(runs(house)) == 1


def test_pictures_may_come_after_the_spec_without_a_word_of_reproach(house: House) -> None:
    house.needed = 60.0
    house.write(f"{A}/train.yaml", "base: miniature\n")
    house.settle()
    assert not error_of(house).exists()
    house.now += 61.0
    house.router.plan(A)
    assert error_of(house).exists()


def test_refused_pictures_do_not_hold_a_run_up(house: House) -> None:
    house.refuses = {b"broken"}
    house.write(f"{A}/broken.jpg", b"broken")
    ready(house)
    assert len(runs(house)) == 1


def test_a_broken_spec_is_told_with_its_line_until_it_is_mended(house: House) -> None:
    ready(house, "base: miniature\nlearning: fast\n")
    text = error_of(house).read_text()
    assert "train.yaml (line 2)" in text
    assert "learning" in text
    assert runs(house) == []
    assert standing_errors(house.session(A))[0][0] == "train.yaml"
    house.write(f"{A}/train.yaml", SPEC, mtime=WHEN + 10)
    house.settle()
    assert not error_of(house).exists()
    assert standing_errors(house.session(A)) == []
    assert len(runs(house)) == 1


def test_the_error_file_of_a_spec_that_is_removed_goes_with_it(house: House) -> None:
    ready(house, "base: [\n")
    assert error_of(house).exists()
    (house.root / A / "train.yaml").unlink()
    house.settle()
    assert not error_of(house).exists()
    assert standing_errors(house.session(A)) == []


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x00base", b"\x00" * 50, b"- a\n- b\n", b"base: ../../etc\n", b"[" * 5000]
)
def test_any_rubbish_in_a_spec_is_told_and_nothing_else_happens(house: House, content: bytes) -> None:
    house.pictures(A)
    house.write(f"{A}/train.yaml", content)
    house.settle()
    assert error_of(house).exists()
    assert runs(house) == []


def test_a_base_that_is_missing_is_waited_for_with_the_command(house: House) -> None:
    ready(house, "base: sd15\nstart: now\n")
    assert runs(house) == []
    assert "fastsd models get sd15" in house.plans[A].waits[0]
    assert house.plans[A].again_in
    assert not error_of(house).exists()


def test_a_base_that_nobody_knows_is_refused(house: House) -> None:
    ready(house, "base: no-such-base\nstart: now\n")
    assert "no-such-base" in error_of(house).read_text()


@pytest.mark.parametrize("mtime_ns", [-(10**18), 0, 9 * 10**18])
def test_any_time_of_a_spec_gives_a_run(house: House, mtime_ns: int) -> None:
    house.pictures(A)
    house.settle()
    file = house.write(f"{A}/train.yaml", SPEC)
    os.utime(file, ns=(mtime_ns, mtime_ns))
    house.settle()
    assert len(runs(house)) == 1


def test_a_training_gets_the_pictures_with_the_lines_that_people_wrote(house: House) -> None:
    house.write(f"{A}/x.jpg", "x")
    house.write(f"{A}/y.jpg", "y")
    house.write(f"{A}/y.png", "second of its stem")
    house.write(f"{A}/y.txt", "beside both\n")
    house.write(f"{A}/z.jpg", "z")
    house.write(f"{A}/z.txt", "\n")
    house.write(f"{A}/train.yaml", SPEC)
    house.settle()
    house.write(f"{A}/captions/x.txt", "an edit\n")
    payload = house.preparer.payload("train", house.session(A).id, claim_run(house).payload)
    lines = {
        Path(picture["source"]).name: (picture["caption"], picture["caption_by"] == "person")
        for picture in payload["pictures"]
    }
    assert lines == {
        "x.jpg": ("an edit", True),
        "y.jpg": ("beside both", True),
        "y.png": ("beside both", True),
        "z.jpg": ("a caption", False),
    }


def test_an_edit_in_captions_serves_both_pictures_of_a_stem(house: House) -> None:
    house.write(f"{A}/x.jpg", "x")
    house.write(f"{A}/x.png", "second of its stem")
    house.write(f"{A}/y.jpg", "y")
    house.write(f"{A}/captions/x.txt", "a person's\n")
    house.write(f"{A}/train.yaml", SPEC)
    house.settle()
    payload = house.preparer.payload("train", house.session(A).id, claim_run(house).payload)
    lines = {Path(picture["source"]).name: picture["caption_by"] for picture in payload["pictures"]}
    texts = {Path(picture["source"]).name: picture["caption"] for picture in payload["pictures"]}
    assert texts["x.jpg"] == "a person's"
    assert lines["x.jpg"] == "person"
    # The second picture has a generated line of its own, unless a person's stands for its stem.
    assert texts["x.png"] == "a person's"


def test_pictures_of_a_nested_session_do_not_train_the_outer_one(house: House) -> None:
    house.write(f"{A}/sub/y.jpg", "inner")
    ready(house)
    house.write(f"{A}/sub/train.yaml", SPEC)
    house.settle()
    job = next(job for job in house.queue.jobs() if job.kind == "train" and job.session == house.session(A).id)
    payload = house.preparer.payload("train", job.session, job.payload)
    assert sorted(Path(picture["source"]).name for picture in payload["pictures"]) == ["0.jpg", "1.jpg", "2.jpg"]


def test_a_conversion_cut_short_while_it_tidied_is_tidied(house: House) -> None:
    ready(house)
    house.work(kinds=("train",))
    job = house.claim("convert")
    assert job is not None
    house.finish(job)
    leftover = house.root / A / str(job.payload["finished"])
    leftover.mkdir(parents=True)
    import asyncio

    assert asyncio.run(_prepared(house.hooks, job)) is None
    assert not leftover.exists()


def test_a_model_is_published_once_where_there_is_a_webui(tmp_path: Path) -> None:
    house = House(tmp_path)
    ready(house)
    house.work(kinds=("train", "convert"))
    assert [kind for kind, _ in house.open_jobs()] == ["publish"]
    run = next(iter(house.session(A).manifest.of_kind("convert")))["run"]
    house.write(f"{A}/runs/{run}/run.json", json.dumps({"spec": {"publish": False}}))
    house.restart("queue")
    assert house.open_jobs() == []
    house.close()


def test_a_vae_that_is_missing_waits_with_its_command_and_an_unknown_one_is_refused(house: House) -> None:
    ready(house, SPEC + "vae: sd-vae-ft-mse\n")
    assert runs(house) == []
    assert any("Get it with: fastsd models get sd-vae-ft-mse" in line for line in house.plans[A].waits)
    house.write(f"{A}/train.yaml", SPEC + "vae: mine\n", mtime=WHEN + 2)
    house.look()
    assert runs(house) == []
    assert "No VAE called 'mine' is known" in error_of(house).read_text()
