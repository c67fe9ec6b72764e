"""Intermediate models: what a run would have ended with, written once, however often it is killed."""

import json
import os
import shutil
import signal
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
from PIL import Image

from handlers.context import JobContext
from handlers.convert.adapter import ADAPTER_FILE, convert_adapter
from handlers.convert.job import convert
from handlers.train.base import find_base
from handlers.train.job import TrainHandler
from sessions.manifest import INTERMEDIATE, Manifest
from sessions.refusal import Refusal
from tests.handlers.train_process import run_child, train_in_child, weights_of
from tests.handlers.train_session import make_session, payload_of

SPEC = """
text_encoder: {steps: 2, learning_rate: 1e-3}
unet: {steps: 7, learning_rate: 1e-3}
schedule: constant
sample_every: 0
checkpoint_every: 1
instance: zwx
batch_size: 1
save_every: 2
save_from: 3
"""
KEPT = ["r1-step-3", "r1-step-5"]


def train(payload: dict[str, object], cache: Path) -> None:
    ignored = JobContext(1, "train", payload, "cpu", cache, lambda *_: None, lambda: False, lambda: False)
    TrainHandler().run(ignored)


def folders(session: Path) -> dict[str, dict[str, str]]:
    """The folders that training left: name → file → hash, but for what names the time of the run."""
    found = {}
    for folder in sorted((session / ".fastsd" / "finished").iterdir()):
        assert not folder.name.startswith("."), "nothing half-finished"
        weights = weights_of(folder)
        weights.pop("intermediate.json", None)
        found[folder.name] = weights
    return found


@pytest.fixture(scope="module")
def undisturbed(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    session = make_session(tmp_path_factory.mktemp("tree") / "Sessions" / "dog")
    train(payload_of(session, SPEC), cache)
    return folders(session)


def test_a_model_of_a_step_is_that_of_a_run_which_ends_there(
    undisturbed: dict[str, dict[str, str]], cache: Path, tmp_path: Path
) -> None:
    assert sorted(undisturbed) == ["r1", *KEPT]
    session = make_session(tmp_path / "Sessions" / "dog")
    train(payload_of(session, SPEC.replace("steps: 7", "steps: 5").replace("save_every: 2\nsave_from: 3\n", "")), cache)
    assert folders(session) == {"r1": undisturbed["r1-step-5"]}
    convert(session / ".fastsd" / "finished" / "r1", tmp_path / "dog.safetensors", verify="forward")


@pytest.mark.parametrize("method", ["finetune", "lora"])
def test_with_a_moving_average_too_and_as_an_adapter(method: str, cache: Path, tmp_path: Path) -> None:
    """What is kept is what samples show: the average. Training goes on from what it averages."""
    spec = SPEC.replace("steps: 7", "steps: 4") + f"method: {method}\nema: true\n"
    long, short = (make_session(tmp_path / name / "Sessions" / "dog") for name in ("long", "short"))
    train(payload_of(long, spec), cache)
    plain = spec.replace("save_every: 2\nsave_from: 3\n", "")
    train(payload_of(short, plain.replace("steps: 4", "steps: 3")), cache)
    kept = folders(long)
    assert sorted(kept) == ["r1", "r1-step-3"]
    assert kept["r1-step-3"] == folders(short)["r1"]
    if method == "lora":
        assert ADAPTER_FILE in kept["r1-step-3"]
        base = find_base("miniature", None, cache)
        source = long / ".fastsd" / "finished" / "r1-step-3"
        made = convert_adapter(source, tmp_path / "dog.safetensors", base=base, verify="forward")
        assert made.verified == "forward"


def test_killed_while_it_writes_and_before_its_checkpoint_each_is_written_once(
    cache: Path, tmp_path: Path, undisturbed: dict[str, dict[str, str]], server: ForkServerContext
) -> None:
    session = make_session(tmp_path / "Sessions" / "dog")
    payload = payload_of(session, SPEC)
    finished = session / ".fastsd" / "finished"
    # The temp folder of step 3 is seen: killed while it is filled, or as it gets its name.
    ours, theirs = server.Pipe()
    process = server.Process(target=train_in_child, args=(payload, str(cache), -1, theirs))
    process.start()
    deadline = time.monotonic() + 120
    while not (finished.is_dir() and any(finished.iterdir())):
        assert time.monotonic() < deadline
        assert process.is_alive()
        time.sleep(0.001)
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    ours.close()
    theirs.close()
    newest = max(int(folder.name.split("-")[1]) for folder in (session / "checkpoints").glob("step-*"))
    assert newest < 5, "the checkpoint of the step waits for its model, or the run would go on without it"
    assert run_child(server, payload, cache, 8)[-1] == 8
    assert folders(session) == {name: undisturbed[name] for name in KEPT}
    inode = (finished / KEPT[0]).stat().st_ino
    # Step 5 has its file by now, and its folder is gone; all checkpoints are lost, so that both are done again.
    Manifest.load(session).append([{"kind": INTERMEDIATE, "run": KEPT[1], "outputs": []}])
    shutil.rmtree(finished / KEPT[1])
    shutil.rmtree(session / "checkpoints")
    assert run_child(server, payload, cache, None)[-1] == 9
    assert folders(session) == {key: value for key, value in undisturbed.items() if key != KEPT[1]}
    assert (finished / KEPT[0]).stat().st_ino == inode, "not written again"


def test_its_samples_are_drawn_and_the_disk_must_hold_all_of_them(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = make_session(tmp_path / "Sessions" / "dog")
    spec = (
        'text_encoder: {steps: 1}\nunet: {steps: 3}\nsave_every: 2\nsample_every: 5\nprompts: ["zwx"]\nbatch_size: 1\n'
    )
    train(payload_of(session, spec), cache)
    facts = json.loads((session / ".fastsd" / "finished" / "r1-step-2" / "intermediate.json").read_text())
    assert (facts["run"], facts["of"], facts["step"]) == ("r1-step-2", "r1", 2)
    assert facts["metadata"]["fastsd.steps"] == 3
    assert facts["preview"] == "previews/samples-step-3.jpg"
    with Image.open(session / facts["preview"]) as picture:
        assert picture.size[0] >= 128

    many = make_session(tmp_path / "many" / "Sessions" / "dog")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000_000))
    with pytest.raises(Refusal, match=r"needs \d+\.\d\d GB .* \d+\.\d\d for 98 intermediate models") as refused:
        train(payload_of(many, "unet: {steps: 1000}\nsave_every: 10\nsave_from: 20\n"), cache)
    assert "save_every" in refused.value.advice
    with pytest.raises(Refusal, match="the run has 200 unet steps"):
        train(payload_of(many, "save_every: 201\n"), cache)
