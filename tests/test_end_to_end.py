"""The main job, whole: pictures and a train.yaml dropped into a folder, a model drawn with by the WebUI."""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from sessions.files import sha256_of
from tests.daemon_process import DaemonProcess, until

SPEC = """\
base: miniature
instance: zwx
class: thing
start: now
text_encoder: {steps: 6}
unet: {steps: 24}
checkpoint_every: 4
sample_every: 0
"""
WATCH = {"settle": 0.5}


def write_slowly(source: Path, target: Path, stop: threading.Event) -> None:
    """Copy as a slow upload does: the file is there long before it is complete."""
    content = source.read_bytes()
    with target.open("wb", buffering=0) as file:
        for start in range(0, len(content), len(content) // 6 + 1):
            file.write(content[start : start + len(content) // 6 + 1])
            stop.wait(0.2)


def drop(daemon: DaemonProcess, photographs: list[Path]) -> Path:
    """Write two pictures slowly, move the others in, and drop a train.yaml."""
    session = daemon.root / "Sessions" / "zwx"
    pictures = session / "instance_images"
    pictures.mkdir(parents=True)
    stop = threading.Event()
    writers = [
        threading.Thread(target=write_slowly, args=(photograph, pictures / photograph.name, stop))
        for photograph in photographs[:2]
    ]
    for writer in writers:
        writer.start()
    for photograph in photographs[2:]:
        beside = daemon.root / f".{photograph.name}"
        shutil.copyfile(photograph, beside)
        beside.rename(pictures / photograph.name)
    (session / "train.yaml").write_text(SPEC)
    for writer in writers:
        writer.join()
    return session


def finished(daemon: DaemonProcess, session: Path) -> dict[str, Any] | None:
    """The publication, once the manifest has it."""
    records = daemon.manifest(session).of_kind("publish")
    return records[0] if records else None


def outputs_of(session: Path) -> dict[str, str]:
    """Every output of a session that must not depend on times: name → hash (of the tensors, for a model)."""
    found = {}
    for path in sorted(session.rglob("*")):
        relative = path.relative_to(session).as_posix()
        if path.suffix == ".safetensors":
            digest = hashlib.sha256()
            with safe_open(path, "np") as file:
                for name in sorted(file.keys()):
                    digest.update(name.encode() + file.get_tensor(name).tobytes())
            found["model"] = digest.hexdigest()
        elif path.is_file() and relative.startswith(("crops/", "previews/", "captions/")) and path.suffix != ".json":
            found[relative] = sha256_of(path)
    return found


def check_whole(daemon: DaemonProcess, session: Path, photographs: list[Path]) -> None:
    """Everything is there, and it is what it claims to be."""
    publication = finished(daemon, session)
    assert publication is not None
    models = list(session.glob("zwx-*.safetensors"))
    assert len(models) == 1, "one run, one model"
    published = Path(publication["published"])
    assert published.parent == daemon.models
    assert sha256_of(published) == sha256_of(models[0])
    drawing = daemon.drawings()[-1]
    assert drawing["hash"] == sha256_of(models[0])[:10] == publication["sd_model_hash"]
    for photograph in photographs:
        stem = photograph.stem
        assert (session / "crops" / f"{stem}.jpg").is_file()
        assert (session / "previews" / f"{stem}.jpg").is_file()
        assert len((session / "captions" / f"{stem}.txt").read_text().splitlines()) == 1
        assert sha256_of(session / "instance_images" / photograph.name) == sha256_of(photograph), "never changed"
    until(lambda: daemon.manifest(session).get("sheet", ""), "the contact sheet is drawn at last", 60)
    assert (session / "previews" / "crops.jpg").is_file()
    assert (session / "previews" / "loss.png").is_file()
    assert not list(session.rglob(".fastsd-tmp-*")), "nothing half-finished"
    assert not list((session / "checkpoints").glob("step-*")), "a proven model needs no checkpoints"
    records = daemon.manifest(session)
    assert [len(records.of_kind(kind)) for kind in ("train", "convert", "publish")] == [1, 1, 1]
    status = (session / "STATUS.txt").read_text()
    assert models[0].name in status
    assert "proven by a picture" in status


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, dict[str, str]]:
    """The outputs of the undisturbed run, for the disturbed one to be compared with."""
    return {}


def test_drop_pictures_and_a_spec_get_a_model_in_the_webui(
    daemon: DaemonProcess, photographs: list[Path], undisturbed: dict[str, dict[str, str]]
) -> None:
    daemon.settings(captioner="miniature", watch=WATCH, webui=daemon.webui_keys("--start-delay", "0.5"))
    daemon.start()
    session = drop(daemon, photographs)
    until(lambda: finished(daemon, session), f"the model is published; log: {daemon.log}", 240)
    until(lambda: "proven by a picture" in (session / "STATUS.txt").read_text(), "STATUS.txt says so", 20)
    check_whole(daemon, session, photographs)
    undisturbed["outputs"] = outputs_of(session)
    assert daemon.stop() == 0


def running(daemon: DaemonProcess, kind: str) -> bool:
    return bool(daemon.jobs(kind, "running"))


def steps_done(session: Path) -> int:
    lines = [path.read_text().count("\n") for path in session.glob("runs/*/metrics.jsonl")]
    return max(lines, default=0)


def test_killed_at_three_points_and_without_its_database_it_ends_in_the_same_state(
    daemon: DaemonProcess, photographs: list[Path], undisturbed: dict[str, dict[str, str]]
) -> None:
    daemon.settings(captioner="miniature", watch=WATCH, webui=daemon.webui_keys())
    daemon.start()
    session = drop(daemon, photographs)
    points: list[tuple[str, Callable[[], bool]]] = [
        ("captioning", lambda: running(daemon, "caption")),
        ("mid-training", lambda: running(daemon, "train") and steps_done(session) >= 9),
        ("mid-conversion", lambda: running(daemon, "convert")),
    ]
    for name, reached in points:
        until(reached, f"{name}; log: {daemon.log}", 180)
        daemon.kill()
        daemon.start()
    until(lambda: finished(daemon, session), f"the model is published; log: {daemon.log}", 240)
    until(lambda: "proven by a picture" in (session / "STATUS.txt").read_text(), "STATUS.txt says so", 20)
    check_whole(daemon, session, photographs)
    if "outputs" in undisturbed:
        assert outputs_of(session) == undisturbed["outputs"]

    # A new machine: the databases are gone. Nothing is made again.
    assert daemon.stop() == 0
    shutil.rmtree(daemon.state.folder)
    made = [path for name in ("crops", "captions", "previews", "runs") for path in (session / name).rglob("*")]
    made += list(session.glob("zwx-*"))
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in made if path.is_file()}
    manifest = (session / ".fastsd" / "manifest.jsonl").read_bytes()
    done = daemon.run("up", str(daemon.root), "--once")
    assert done.returncode == 0, done.stderr
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in before} == before
    assert (session / ".fastsd" / "manifest.jsonl").read_bytes() == manifest
    assert not daemon.run("jobs", str(daemon.root), "--all", "--json").stdout
