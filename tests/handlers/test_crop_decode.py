"""Decoding: every kind of file gives right pixels or a refusal that says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from handlers.crop import decode
from handlers.crop.decode import PIXEL_LIMIT, Decoded, OpenPicture, read_source
from sessions.refusal import Refusal
from tests import pictures


def decoded(folder: Path, content: bytes, name: str = "x.png", scale: float = 1.0, limit: int = PIXEL_LIMIT) -> Decoded:
    path = folder / name
    path.write_bytes(content)
    return OpenPicture(read_source(path), limit).decode(scale)


def pixels(result: Decoded) -> NDArray[np.int_]:
    assert result.image.mode == "RGB"
    return np.asarray(result.image).astype(int)


def refusal(folder: Path, content: bytes, name: str = "x.jpg", scale: float = 1.0) -> Refusal:
    with pytest.raises(Refusal) as caught:
        decoded(folder, content, name, scale)
    assert name in caught.value.what
    assert caught.value.advice
    return caught.value


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "empty"),
        (pictures.HTML, "not-a-picture"),
        (pictures.POSTSCRIPT, "not-a-picture"),
        (b"\0" * 20_000, "not-a-picture"),
        (b"\0\0\0\x18ftypheic\0\0\0\0heicmif1", "corrupt"),
        (pictures.truncated_jpeg(), "corrupt"),
        (pictures.zero_padded_jpeg(), "corrupt"),
        (pictures.damaged_png(), "corrupt"),
        (pictures.encoded(pictures.noisy((300, 200)), "WEBP")[:3000], "corrupt"),
        (pictures.encoded(pictures.noisy((300, 200)), "AVIF")[:1500], "corrupt"),
        (pictures.encoded(pictures.noisy((300, 200)), "GIF")[:9000], "corrupt"),
        (pictures.encoded(pictures.noisy((300, 200)), "BMP")[:9000], "corrupt"),
        (pictures.encoded(pictures.noisy((300, 200)), "TIFF")[:9000], "corrupt"),
        (pictures.encoded(Image.new("RGB", (1, 1)), "PNG"), "too-small"),
        (pictures.encoded(Image.new("RGB", (4000, 3)), "PNG"), "too-small"),
        (pictures.encoded(Image.new("RGB", (63, 500)), "JPEG"), "too-small"),
        (pictures.bomb_png(40_000, 40_000), "too-large"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused(tmp_path: Path, content: bytes, code: str) -> None:
    assert refusal(tmp_path, content).code == code


@pytest.mark.parametrize("scale", [0.125, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("make", [pictures.truncated_jpeg, pictures.zero_padded_jpeg])
def test_damage_is_seen_at_every_scale(tmp_path: Path, make: Callable[[], bytes], scale: float) -> None:
    assert refusal(tmp_path, make(), scale=scale).code == "corrupt"


@pytest.mark.parametrize("lost", [1, 2, 3, 10, 100, 1000])
def test_a_jpeg_that_lost_its_end_is_never_taken_for_whole(tmp_path: Path, lost: int) -> None:
    whole = pictures.encoded(pictures.noisy((600, 400)), "JPEG", quality=90)
    outcome = outcome_of(tmp_path, whole[:-lost])
    if isinstance(outcome, Refusal):
        assert outcome.code == "corrupt"
    else:
        # The end-of-picture mark alone may be missing: then every pixel is there.
        assert lost <= 2
        assert np.array_equal(pixels(outcome), pixels(decoded(tmp_path, whole)))


def outcome_of(folder: Path, content: bytes) -> Decoded | Refusal:
    try:
        return decoded(folder, content, "x.jpg")
    except Refusal as problem:
        return problem


def test_zeros_behind_a_whole_jpeg_do_not_matter(tmp_path: Path) -> None:
    whole = pictures.encoded(pictures.noisy((600, 400)), "JPEG", quality=90, progressive=True)
    assert np.array_equal(pixels(decoded(tmp_path, whole + bytes(4096))), pixels(decoded(tmp_path, whole)))


def test_a_pipe_and_a_folder_are_refused_without_opening(tmp_path: Path) -> None:
    (tmp_path / "folder.jpg").mkdir()
    for path in (pictures.fifo(tmp_path / "pipe.jpg"), tmp_path / "folder.jpg"):
        with pytest.raises(Refusal) as caught:
            read_source(path)
        assert caught.value.code == "not-a-file"


def test_a_missing_file_is_no_refusal(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_source(tmp_path / "gone.jpg")


def test_the_pixel_limit_is_checked_before_any_pixel(tmp_path: Path) -> None:
    content = pictures.encoded(Image.new("RGB", (200, 100)), "PNG")
    assert decoded(tmp_path, content, limit=20_000).size == (200, 100)
    with pytest.raises(Refusal, match="19,999"):
        decoded(tmp_path, content, limit=19_999)


def test_our_limit_counts_and_not_pillows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # it warns above, and raises above twice as many
    content = pictures.encoded(Image.new("RGB", (200, 100)), "PNG")
    result = decoded(tmp_path, content)
    assert (result.size, result.warnings) == ((200, 100), ())
    assert vars(Image)["MAX_IMAGE_PIXELS"] == 1000  # and it is as it was


def test_what_pillow_warns_of_is_told(tmp_path: Path) -> None:
    """A broken EXIF block: the pixels are whole, how they lie is still known, and a person can read what is odd."""
    content = bytearray(pictures.with_orientation(pictures.scene((300, 200)), 6, "JPEG"))
    content[content.index(b"Exif\0\0") + 20] = 0x7F  # the length of the maker's name
    result = decoded(tmp_path, bytes(content), "x.jpg")
    assert result.size == (300, 200)
    assert len(result.warnings) == 1
    assert "defect" in result.warnings[0]


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    ramp = pixels(decoded(tmp_path, pictures.deep_grey_png()))[0, :, 0]
    expected = np.rint(np.linspace(0, 65535, 400).astype(np.uint16) / 257).astype(int)
    assert np.array_equal(ramp, expected)


def test_floats_are_scaled_and_no_number_is_black(tmp_path: Path) -> None:
    values = pixels(decoded(tmp_path, pictures.float_tiff(), "x.tif"))
    assert np.array_equal(values[1, :, 1], np.rint(np.linspace(0, 1, 400) * 255).astype(int))
    assert tuple(values[0, 0]) == (0, 0, 0)


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_sixteen_bits_of_either_byte_order(tmp_path: Path, order: str) -> None:
    values = np.arange(100 * 100).reshape(100, 100) * 6
    content = pictures.encoded(Image.fromarray(values.astype(order)), "TIFF")
    assert np.array_equal(pixels(decoded(tmp_path, content, "x.tif"))[:, :, 2], np.rint(values / 257))


@pytest.mark.parametrize(
    ("mode", "kind", "tolerance"), [("YCbCr", "TIFF", 2), ("LAB", "TIFF", 2), ("CMYK", "TIFF", 1), ("P", "PNG", 20)]
)
def test_other_colour_spaces_keep_their_colours(tmp_path: Path, mode: str, kind: str, tolerance: int) -> None:
    scene = pictures.scene((300, 200))
    image = pictures.in_lab(scene) if mode == "LAB" else scene.convert(mode)
    values = pixels(decoded(tmp_path, pictures.encoded(image, kind)))
    assert np.abs(values - np.asarray(scene).astype(int)).mean() <= tolerance


@pytest.mark.parametrize(("mode", "kind"), [("1", "PNG"), ("L", "PNG"), ("LA", "PNG"), ("L", "JPEG")])
def test_grey_pictures_are_grey(tmp_path: Path, mode: str, kind: str) -> None:
    grey = pictures.scene((300, 200)).convert(mode)
    values = pixels(decoded(tmp_path, pictures.encoded(grey, kind)))
    expected = np.asarray(grey.convert("L")).astype(int)[:, :, None]
    assert np.abs(values - expected).mean() <= (1 if kind == "JPEG" else 0)


def test_cmyk_keeps_its_colours(tmp_path: Path) -> None:
    values = pixels(decoded(tmp_path, pictures.cmyk_jpeg(), "x.jpg"))
    red, green, blue = values[200, 250]
    assert red > 170
    assert green < 80
    assert blue < 80


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    palette = pixels(decoded(tmp_path, pictures.transparent_palette_png()))
    assert tuple(palette[150, 50]) == (255, 255, 255)
    assert tuple(palette[150, 350]) == (200, 20, 20)
    alpha = pixels(decoded(tmp_path, pictures.half_transparent_png()))
    assert [int(alpha[150, x, 0]) for x in (50, 150, 250)] == [255, 127, 0]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(tmp_path: Path, kind: str) -> None:
    red, green, _ = pixels(decoded(tmp_path, pictures.animation(kind)))[75, 100]
    assert red > 200
    assert green < 40


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "JPEG2000"])
def test_the_format_is_told_by_content_not_by_name(tmp_path: Path, kind: str) -> None:
    picture = pictures.scene((320, 240))
    values = pixels(decoded(tmp_path, pictures.encoded(picture, kind), "wrong.bmp" if kind != "BMP" else "wrong.jpg"))
    assert np.abs(values - np.asarray(picture).astype(int)).mean() < 4


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_brings_it_upright(tmp_path: Path, orientation: int, kind: str) -> None:
    upright = pictures.scene((300, 200), spot=(0.2, 0.3))
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    result = decoded(tmp_path, pictures.with_orientation(upright, orientation, kind, **options))
    assert result.size == (300, 200)
    assert np.abs(pixels(result) - np.asarray(upright).astype(int)).mean() < (3 if kind == "AVIF" else 1e-9)
    assert not result.image.getexif()
    assert not result.image.info


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_and_reduced_decoding_together(tmp_path: Path, orientation: int) -> None:
    upright = pictures.scene((2400, 1600), spot=(0.2, 0.3))
    result = decoded(tmp_path, pictures.with_orientation(upright, orientation, "JPEG", quality=95), scale=0.2)
    assert result.size == (2400, 1600)
    assert result.image.size == (600, 400)  # a quarter: the smallest that has a fifth
    reference = np.asarray(upright.resize((600, 400), Image.Resampling.BOX)).astype(int)
    assert np.abs(pixels(result) - reference).mean() < 2


@pytest.mark.parametrize("scale", [0.2, 1.0])
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_what_is_read_in_passing_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, orientation: int, kind: str, scale: float
) -> None:
    """Large pictures take another way, through libvips; here a small one is sent along it."""
    upright = pictures.scene((1200, 800), spot=(0.2, 0.3))
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    content = pictures.with_orientation(upright, orientation, kind, **options)
    plain = decoded(tmp_path, content, scale=scale)
    monkeypatch.setattr(decode, "_LARGE", 1000)
    passing = decoded(tmp_path, content, scale=scale)
    assert passing.size == plain.size == (1200, 800)
    assert max(abs(a - b) for a, b in zip(passing.image.size, plain.image.size, strict=True)) <= 1
    other = passing.image.resize(plain.image.size)
    assert np.abs(np.asarray(other).astype(int) - pixels(plain)).mean() < 2


def test_a_profile_is_honoured(tmp_path: Path) -> None:
    plain = pixels(decoded(tmp_path, pictures.profiled_png(pictures.swapped_profile())))
    red, green, _ = plain[100, 150]
    assert green > 150
    assert red < 100


@pytest.mark.parametrize("profile", [b"no profile at all", pictures.lab_profile()])
def test_a_profile_that_does_not_fit_is_left_aside_with_a_warning(tmp_path: Path, profile: bytes) -> None:
    result = decoded(tmp_path, pictures.profiled_png(profile))
    assert np.array_equal(np.asarray(result.image), np.asarray(pictures.scene((300, 200))))
    assert any("profile" in warning for warning in result.warnings)


def test_names_of_any_bytes(tmp_path: Path) -> None:
    content = pictures.encoded(pictures.scene((100, 100)), "PNG")
    for name in ("-dash.png", "new\nline.png", "tab\t.png", "caf\udce9.png", "é.png", "a" * 251 + ".png", "none"):
        assert decoded(tmp_path, content, name).size == (100, 100)


SMALL = pictures.noisy((96, 80))
WHOLE_FILES = {
    "jpeg": pictures.with_orientation(SMALL, 6, "JPEG", quality=80),
    "progressive": pictures.encoded(
        SMALL, "JPEG", quality=80, progressive=True, icc_profile=pictures.swapped_profile()
    ),
    "png": pictures.with_orientation(SMALL, 3),
    "palette": pictures.transparent_palette_png(),
    "gif": pictures.animation("GIF"),
    "webp": pictures.with_orientation(SMALL, 8, "WEBP"),
    "tiff": pictures.with_orientation(SMALL, 5, "TIFF", compression="tiff_lzw"),
    "bmp": pictures.encoded(SMALL, "BMP"),
    "avif": pictures.encoded(SMALL, "AVIF"),
}


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    kept=st.floats(0.02, 1.0),
    scale=st.sampled_from([0.3, 1.0]),
)
@pytest.mark.parametrize("kind", WHOLE_FILES)
def test_damaged_bytes_give_a_picture_or_a_refusal_and_nothing_else(
    tmp_path: Path, kind: str, changes: list[tuple[float, int]], kept: float, scale: float
) -> None:
    content = bytearray(WHOLE_FILES[kind])
    for place, value in changes:
        content[int(place * min(len(content), 2000))] = value
    path = tmp_path / "x"
    path.write_bytes(content[: max(1, int(len(content) * kept))])
    try:
        result = OpenPicture(read_source(path), 1_000_000).decode(scale)
    except Refusal as problem:
        note = problem.advice
    else:
        note = result.image.mode
        assert result.size[0] * result.size[1] <= 1_000_000
    assert note


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_what_comes_back_is_large_enough_and_not_much_larger(tmp_path: Path, kind: str) -> None:
    content = pictures.encoded(pictures.scene((1201, 807)), kind)
    for shorter in (50, 64, 100, 101, 300, 403, 404, 700, 807, 2000):
        result = decoded(tmp_path, content, scale=shorter / 807)
        got = min(result.image.size)
        assert min(shorter, 807) <= got <= 3 * shorter + 8
        assert result.size == (1201, 807)


def test_every_photograph_is_read(tmp_path: Path) -> None:
    for name in ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "horse.png", "rocket.jpg"):
        path = pictures.photograph(name)
        result = OpenPicture(read_source(path)).decode(1.0)
        with Image.open(path) as reference:
            assert result.size == reference.size
        assert result.warnings == ()
