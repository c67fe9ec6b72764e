"""A LoRA, whole: pictures and ``method: lora`` dropped into a folder; its file drawn with by the WebUI, the model there
left as it was.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from handlers.models import miniature
from handlers.models.inspect import inspect
from sessions.files import sha256_of
from tests.daemon_process import DaemonProcess, until

SPEC = """\
base: miniature
method: lora
instance: zwx
class: thing
start: now
lora: {rank: 4, alpha: 4}
unet: {steps: 3, learning_rate: 1e-3}
sample_every: 0
"""


def make_session(folder: Path, photographs: list[Path], spec: str) -> Path:
    """A session of three pictures with a train.yaml."""
    pictures = folder / "instance_images"
    pictures.mkdir(parents=True)
    for photograph in photographs[:3]:
        shutil.copyfile(photograph, pictures / photograph.name)
    (folder / "train.yaml").write_text(spec)
    return folder


def published(daemon: DaemonProcess, session: Path) -> dict[str, Any] | None:
    """The publication, once the manifest has it."""
    records = daemon.manifest(session).of_kind("publish")
    return dict(records[0]) if records else None


def data_hash(file: Path) -> str:
    """What A1111 calls a LoRA's hash."""
    content = file.read_bytes()
    return hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()[:12]


def test_a_lora_is_drawn_with_and_another_session_keeps_its_own(
    daemon: DaemonProcess, photographs: list[Path], cache: Path
) -> None:
    # The WebUI has a model of its own already, as every WebUI that LoRAs are for.
    unet = miniature.ensure("miniature", cache) / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copyfile(unet, daemon.models / "mine.safetensors")
    daemon.settings(watch={"settle": 0.5}, webui=daemon.webui_keys())
    daemon.start()
    session = make_session(daemon.root / "Sessions" / "zwx", photographs, SPEC)
    until(lambda: published(daemon, session), f"the LoRA is published; log: {daemon.log}", 240)
    until(lambda: "proven by a picture" in (session / "STATUS.txt").read_text(), "STATUS.txt says so", 20)

    [model] = session.glob("zwx-*.safetensors")
    publication = published(daemon, session)
    assert publication is not None
    loras = daemon.models.parent / "Lora"
    placed, digest, prompt = loras / model.name, data_hash(model), f"<lora:{model.stem}:1> zwx thing"
    assert publication["published"] == str(placed)
    assert sha256_of(placed) == sha256_of(model)
    assert (publication["model_kind"], publication["lora_hash"], publication["proof"]) == ("lora", digest, "picture")
    assert publication["prompt"] == prompt
    drawing = daemon.drawings()[-1]
    assert (drawing["model"], drawing["prompt"]) == (str(daemon.models / "mine.safetensors"), prompt)
    assert drawing["loras"] == {model.stem: digest}
    assert sorted(path.name for path in daemon.models.iterdir()) == ["mine.safetensors"]
    assert (session / "runs" / publication["run"] / "proof.png").is_file()

    assert prompt in (session / "STATUS.txt").read_text()
    assert f"write into the prompt: {prompt}" in daemon.log.read_text()
    assert (inspect(model).kind, inspect(model).layout) == ("lora", "kohya")
    assert json.loads((loras / f"{model.stem}.json").read_text())["activation text"] == "zwx thing"
    [convert] = daemon.manifest(session).of_kind("convert")
    assert (convert["model_kind"], convert["verified"], convert["base"]) == ("lora", "forward", "miniature")
    assert not list((session / ".fastsd" / "finished").glob("*")), "a proven model needs no other copy of itself"
    assert not list((session / "checkpoints").glob("step-*"))
    assert daemon.stop() == 0


@pytest.mark.soak
def test_without_a_webui_the_lora_lies_in_its_folder(daemon: DaemonProcess, photographs: list[Path]) -> None:
    daemon.settings(watch={"settle": 0.5}, webui={"kind": "none"})
    folder = make_session(daemon.root / "zwx", photographs, SPEC.replace("lora\n", "dora\n"))
    done = daemon.run("train", str(folder), "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    model = Path(told["model"])
    assert told["prompt"] == f"<lora:{model.stem}:1> zwx thing"
    assert (inspect(model).kind, inspect(model).variant) == ("lora", "dora")
    assert f"proven. Write into the prompt: {told['prompt']}" in (folder / "STATUS.txt").read_text()
