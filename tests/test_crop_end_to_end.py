"""Crops as people get them: by a daemon with the miniature captioner, by a class, by crop.txt; killed and robbed."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from handlers.models.miniature.world import Scene, Thing, draw
from sessions.layout import SHEET
from sessions.manifest import Record, manifest_path
from tests.daemon_process import DaemonProcess, until
from tests.networks import red_network, red_picture, written

SIDE = 256
BLUE, RED = (40, 70, 210), (220, 40, 40)
SIZE = "small"


def wide_picture(shapes: tuple[str, str], phase: float) -> Image.Image:
    """A shape at either end of a picture of 2 : 1: no square window holds both.

    The captioner sees every picture stretched to a square, so it sees a scene of its world.
    """
    things = tuple(
        Thing(shape, colour, SIZE, (x, 0.5), 0.17, 0.0, rgb)
        for shape, colour, rgb, x in zip(shapes, ("red", "blue"), (RED, BLUE), (0.22, 0.78), strict=True)
    )
    return draw(Scene(things, "white", "plain", (245, 245, 245), phase), SIDE).image.resize((2 * SIDE, SIDE))


def fill(folder: Path) -> None:
    """Three pictures: the square is at the right end in two, at the left in one."""
    folder.mkdir(parents=True)
    for name, shapes in (("a", ("circle", "square")), ("b", ("heart", "square")), ("c", ("square", "triangle"))):
        wide_picture(shapes, 0.0).save(folder / f"{name}.png")


def crops(daemon: DaemonProcess, session: Path) -> dict[str, Record]:
    return {record["source"]: record for record in daemon.manifest(session).of_kind("crop")}


def lines(session: Path, kind: str = "crop") -> Counter[str]:
    """How often each picture's output was made."""
    records = [json.loads(line) for line in manifest_path(session).read_text().splitlines()]
    return Counter(str(record.get("source")) for record in records if record["kind"] == kind)


def grounded(daemon: DaemonProcess, session: Path) -> dict[str, Record] | None:
    """The crops, once all of them know their caption's boxes."""
    found = crops(daemon, session)
    return found if len(found) == 3 and all("entities" in crop["params"] for crop in found.values()) else None


def settled(daemon: DaemonProcess) -> bool:
    """Whether nothing is to be done."""
    answer = daemon.ask("jobs") or {"jobs": [{"state": "unknown"}]}
    return not any(job["state"] in ("ready", "running", "waiting", "unknown") for job in answer["jobs"])


@pytest.fixture
def session(daemon: DaemonProcess) -> Path:
    daemon.settings(captioner="miniature", watch={"settle": 0.3}, webui={"kind": "none"})
    return daemon.root / "Sessions" / "shapes"


def holds_the_square(crop: Record) -> bool:
    """Whether a crop's window holds the box of the square whole, but for a cell of the captioner's raster."""
    (box,) = [entity["box"] for entity in crop["params"]["entities"] if "square" in entity["phrase"]]
    slack = 2 * SIDE / 32
    left, right = (edge * 2 * SIDE for edge in (box[0], box[2]))
    return bool(crop["box"][0] <= left + slack and right - slack <= crop["box"][2])


def test_crops_follow_their_captions_and_a_class_whatever_is_killed_and_lost(
    daemon: DaemonProcess, session: Path
) -> None:
    fill(session / "instance_images")
    daemon.start()
    until(lambda: daemon.manifest(session).of_kind("caption"), f"a caption; log: {daemon.log}", 240)
    daemon.kill()
    shutil.rmtree(daemon.state.folder)
    daemon.start()
    until(lambda: grounded(daemon, session), f"crops with boxes; log: {daemon.log}", 240)
    until(lambda: settled(daemon), "all is done")
    assert max(lines(session).values()) <= 2, "once for the picture, once for its caption"
    assert max(lines(session, "caption").values()) == 1

    daemon.kill()
    (session / "train.yaml").write_text("base: miniature\nclass: square\n")
    shutil.rmtree(daemon.state.folder)
    daemon.start()

    def with_class() -> bool:
        return all(crop["params"].get("words") == ["square"] for crop in crops(daemon, session).values())

    until(with_class, f"crops that know the class; log: {daemon.log}")
    for name, crop in crops(daemon, session).items():
        phrases = [entity["phrase"] for entity in crop["params"]["entities"]]
        assert sum("square" in phrase for phrase in phrases) == 1, (name, phrases)
        # A crop job that knows of boxes keeps what the class names.
        assert holds_the_square(crop), (name, crop)
    assert max(lines(session).values()) <= 3
    assert daemon.stop() == 0


