"""Intermediate models in a session, and which of its models is the one: what is planned, whatever is lost between."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon.gates import Gates
from daemon.hooks import TreeHooks
from daemon.promotion import candidates, choose, promote, promoted
from daemon.runs import former_run
from daemon.terminal import NoDisplay
from handlers.context import Waiting
from handlers.outcome import Outcome
from sessions.manifest import INTERMEDIATE, Manifest
from sessions.refusal import Refusal
from tests.daemon.house import SPEC, House, _prepared

A = "Sessions/a"
WHEN = 1_760_000_000.25


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path, webui={"kind": "a1111"})
    made.pictures(A)
    made.write(f"{A}/train.yaml", SPEC, mtime=WHEN)
    made.settle()
    yield made
    made.close()


def run_of(house: House) -> str:
    [job] = [job for job in house.queue.jobs() if job.kind == "train"]
    return str(job.payload["run"])


def keep(house: House, *steps: int) -> None:
    """What a run leaves for a step, as the handler does; the daemon hears of it."""
    run = run_of(house)
    house.write(f"{A}/runs/{run}/run.json", json.dumps({"session": house.session(A).id}))
    for step in steps:
        name = f"{run}-step-{step}"
        folder = f"{A}/.fastsd/finished/{name}"
        house.write(f"{folder}/unet.bin", f"weights of {step}")
        spec = {"path": "train.yaml", "sha256": "0", "mtime_ns": 0}
        facts = {"run": name, "of": run, "step": step, "metadata": {"title": "my dog"}, "spec_record": spec}
        house.write(f"{folder}/intermediate.json", json.dumps(facts))
    house.router.plan(A)


def finish(house: House) -> str:
    """The run ends and its model is made; returns the model's file."""
    run = run_of(house)
    house.work(kinds=("train",))
    house.work(kinds=("convert",))
    record = house.session(A).manifest.get("convert", run)
    assert record is not None
    return str(record["outputs"][0])


def publish(house: House) -> list[str]:
    """Work on the publications that are due; returns the models' names, in order."""
    names = []
    while (job := house.claim("publish")) is not None:
        payload = asyncio.run(_prepared(house.hooks, job))
        if payload is None:
            house.queue.drop(job)
            continue
        asyncio.run(house.hooks.on_outcome(job, Outcome("done", facts={"run": payload["run"], "proof": "picture"})))
        house.queue.done(job, house.now)
        house._after()
        names.append(Path(payload["model"]).name)
    return names


def files_of_runs(house: House) -> list[str]:
    return sorted(path.name for path in (house.root / A / "runs").rglob("*.safetensors"))


def converted(house: House) -> list[str]:
    return [name for kind, name in house.made if kind == "convert"]


def test_each_gets_its_file_while_the_run_goes_on_and_its_folder_goes(house: House) -> None:
    run = run_of(house)
    keep(house, 200)
    assert house.open_jobs("convert") == [("convert", f"model of step 200 of run {run}")]
    house.work(kinds=("convert",))
    keep(house, 400)
    house.router.plan(A)
    house.work(kinds=("convert",))
    assert converted(house) == [f"{run}-step-200", f"{run}-step-400"]
    assert files_of_runs(house) == [f"my dog-{run}-step-{step}.safetensors" for step in (200, 400)]
    assert house.files(f"{A}/.fastsd/finished") == set()
    assert house.open_jobs("train"), "the run has not ended"
    assert publish(house) == []
    house.restart("index", "queue")
    house.look()
    house.work(kinds=("convert",))
    assert len(converted(house)) == 2, "the manifest knows them"
    finish(house)
    assert converted(house)[2:] == [run]


