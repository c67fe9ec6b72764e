"""The contact sheet as its handler draws it, from real pictures."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageColor

from handlers.context import Cancelled, JobContext, JobResult
from handlers.crop.sheet import SheetHandler, Shown, colour_of, sheet, tile_side, with_window
from sessions.files import sha256_of
from tests.pictures import photograph, scene


def draw(
    folder: Path, pictures: list[dict[str, Any]], more: int = 0, *, cancelled: bool = False
) -> tuple[JobResult, Image.Image]:
    payload: Mapping[str, Any] = {
        "output": os.fspath(folder / "previews" / "crops.jpg"),
        "pictures": pictures,
        "more": more,
        "pixel_limit": 10_000_000,
    }
    context = JobContext(1, "sheet", payload, "cpu", folder, lambda *_: None, lambda: cancelled, lambda: False)
    result = SheetHandler().run(context)
    (output,) = result.outputs
    with Image.open(output) as image:
        return result, image.copy()


def entry(source: Path, box: tuple[int, int, int, int], subject: str = "saliency") -> dict[str, Any]:
    return {"source": os.fspath(source), "box": list(box), "subject": subject, "wished": False}


def test_every_picture_is_on_it_and_the_same_ones_give_the_same_sheet(tmp_path: Path) -> None:
    pictures = [
        entry(photograph("astronaut.png"), (0, 0, 512, 512), "face"),
        entry(photograph("chelsea.png"), (75, 0, 375, 300)),
        entry(photograph("rocket.jpg"), (100, 0, 527, 427), "centre"),
    ]
    result, image = draw(tmp_path, pictures)
    first = sha256_of(result.outputs[0])
    assert result.facts == {"pictures": 3, "unread": 0}
    assert image.width >= 2 * tile_side(3)
    draw(tmp_path, pictures)
    assert sha256_of(result.outputs[0]) == first


def test_one_that_cannot_be_read_leaves_a_tile_and_no_more(tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff nothing")
    os.mkfifo(tmp_path / "pipe.jpg")
    pictures = [entry(tmp_path / name, (0, 0, 9, 9)) for name in ("gone.jpg", "broken.jpg", "pipe.jpg")]
    result, _ = draw(tmp_path, [*pictures, entry(photograph("coffee.png"), (100, 0, 500, 400))])
    assert result.facts == {"pictures": 4, "unread": 3}


def test_a_name_of_any_bytes_can_stand_on_it(tmp_path: Path) -> None:
    for name in (b"new\nline.jpg", b"\xff\xfe.jpg", b"x" * 240 + b".jpg", "日本.jpg".encode()):
        path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
        scene((96, 72)).save(path, "JPEG")
        result, _ = draw(tmp_path, [entry(path, (0, 0, 72, 72))])
        assert result.facts["unread"] == 0


def test_a_cancelled_sheet_ends(tmp_path: Path) -> None:
    with pytest.raises(Cancelled):
        draw(tmp_path, [entry(photograph("coffee.png"), (0, 0, 400, 400))], cancelled=True)


def test_the_window_is_outlined_and_what_lies_outside_is_dimmed() -> None:
    ground = Image.new("RGB", (400, 200), (200, 30, 30))
    tile = with_window(ground, (4000, 2000), Shown(Path("x.jpg"), (1000, 0, 3000, 2000), "face", wished=False), 200)
    pixels = np.asarray(tile).astype(int)
    assert tile.size == (200, 100)
    assert tuple(pixels[50, 50]) == ImageColor.getrgb(colour_of("face"))
    assert tuple(pixels[50, 100]) == (200, 30, 30)
    assert pixels[50, 20].min() > 120, "towards the ground"


@pytest.mark.parametrize("box", [(-5, -5, 10_000, 10_000), (390, 190, 395, 195), (0, 0, 1, 1)])
def test_odd_windows_can_be_drawn(box: tuple[int, int, int, int]) -> None:
    shown = Shown(Path("x.jpg"), box, "centre", wished=True)
    assert with_window(Image.new("RGB", (40, 20)), (400, 200), shown, 144).size == (144, 72)


@pytest.mark.parametrize("count", [1, 2, 24, 25, 200])
def test_sheets_of_every_size_are_of_one_that_can_be_looked_at(count: int) -> None:
    side = tile_side(count)
    tile = Image.new("RGB", (side, side // 2))
    shown = [Shown(Path(f"{number}.jpg"), (0, 0, 1, 1), "face", wished=False) for number in range(count)]
    page = sheet(shown, [tile] * count, side, more=3)
    assert max(page.size) <= 3600
    assert page.width * page.height >= count * side * side
