"""Models of every so many steps, whole: kept, converted, promoted and published, and killed in between."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from daemon.runs import former_run
from daemon.session import Session
from handlers.models.inspect import inspect
from sessions.files import sha256_of
from sessions.manifest import Manifest
from tests.daemon_process import DaemonProcess, until

SPEC = """\
base: miniature
instance: zwx
class: thing
start: now
text_encoder: {steps: 2}
unet: {steps: 6, learning_rate: 1e-3}
save_every: 2
sample_every: 0
batch_size: 1
checkpoint_every: 1
"""


def make_session(daemon: DaemonProcess, photographs: list[Path], spec: str = SPEC) -> Path:
    """A session of three pictures with a train.yaml."""
    pictures = daemon.root / "Sessions" / "zwx" / "instance_images"
    pictures.mkdir(parents=True)
    for photograph in photographs[:3]:
        shutil.copyfile(photograph, pictures / photograph.name)
    (pictures.parent / "train.yaml").write_text(spec)
    return pictures.parent


def kept_files(session: Path) -> list[Path]:
    return sorted(session.glob("runs/*/*-step-*.safetensors"))


def promote(daemon: DaemonProcess, *arguments: str) -> dict[str, Any]:
    done = daemon.run("models", "promote", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def published(session: Path, name: str) -> dict[str, Any] | None:
    return Manifest.load(session).get("publish", name)


def test_kept_while_it_trains_and_promoted_without_a_daemon_and_with_one(
    daemon: DaemonProcess, photographs: list[Path]
) -> None:
    daemon.settings(watch={"settle": 0.5}, webui={"kind": "none"})
    session = make_session(daemon, photographs)
    daemon.start()
    until(lambda: list(session.glob(".fastsd/finished/*-step-2")), f"step 2 is kept; log: {daemon.log}", 120)
    daemon.kill()
    assert daemon.once() == 0, daemon.log.read_text()[-3000:]

    [finished] = session.glob("zwx-*.safetensors")
    run = finished.stem.removeprefix("zwx-")
    assert [file.name for file in kept_files(session)] == [f"zwx-{run}-step-{step}.safetensors" for step in (2, 4)]
    weights = [load_file(file) for file in (*kept_files(session), finished)]
    drawing = [weight["model.diffusion_model.out.2.weight"] for weight in weights]
    assert not drawing[0].equal(drawing[1])
    assert not drawing[1].equal(drawing[2])
    words = [key for key in weights[0] if key.startswith("cond_stage_model.")]
    assert words
    assert all(weights[0][key].equal(weights[2][key]) for key in words), "stage 1 is over"
    assert not list((session / ".fastsd" / "finished").iterdir()), "their folders are gone"
    manifest = Manifest.load(session)
    assert [(record["run"], record["verified"]) for record in manifest.of_kind("intermediate")] == [
        (f"{run}-step-2", "forward"),
        (f"{run}-step-4", "forward"),
    ]
    assert len(manifest.of_kind("convert")) == 1
    assert inspect(kept_files(session)[0]).metadata["fastsd.steps"] == "4"
    assert "steps 2, 4" in (session / "STATUS.txt").read_text()

    # No daemon runs: the promotion is a record in the tree, and whoever comes next publishes it.
    digest = sha256_of(kept_files(session)[1])
    told = promote(daemon, str(session), "--step", "4")
    assert (told["name"], told["step"], told["daemon"]) == (f"{run}-step-4", 4, False)
    model = Path(told["model"])
    assert model.parent == session
    assert sha256_of(model) == digest
    assert json.loads(model.with_suffix(".json").read_text())["sha256"] == digest
    assert [file.name for file in kept_files(session)] == [f"zwx-{run}-step-2.safetensors"]
    shutil.rmtree(daemon.state.folder)  # a new machine
    daemon.settings(watch={"settle": 0.5}, webui=daemon.webui_keys())
    daemon.start()
    until(lambda: published(session, f"{run}-step-4"), f"it is published; log: {daemon.log}", 120)
    assert daemon.drawings()[-1]["hash"] == digest[:10]
    # While the daemon runs, it does it: the finished model again.
    told = promote(daemon, str(finished))
    assert (told["name"], told["daemon"]) == (run, True)
    until(lambda: daemon.drawings()[-1]["hash"] == sha256_of(finished)[:10], f"that one; log: {daemon.log}", 120)
    until(lambda: "promoted" in (session / "STATUS.txt").read_text(), "STATUS.txt says so", 20)
    assert daemon.manifest(session).get("train", run), "and nothing was trained anew"
    assert daemon.stop() == 0


def test_a_run_that_diverged_leaves_its_last_good_model(daemon: DaemonProcess, photographs: list[Path]) -> None:
    daemon.settings(watch={"settle": 0.5}, webui={"kind": "none"})
    spec = SPEC.replace("save_every: 2\n", "schedule: constant\n").replace("steps: 6", "steps: 400")
    session = make_session(daemon, photographs, spec)
    daemon.start()
    until(lambda: list(session.glob("checkpoints/step-5")), f"a few steps are done; log: {daemon.log}", 120)
    daemon.kill()
    # From here on at a rate at which nothing holds.
    [run_file] = session.glob("runs/*/run.json")
    record = json.loads(run_file.read_text())
    record["plan"]["unet_rate"] = 1e6
    run_file.write_text(json.dumps(record))
    assert daemon.once() == 1, "a run has failed"
    run = run_file.parent.name
    [model] = kept_files(session)
    step = model.stem.removeprefix(f"zwx-{run}-step-")
    assert int(step) >= 3
    refusal = (session / "train.yaml.error.txt").read_text()
    assert f"in runs/{run}. To begin with it, write `continue: {run}-step-{step}` and leave base out." in refusal
    assert "say 2e+05" in refusal
    assert f"step {step} (" in (session / "STATUS.txt").read_text()
    assert inspect(model).metadata["fastsd.steps"] == str(int(step) + 2)

    # What it begins with then is held by tests of continue.
    tree = Session(daemon.root, "Sessions/zwx", "", Manifest.load(session))
    assert former_run(tree, f"{run}-step-{step}") == {"run": run, "model": f"runs/{run}/{model.name}"}