def test_killed_anywhere_around_its_conversion_it_is_made_once(house: House) -> None:
    name = f"{run_of(house)}-step-200"
    keep(house, 200)
    job = house.claim("convert")
    assert job is not None
    # The file is written, nothing is recorded: made again, the same file.
    payload = asyncio.run(_prepared(house.hooks, job))
    assert payload is not None
    Path(payload["output"]).write_bytes(b"model")
    house.restart("index", "queue")
    house.look()
    assert len(house.open_jobs("convert")) == 1
    # Recorded, but its folder stands and the row is open.
    job = house.claim("convert")
    assert job is not None
    folder = house.root / A / ".fastsd" / "finished" / name
    kept = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    house.finish(job)
    for path, content in kept.items():
        house.write(f"{A}/.fastsd/finished/{name}/{path}", content)
    house.restart("queue")
    house.look()
    house.router.plan(A)
    house.work(kinds=("convert",))
    assert converted(house) == [name]
    assert house.files(f"{A}/.fastsd/finished") == set()
    assert len(house.session(A).manifest.of_kind(INTERMEDIATE)) == 1


def test_each_that_a_run_tells_of_has_its_session_planned_once(house: House) -> None:
    heard: list[str] = []

    async def nothing() -> None:
        pass

    hooks = TreeHooks(
        preparer=house.preparer,
        sessions=house.sessions,
        gates=Gates(),
        make_room=nothing,
        ended=lambda _job, _session: None,
        display=NoDisplay(),
        kept=heard.append,
    )
    job = house.claim("train")
    assert job is not None
    for count, expected in ((None, 0), (0, 0), (1, 1), (1, 1), (3, 2)):
        facts = {} if count is None else {"loss": 0.5, "kept": count}
        hooks.on_progress(job, {"done": 1.0, "total": 9.0, "note": "", "facts": facts})
        assert heard == [A] * expected


def test_what_is_half_written_or_odd_wants_nothing(house: House) -> None:
    run = run_of(house)
    keep(house)
    for name, facts in (
        (".fastsd-tmp-1-00", {"run": f"{run}-step-2", "of": run, "step": 2}),
        ("odd", {"run": "odd", "of": run, "step": 2}),
        (f"{run}-step-3", {"run": f"{run}-step-3"}),
        ("x-step-4", {"run": "x-step-4", "of": "x", "step": 4}),
    ):
        house.write(f"{A}/.fastsd/finished/{name}/intermediate.json", json.dumps(facts))
    house.write(f"{A}/.fastsd/finished/{run}-step-5/intermediate.json", "[")
    house.router.plan(A)
    assert house.open_jobs("convert") == []


def test_a_refused_one_is_told_beside_the_train_yaml_and_the_run_goes_on(house: House) -> None:
    keep(house, 200)
    house.refuses_models = True
    house.work(kinds=("convert",))
    assert "It is odd" in (house.root / A / "train.yaml.error.txt").read_text()
    assert house.open_jobs("train")


def test_a_promoted_step_is_the_sessions_model_and_published_in_place_of_what_waits(house: House) -> None:
    run = run_of(house)
    keep(house, 200)
    house.work(kinds=("convert",))
    model = finish(house)
    manifest = house.session(A).manifest
    chosen = promote(manifest, f"{run}-step-200")
    assert (chosen.run, chosen.step, chosen.file) == (run, 200, f"my dog-{run}-step-200.safetensors")
    assert (house.root / A / chosen.file).read_bytes() == b"model"
    assert files_of_runs(house) == []
    house.router.plan(A)
    assert publish(house) == [chosen.file], "the other, which waited for the WebUI, has given way"
    house.restart("index", "queue")
    house.look()
    assert publish(house) == []
    # The run's own after all; then the step again.
    for wanted, file in ((run, model), (f"{run}-step-200", chosen.file)):
        promote(house.session(A).manifest, wanted)
        house.restart("queue")
        house.look()
        house.router.plan(A)
        assert publish(house) == [file]
        assert promoted(house.session(A).manifest)["run"] == wanted
    assert former_run(house.session(A), "last") == {"run": run, "model": model}
    assert former_run(house.session(A), f"{run}/step-200") == {"run": run, "model": chosen.file}