def test_crop_txt_is_heeded_at_once_and_for_the_picture_that_it_names(daemon: DaemonProcess, session: Path) -> None:
    fill(session)
    assert daemon.once() == 0, daemon.log.read_text()
    assert (session / SHEET).is_file()
    before = lines(session)
    daemon.start()
    (session / "crop.txt").write_text("b.png: 0 0 200 200\nc.png: 1 2 3\n")

    def wish(name: str) -> Any:
        return crops(daemon, session)[name]["params"].get("wish")

    until(lambda: wish("b.png"), f"b.png is cropped as wished; log: {daemon.log}")
    error = session / "crop.txt.error.txt"
    until(error.is_file, "the line that cannot be used is told")
    assert "line 2" in error.read_text()
    daemon.kill()
    shutil.rmtree(daemon.state.folder)
    (session / "crop.txt").write_text("b.png: 0 0 200 200\nc.png: 10% 20% 30% 60%\n")
    assert daemon.once() == 0, daemon.log.read_text()
    assert not error.exists()
    assert wish("c.png") == {"box": [0.1, 0.2, 0.3, 0.6], "unit": "share"}
    assert lines(session) - before == Counter({"b.png": 1, "c.png": 1})
    manifest = manifest_path(session).read_bytes()
    shutil.rmtree(daemon.state.folder)
    assert daemon.once() == 0, daemon.log.read_text()
    assert manifest_path(session).read_bytes() == manifest, "nothing is made twice"


def test_a_network_that_is_brought_while_the_daemon_runs_makes_the_crops_that_wait_for_it(
    daemon: DaemonProcess, session: Path
) -> None:
    daemon.settings(watch={"settle": 0.3}, webui={"kind": "none"})
    session.mkdir(parents=True)
    models = daemon.root / "Models"
    written(models, red_network()[:-20])
    for number in range(3):
        red_picture((600, 200), (0.8, 0.2, 0.95, 0.8)).save(session / f"{number}.png")
    (session / "crop.txt").write_text("subject: segment\n")
    daemon.start()

    def subjects() -> set[str]:
        return (
            {crop["subject"] for crop in crops(daemon, session).values()} if len(crops(daemon, session)) == 3 else set()
        )

    def status() -> str:
        file = session / "STATUS.txt"
        return file.read_text() if file.exists() else ""

    until(lambda: subjects() and "segment" not in subjects(), f"crops by other means; log: {daemon.log}")
    until(lambda: "u2netp.onnx cannot be used" in status(), "STATUS.txt says why")
    assert "fastsd models get segment" in status()
    assert not list(session.rglob("*.error.txt"))
    written(models, red_network())
    until(lambda: subjects() == {"segment"}, f"crops by the network; log: {daemon.log}")
    assert all(crop["box"] == [400, 0, 600, 200] for crop in crops(daemon, session).values())
    until(lambda: "cannot be used" not in status(), "STATUS.txt is silent about it")
    assert daemon.stop() == 0
    # A machine without a network makes nothing again.
    (models / "u2netp.onnx").unlink()
    shutil.rmtree(daemon.state.folder)
    assert daemon.once() == 0, daemon.log.read_text()
    assert max(lines(session).values()) == 2
