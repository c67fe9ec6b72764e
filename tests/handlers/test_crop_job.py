"""The crop job on real photographs and on generated files."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from handlers.context import Cancelled, JobContext, JobResult
from handlers.crop.decode import OpenPicture, read_source
from handlers.crop.job import CropHandler
from handlers.crop.render import render_window
from handlers.crop.subject import find_subject
from sessions import files
from sessions.refusal import Refusal
from tests import pictures


@cache
def handler() -> CropHandler:
    return CropHandler()


def context(payload: Mapping[str, Any], *, cancelled: bool = False) -> JobContext:
    return JobContext(
        job=1,
        kind="crop",
        payload=payload,
        device="cpu",
        cache=Path("unused"),
        report=lambda *_: None,
        is_cancelled=lambda: cancelled,
        is_stopping=lambda: False,
    )


def crop(source: Path, output: Path, **payload: Any) -> JobResult:
    return handler().run(
        context({"source": str(source), "output": str(output), "resolution": 256, "mode": "smart", **payload})
    )


def saved(folder: Path, content: bytes, name: str = "picture.png") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def centre_of(box: list[int]) -> tuple[float, float]:
    return ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)


@pytest.mark.parametrize("moved", [0, 300, 700])
@pytest.mark.parametrize("axis", [0, 1])
def test_the_astronauts_face_is_found_and_kept_wherever_she_stands(tmp_path: Path, moved: int, axis: int) -> None:
    with Image.open(pictures.photograph("astronaut.png")) as image:
        portrait = image.convert("RGB")
    size, corner = ((1212, 512), (moved, 0)) if axis == 0 else ((512, 1212), (0, moved))
    picture = Image.new("RGB", size, (90, 90, 90))
    picture.paste(portrait, corner)
    result = crop(saved(tmp_path, pictures.encoded(picture, "PNG")), tmp_path / "crops" / "a.jpg")
    assert result.facts["subject"] == "face"
    # Where her face is among the photograph's 512 pixels.
    first, last = ((195, 255), (75, 160))[axis]
    begin, end = result.facts["box"][axis], result.facts["box"][axis + 2]
    assert begin <= moved + first
    assert end >= moved + last
    # As near to the centre as the picture's ends allow.
    assert abs((begin + end) / 2 - max(256, moved + (first + last) / 2)) < 20


def test_facts_output_and_hash(tmp_path: Path) -> None:
    source = pictures.photograph("astronaut.png")
    result = crop(source, tmp_path / "crops" / "astronaut.jpg")
    assert result.outputs == [tmp_path / "crops" / "astronaut.jpg"]
    facts = dict(result.facts)
    assert facts.pop("health")["shorter_side"] == 512
    assert facts == {
        "sha256": files.sha256_of(source),
        "box": [0, 0, 512, 512],
        "picture": [512, 512],
        "subject": "face",
        "written_size": [256, 256],
        "warnings": [],
    }
    with Image.open(result.outputs[0]) as written:
        assert (written.format, written.mode, written.size) == ("JPEG", "RGB", (256, 256))
        reference = np.asarray(Image.open(source).convert("RGB").resize((256, 256), Image.Resampling.LANCZOS))
        assert np.abs(np.asarray(written).astype(int) - reference.astype(int)).mean() < 2.5


@pytest.mark.parametrize("spot", [(0.12, 0.5), (0.3, 0.4), (0.5, 0.5), (0.8, 0.6)])
@pytest.mark.parametrize("size", [(900, 400), (400, 900)])
def test_what_stands_out_is_kept_whole_and_near_the_centre(
    tmp_path: Path, spot: tuple[float, float], size: tuple[int, int]
) -> None:
    spot = spot if size[0] > size[1] else (spot[1], spot[0])
    source = saved(tmp_path, pictures.encoded(pictures.scene(size, spot, radius=0.1), "PNG"))
    facts = crop(source, tmp_path / "out.jpg").facts
    assert facts["subject"] == "saliency"
    x, y, r, side = spot[0] * size[0], spot[1] * size[1], 0.1 * min(size), min(size)
    x0, y0, x1, y1 = facts["box"]
    assert x0 <= x - r
    assert y0 <= y - r
    assert x1 >= x + r
    assert y1 >= y + r
    wanted = [min(max(place, side / 2), length - side / 2) for place, length in zip((x, y), size, strict=True)]
    assert all(abs(a - b) < 0.1 * side for a, b in zip(centre_of(facts["box"]), wanted, strict=True))


def test_an_even_picture_gives_the_centre(tmp_path: Path) -> None:
    source = saved(tmp_path, pictures.encoded(Image.new("RGB", (500, 300), (120, 130, 140)), "PNG"))
    facts = crop(source, tmp_path / "out.jpg").facts
    assert (facts["subject"], facts["box"]) == ("centre", [100, 0, 400, 300])


def test_the_modes(tmp_path: Path) -> None:
    source = saved(tmp_path, pictures.encoded(pictures.scene((900, 400), (0.1, 0.5)), "PNG"))
    assert crop(source, tmp_path / "out.jpg", mode="smart").facts["box"] == [0, 0, 400, 400]
    assert crop(source, tmp_path / "out.jpg", mode="centre").facts["box"] == [250, 0, 650, 400]
    whole = crop(source, tmp_path / "out.jpg", mode="off").facts
    assert (whole["box"], whole["written_size"]) == ([0, 0, 900, 400], [576, 256])
    with pytest.raises(ValueError, match="sideways"):
        crop(source, tmp_path / "out.jpg", mode="sideways")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_same_picture_turned_by_exif_gives_the_same_window_and_pixels(tmp_path: Path, orientation: int) -> None:
    with Image.open(pictures.photograph("rocket.jpg")) as image:
        upright = image.convert("RGB")
    plain = crop(saved(tmp_path, pictures.encoded(upright, "PNG")), tmp_path / "plain.png")
    turned_file = saved(tmp_path, pictures.with_orientation(upright, orientation), "turned.png")
    turned = crop(turned_file, tmp_path / "turned-crop.png")
    assert {**turned.facts, "sha256": ""} == {**plain.facts, "sha256": ""}
    assert np.array_equal(np.asarray(Image.open(turned.outputs[0])), np.asarray(Image.open(plain.outputs[0])))


@pytest.mark.parametrize("name", ["astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png"])
def test_a_copy_twice_as_big_gives_the_same_window(tmp_path: Path, name: str) -> None:
    with Image.open(pictures.photograph(name)) as image:
        small = image.convert("RGB")
    big = small.resize((small.width * 2, small.height * 2), Image.Resampling.LANCZOS)
    boxes = [
        crop(saved(tmp_path, pictures.encoded(picture, "JPEG", quality=95)), tmp_path / "out.jpg").facts["box"]
        for picture in (small, big)
    ]
    assert all(abs(b / 2 - s) <= 0.02 * min(small.size) for s, b in zip(*boxes, strict=True))


def test_a_small_picture_keeps_its_size_and_warns(tmp_path: Path) -> None:
    source = saved(tmp_path, pictures.encoded(pictures.scene((200, 100)), "PNG"))
    facts = crop(source, tmp_path / "out.jpg").facts
    assert facts["written_size"] == [100, 100]
    assert any("100 × 100" in warning and "256" in warning for warning in facts["warnings"])


def test_no_metadata_is_written(tmp_path: Path) -> None:
    exif = pictures.with_orientation(pictures.scene((400, 300)), 6, "JPEG", comment=b"where I live")
    for name in ("out.jpg", "out.png", "out.webp"):
        (output,) = crop(saved(tmp_path, exif, "x.jpg"), tmp_path / name).outputs
        with Image.open(output) as written:
            assert not written.getexif()
            assert not {"icc_profile", "comment", "exif", "xmp"} & set(written.info)
        content = output.read_bytes()
        assert b"where I live" not in content
        assert b"A camera" not in content


def test_a_refusal_leaves_nothing_and_the_next_picture_goes_on(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="damaged"):
        crop(saved(tmp_path, pictures.truncated_jpeg(), "bad.jpg"), tmp_path / "crops" / "bad.jpg")
    assert not (tmp_path / "crops").exists()
    crop(pictures.photograph("coffee.png"), tmp_path / "crops" / "coffee.jpg")
    assert [path.name for path in (tmp_path / "crops").iterdir()] == ["coffee.jpg"]


def test_the_source_is_never_written_over(tmp_path: Path) -> None:
    content = pictures.encoded(pictures.scene((300, 300)), "JPEG")
    source = saved(tmp_path, content, "x.jpg")
    (tmp_path / "link.jpg").symlink_to(source)
    for output in (source, tmp_path / "link.jpg"):
        with pytest.raises(Refusal, match="replace"):
            crop(source, output)
    assert source.read_bytes() == content


def test_a_cancelled_job_does_nothing(tmp_path: Path) -> None:
    payload = {"source": str(pictures.photograph("coffee.png")), "output": str(tmp_path / "out.jpg")}
    with pytest.raises(Cancelled):
        handler().run(context(payload, cancelled=True))
    assert not (tmp_path / "out.jpg").exists()


def test_training_gets_the_window_at_its_own_size_from_the_original(tmp_path: Path) -> None:
    upright = pictures.scene((2400, 1600), (0.3, 0.5), radius=0.2)
    source = saved(tmp_path, pictures.with_orientation(upright, 6, "JPEG", quality=95), "x.jpg")
    box = crop(source, tmp_path / "out.jpg").facts["box"]
    reference = upright.crop(box)
    for size in (64, 300, 1024, 1600, 1700):
        window = render_window(source, box, size)
        assert (window.mode, window.size) == ("RGB", (size, size))
        expected = np.asarray(reference.resize((size, size), Image.Resampling.LANCZOS)).astype(int)
        assert np.abs(np.asarray(window).astype(int) - expected).mean() < 2
    assert render_window(source, (0, 0, 2400, 1600), (384, 256)).size == (384, 256)
    with pytest.raises(ValueError, match="leaves"):
        render_window(source, (1000, 0, 2600, 1600), 256)
    with pytest.raises(ValueError, match="empty"):
        render_window(source, (10, 10, 10, 10), 256)


def test_a_window_of_a_reduced_decoding_lies_where_it_should(tmp_path: Path) -> None:
    """Sides that are no multiple of 8, where reduced JPEG rounds up."""
    upright = pictures.scene((2397, 1603), (0.5, 0.5), radius=0.2)
    source = saved(tmp_path, pictures.encoded(upright, "JPEG", quality=95), "x.jpg")
    window = np.asarray(render_window(source, (397, 3, 1997, 1603), 100)).astype(int)
    expected = np.asarray(upright.crop((397, 3, 1997, 1603)).resize((100, 100), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(window - expected).mean() < 1.5


def test_faces_of_a_crowd_are_all_found_and_kept_where_they_fit(tmp_path: Path) -> None:
    with Image.open(pictures.photograph("astronaut.png")) as image:
        head = image.convert("RGB").crop((130, 0, 310, 220))
    crowd = Image.new("RGB", (1400, 500), (110, 120, 110))
    places = [(760, 60), (950, 200), (1140, 80)]
    for place in places:
        crowd.paste(head, place)
    source = saved(tmp_path, pictures.encoded(crowd, "PNG"))
    decoded = OpenPicture(read_source(source)).decode(1.0)
    assert len(find_subject(decoded.image, handler()._finders).boxes) == 3
    x0, _, x1, _ = crop(source, tmp_path / "out.jpg").facts["box"]
    # 500 pixels hold the heads of all three: from 760 + 65 to 1140 + 125.
    assert x0 <= 830
    assert x1 >= 1255


def test_a_wish_a_caption_and_a_format(tmp_path: Path) -> None:
    source = saved(tmp_path, pictures.with_orientation(pictures.scene((900, 600), (0.8, 0.5)), 6, "JPEG", quality=95))
    fixed = crop(source, tmp_path / "fixed.webp", wish={"box": [100, 50, 300, 250], "unit": "pixels"})
    assert (fixed.facts["box"], fixed.facts["subject"]) == ([100, 50, 300, 250], "grounded")
    assert fixed.facts["written_size"] == [200, 200]
    with Image.open(fixed.outputs[0]) as written:
        assert (written.format, written.size) == ("WEBP", (200, 200))
    share = crop(source, tmp_path / "out.jpg", wish={"box": [0.5, 0.0, 0.9, 0.5], "unit": "share"})
    assert share.facts["box"] == [450, 0, 810, 360]
    dog = {"phrase": "a dog", "box": [0.0, 0.2, 0.1, 0.5]}
    assert crop(source, tmp_path / "out.jpg", entities=[dog]).facts["box"] == [0, 0, 600, 600]
    # the disc, which nobody grounded, stands at the right
    assert crop(source, tmp_path / "out.jpg", entities=[dog], wish={"exclude": ["dog"]}).facts["box"][2] == 900
    with pytest.raises(Refusal, match="leaves"):
        crop(source, tmp_path / "out.jpg", wish={"box": [800, 0, 1200, 400]})


def test_transparency_lies_on_the_chosen_ground(tmp_path: Path) -> None:
    source = saved(tmp_path, pictures.half_transparent_png())
    (output,) = crop(source, tmp_path / "out.png", ground=[10, 200, 30], mode="off").outputs
    with Image.open(output) as written:
        assert written.getpixel((20, 128)) == (10, 200, 30)
    with pytest.raises(ValueError, match="ground"):
        crop(source, tmp_path / "out.png", ground=[10, 300, 30])