def test_promoted_before_anything_was_published_only_the_last_counts(house: House) -> None:
    """As it goes where no daemon runs: the next one brings the model that was named last, and no other."""
    run = run_of(house)
    keep(house, 200, 400)
    house.work(kinds=("convert",))
    finish(house)
    for name in (f"{run}-step-200", run, f"{run}-step-400"):
        promote(Manifest.load(house.root / A), name)
    house.restart("index", "queue")
    house.look()
    assert publish(house) == [f"my dog-{run}-step-400.safetensors"]


def test_promoted_although_its_train_yaml_publishes_nothing(house: House) -> None:
    run = run_of(house)
    finish(house)
    house.restart()
    house.write(f"{A}/runs/{run}/run.json", json.dumps({"session": house.session(A).id, "spec": {"publish": False}}))
    house.restart("queue")
    house.look()
    assert house.open_jobs("publish") == []
    promote(house.session(A).manifest, run)
    house.router.plan(A)
    assert len(publish(house)) == 1


@pytest.mark.parametrize("survives", range(4))
def test_killed_while_it_is_placed_the_next_plan_goes_on(
    house: House, survives: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(house)
    keep(house, 200)
    name = f"{run}-step-200"
    outputs = [f"runs/{run}/x-{name}.{ending}" for ending in ("safetensors", "json", "preview.png")]
    for output in outputs:
        house.write(f"{A}/{output}", output)
    manifest = house.session(A).manifest
    manifest.append([{"kind": INTERMEDIATE, "run": name, "of": run, "step": 200, "outputs": outputs, "bytes": 7}])
    moves = 0

    class Killed(BaseException):
        pass

    def rename(source: Path, target: Path) -> None:
        nonlocal moves
        if moves == survives:
            raise Killed
        moves += 1
        os.rename(source, target)  # noqa: PTH104 - Path's own is the one that is watched

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        if survives < len(outputs):
            with pytest.raises(Killed):
                promote(manifest, name)
        else:
            promote(manifest, name)
    house.restart("index", "queue")
    house.look()
    for output in outputs:
        assert (house.root / A / Path(output).name).read_text() == output
        assert not (house.root / A / output).exists()
    record = house.session(A).manifest.get("convert", name)
    assert record is not None
    assert record["outputs"] == [Path(output).name for output in outputs]
    assert (record["of"], record["step"], record["bytes"]) == (run, 200, 7)
    assert publish(house) == [Path(outputs[0]).name]


def test_what_cannot_be_promoted_is_said(house: House) -> None:
    run = run_of(house)
    manifest = house.session(A).manifest
    with pytest.raises(Refusal, match=r"no model of step 200 here\. It has no model yet"):
        choose(manifest, None, 200)
    keep(house, 200)
    with pytest.raises(Waiting, match="waits for the file"):
        former_run(house.session(A), f"{run}-step-200")
    house.work(kinds=("convert",))
    [only] = candidates(manifest)
    assert [only.answers_to(word) for word in (only.name, f"{run}/step-200", only.file, Path(only.file).stem, run)] == [
        True,
        True,
        True,
        True,
        False,
    ]
    with pytest.raises(Refusal, match=rf"no model of step 300 here.*{run}-step-200 \(--step 200\)"):
        choose(manifest, None, 300)
    house.write(f"{A}/{Path(only.file).name}", "a person's")
    with pytest.raises(Refusal, match="lies in the session already"):
        promote(manifest, only.name)
    assert (house.root / A / Path(only.file).name).read_text() == "a person's"
    (house.root / A / only.file).unlink()
    with pytest.raises(Refusal, match="is gone"):
        promote(manifest, only.name)
    with pytest.raises(Refusal, match="no finished run last"):
        former_run(house.session(A), "last")
    assert promoted(manifest) == {}
