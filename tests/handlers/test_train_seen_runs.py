"""What is seen of real runs: killed with SIGKILL, TensorBoard and metrics show what an undisturbed run shows."""

from __future__ import annotations

import json
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from handlers.context import JobContext
from handlers.models import miniature
from handlers.train.job import TrainHandler
from sessions.refusal import Refusal
from tests.events import shown_in
from tests.handlers.train_process import finished, run_child
from tests.handlers.train_session import make_session, payload_of

SPEC = """
text_encoder: {steps: 3, learning_rate: 1e-3}
unet: {steps: 4, learning_rate: 1e-3}
checkpoint_every: 2
sample_every: 3
prompts: [zwx]
batch_size: 2
instance: zwx
"""
TOTAL = 7


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    miniature.ensure("miniature", folder)
    return folder


def five_pictures(folder: Path) -> Path:
    session = make_session(folder)
    for number, colour in enumerate(("blue", "green"), 3):
        image = Image.new("RGB", (90, 120), colour)
        ImageDraw.Draw(image).polygon([(45, 30), (80, 95), (10, 95)], fill="purple")
        image.save(session / f"zwx ({number}).png")
    return session


def rows_of(session: Path) -> list[tuple[int, float, float | None]]:
    lines = (session / "runs" / "r1" / "metrics.jsonl").read_text().splitlines()
    return [(row["step"], row["loss"], row.get("validation_loss")) for row in map(json.loads, lines)]


def test_killed_and_resumed_it_shows_what_an_undisturbed_run_shows_and_held_out_pictures_change_nothing(
    server: ForkServerContext, cache: Path, tmp_path: Path
) -> None:
    spec = f"{SPEC}validation: 2\n"
    whole = five_pictures(tmp_path / "whole" / "Sessions" / "dog")
    assert run_child(server, payload_of(whole, spec), cache, None) == list(range(1, TOTAL + 1))
    killed = five_pictures(tmp_path / "killed" / "Sessions" / "dog")
    payload = payload_of(killed, spec)
    run_child(server, payload, cache, 5)
    run_child(server, payload, cache, None)
    assert finished(killed) == finished(whole)
    assert rows_of(killed) == rows_of(whole)
    assert [step for step, _, held in rows_of(whole) if held is not None] == list(range(1, TOTAL + 1))
    first, second = (shown_in(session / "runs" / "r1") for session in (whole, killed))
    for tag in ("loss/train", "loss/held out", "learning rate/unet", "learning rate/text_encoder"):
        assert first.curves[tag] == second.curves[tag]
    assert [step for step, _ in second.curves["loss/train"]] == list(range(1, TOTAL + 1))
    assert [step for step, _, _ in second.pictures] == [6, 7]
    assert second.curves["memory in GB"][0][1] > 0.01
    record = json.loads((whole / "runs" / "r1" / "run.json").read_text())
    held_out = [entry["source"] for entry in record["inputs"] if entry.get("held_out")]
    assert len(held_out) == 2
    log = (killed / "runs" / "r1" / "log.txt").read_text()
    assert f"held out, not trained on: {', '.join(held_out)}" in log
    assert "auto: base miniature, method dreambooth, resolution 64" in log
    # Without them, and without validation, the same weights come out.
    without = five_pictures(tmp_path / "without" / "Sessions" / "dog")
    for name in held_out:
        (without / name).unlink()
    run_child(server, payload_of(without, SPEC), cache, None)
    assert finished(without) == finished(whole)


def test_a_rate_that_explodes_the_losses_stops_the_run_and_says_what_to_write(cache: Path, tmp_path: Path) -> None:
    session = make_session(tmp_path / "Sessions" / "dog")
    spec = "text_encoder: {steps: 0}\nunet: {steps: 300, learning_rate: 0.01}\nschedule: constant\nsample_every: 0\n"
    seen: list[float] = []

    def report(done: float, _total: float, _note: str, facts: Any) -> None:
        if "loss" in facts:
            seen.append(done)

    payload = payload_of(session, f"{spec}batch_size: 1\nmin_snr: 100\n")
    with pytest.raises(Refusal, match="The training diverged") as caught:
        TrainHandler().run(JobContext(1, "train", payload, "cpu", cache, report, lambda: False, lambda: False))
    assert seen[-1] < 80
    assert caught.value.code == "diverged"
    assert "unet.learning_rate than 0.01 into train.yaml, say 0.002" in caught.value.advice
    assert "No checkpoint was written before that." in caught.value.advice
    record = json.loads((session / "runs" / "r1" / "run.json").read_text())
    assert record["state"] == "failed"
    assert "learning rate of 0.01" in record["reason"]
