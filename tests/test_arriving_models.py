"""Another trainer's Diffusers folder, dropped into a session of a daemon that runs: its model comes into the WebUI."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from handlers.models import miniature
from sessions.files import sha256_of
from tests.daemon_process import DaemonProcess, until

WATCH = {"settle": 0.3}
INDEX = "other/model_index.json"


@pytest.fixture(scope="module")
def model(cache: Path) -> Path:
    return miniature.ensure("miniature", cache)


def write_slowly(source: Path, folder: Path, stop: threading.Event) -> None:
    """Copy a folder file by file, the small ones first, each in pieces."""
    for file in sorted((path for path in source.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size):
        target = folder / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        content = file.read_bytes()
        with target.open("wb", buffering=0) as writer:
            for start in range(0, len(content), len(content) // 3 + 1):
                writer.write(content[start : start + len(content) // 3 + 1])
                stop.wait(0.1)


def contents(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), sha256_of(path)


def published(daemon: DaemonProcess, session: Path) -> list[dict[str, object]]:
    return daemon.manifest(session).of_kind("publish")


def test_a_folder_that_arrives_slowly_is_published_once_through_kills_restarts_and_a_lost_state(
    daemon: DaemonProcess, model: Path
) -> None:
    daemon.settings(captioner="miniature", watch=WATCH, webui=daemon.webui_keys())
    session = daemon.root / "Sessions" / "zwx"
    session.mkdir(parents=True)
    shutil.copytree(model, daemon.root / "Models" / "base")
    daemon.start()
    write_slowly(model, session / "other", threading.Event())
    until(lambda: daemon.jobs("convert", "running"), f"the conversion; log: {daemon.log}", 60)
    daemon.kill()
    assert not list(session.glob("zwx-*")), "nothing half-finished has a name"
    daemon.start()
    until(lambda: published(daemon, session), f"the model is published; log: {daemon.log}", 120)
    until(lambda: "proven by a picture" in (session / "STATUS.txt").read_text(), "STATUS.txt says so", 20)
    (file,) = session.glob("zwx-other-*.safetensors")
    drawing = daemon.drawings()[-1]
    assert drawing["hash"] == sha256_of(file)[:10]
    assert dict(contents(session / "other")) == dict(contents(model)), "people's files are never changed"
    assert not list(session.rglob(".fastsd-tmp-*"))
    assert daemon.stop() == 0

    manifest = (session / ".fastsd" / "manifest.jsonl").read_bytes()
    assert daemon.once() == 0, daemon.log.read_text()
    shutil.rmtree(daemon.state.folder)
    assert daemon.once() == 0, daemon.log.read_text()
    assert (session / ".fastsd" / "manifest.jsonl").read_bytes() == manifest, "the manifest knows it"

    # A copy of the folder has other times, and the same bytes.
    shutil.copytree(session / "other", session / "copy", copy_function=shutil.copyfile)
    shutil.rmtree(session / "other")
    (session / "copy").rename(session / "other")
    assert daemon.once() == 0, daemon.log.read_text()
    assert [path.name for path in session.glob("zwx-*.safetensors")] == [file.name]
    assert len(published(daemon, session)) == 1


def test_a_folder_that_is_not_whole_is_told_and_taken_when_it_is(daemon: DaemonProcess, model: Path) -> None:
    daemon.settings(captioner="miniature", watch=WATCH, webui={"kind": "none"})
    session = daemon.root / "Sessions" / "zwx"
    shutil.copytree(model, session / "other")
    weights = session / "other" / "vae" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1000])
    assert daemon.once() == 1
    note = session / "other" / "model_index.json.error.txt"
    assert "vae's diffusion_pytorch_model.safetensors is damaged: 1,000 bytes are missing" in note.read_text()
    assert "Copy the whole Diffusers folder here" in note.read_text()
    assert "bytes are missing" in (session / "STATUS.txt").read_text()
    weights.write_bytes(whole)
    assert daemon.once() == 0, daemon.log.read_text()
    assert not note.exists()
    assert len(list(session.glob("zwx-other-*.safetensors"))) == 1
