"""What is left of a training that diverged late: the model of its last good checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from handlers.context import JobContext, Stopping
from handlers.models import miniature
from handlers.train import checkpoint
from handlers.train.divergence import Diverged
from handlers.train.job import TrainHandler
from handlers.train.place import Place
from handlers.train.rescue import last_good
from handlers.train.run import RunFolder
from sessions.layout import FINISHED, KEPT_FACTS
from tests.handlers.train_session import make_session, payload_of

RARE = "schedule: constant\nsample_every: 0\nbatch_size: 1\ncheckpoint_every: 1\n"
METHODS = {
    "two stages": "text_encoder: {steps: 2}\nunet: {steps: 40, learning_rate: 1e-4}\n",
    "fine-tuning with a moving average": (
        "method: finetune\nema: true\ntext_encoder: {steps: 40, learning_rate: 1e-4}\n"
        "unet: {steps: 40, learning_rate: 1e-4}\n"
    ),
    "lora": "method: lora\nunet: {steps: 40, learning_rate: 1e-4}\n",
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    miniature.ensure("miniature", folder)
    return folder


def train(payload: dict[str, Any], cache: Path, stop_after: int | None = None) -> None:
    done = 0

    def report(step: float, _total: float, _note: str, facts: Mapping[str, Any]) -> None:
        nonlocal done
        done = int(step) if "loss" in facts else done

    TrainHandler().run(JobContext(1, "train", payload, "cpu", cache, report, lambda: False, lambda: done == stop_after))


def go_wrong(session: Path, payload: dict[str, Any], cache: Path, rate: float) -> Diverged:
    """From here on a run has a rate at which nothing holds."""
    run = session / "runs" / "r1" / "run.json"
    record = json.loads(run.read_text())
    record["plan"] |= {"unet_rate": rate, "text_encoder_rate": rate}
    run.write_text(json.dumps(record))
    with pytest.raises(Diverged) as caught:
        train(payload, cache)
    return caught.value


def flat(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a finished folder, by component and name."""
    found: dict[str, torch.Tensor] = {}
    for file in folder.rglob("*.safetensors"):
        part = "" if file.parent == folder else f"{file.parent.name}."
        found |= {f"{part}{name}": tensor for name, tensor in load_file(file).items()}
    return found


@pytest.mark.parametrize(
    "method", [pytest.param(each, marks=[pytest.mark.soak] * each.startswith("fine")) for each in METHODS]
)
def test_the_last_good_state_is_kept_as_the_model_that_save_every_would_have_kept(
    method: str, cache: Path, tmp_path: Path
) -> None:
    session = make_session(tmp_path / "wrong" / "Sessions" / "dog")
    payload = payload_of(session, METHODS[method] + RARE)
    first = 2 if method == "two stages" else 0
    with pytest.raises(Stopping):
        train(payload, cache, stop_after=first + 6)
    told = go_wrong(session, payload, cache, 1e6)
    assert f"The last good checkpoint is checkpoints/step-{first + 6}; it is kept." in told.advice
    assert "write `continue: r1-step-6` and leave base out" in told.advice
    assert json.loads((session / "runs" / "r1" / "run.json").read_text())["reason"] == str(told)
    [kept] = (session / FINISHED).iterdir()
    facts = json.loads((kept / KEPT_FACTS).read_text())
    assert (kept.name, facts["run"], facts["of"], facts["step"]) == ("r1-step-6", "r1-step-6", "r1", 6)
    assert facts["metadata"]["fastsd.steps"] == first + 6

    undisturbed = make_session(tmp_path / "right" / "Sessions" / "dog")
    with pytest.raises(Stopping):
        train(payload_of(undisturbed, f"{METHODS[method]}{RARE}save_every: 6\n"), cache, stop_after=first + 6)
    expected, found = flat(undisturbed / FINISHED / "r1-step-6"), flat(kept)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)

    # A kill before the run was called failed does it all again, and writes no second model.
    before = (kept / KEPT_FACTS).stat().st_mtime_ns
    assert str(go_wrong(session, payload, cache, 1e6)) == str(told)
    assert (kept / KEPT_FACTS).stat().st_mtime_ns == before


def test_a_text_encoder_alone_is_no_model(cache: Path, tmp_path: Path) -> None:
    session = make_session(tmp_path / "Sessions" / "dog")
    payload = payload_of(session, f"text_encoder: {{steps: 4}}\nunet: {{steps: 40}}\n{RARE}")
    with pytest.raises(Stopping):
        train(payload, cache, stop_after=4)
    told = go_wrong(session, payload, cache, 1e6)
    assert told.advice.endswith("The last good checkpoint is checkpoints/step-4; it is kept.")
    assert not (session / FINISHED).exists()


def test_a_folder_without_room_costs_the_model_and_not_the_message(cache: Path, tmp_path: Path) -> None:
    session = make_session(tmp_path / "Sessions" / "dog")
    payload = payload_of(session, METHODS["lora"] + RARE)
    with pytest.raises(Stopping):
        train(payload, cache, stop_after=4)
    (session / FINISHED).write_text("in the way")
    told = go_wrong(session, payload, cache, 1e6)
    assert told.advice.endswith("The last good checkpoint is checkpoints/step-4; it is kept.")
    assert "the model of step 4 could not be kept" in (session / "runs" / "r1" / "log.txt").read_text()


def test_the_last_good_checkpoint_is_whole_finite_and_from_before_the_losses_rose(tmp_path: Path) -> None:
    session = make_session(tmp_path / "Sessions" / "dog")
    for step, value in ((10, 1.0), (20, float("nan"))):
        checkpoint.save(session, step, {"unet": {"w": torch.tensor([1.0, value])}}, {"run": "r1", "stage": 2})
    place = Place(session, tmp_path, "abcd1234")

    def good(run: str, until: int) -> int | None:
        found = last_good(place, RunFolder(place, run), until)
        return found.step if found else None

    assert [good("r1", 30), good("r1", 15), good("r1", 9), good("r2", 30)] == [10, 10, None, None]
