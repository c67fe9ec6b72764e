"""Every odd file that people drop, each with its right outcome. ``python -m tests.corpus FOLDER`` writes them all."""

from __future__ import annotations

import io
import os
import socket
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import tifffile
from PIL import Image

from tests import pictures
from tests.corpus import binary
from tests.corpus.pattern import (
    BLUE,
    GREEN,
    RED,
    SAND,
    SIZE,
    WHITE,
    Cropped,
    Ignored,
    Outcome,
    Refused,
    deep,
    greys,
    pattern,
)
from tests.pictures import encoded


@dataclass(frozen=True)
class Case:
    """One file.

    Attributes:
        name: its file name; no two alike.
        outcome: what must become of it.
        make: its bytes, or what puts it there.
    """

    name: str
    outcome: Outcome
    make: bytes | Callable[[Path], None]

    def write(self, folder: Path) -> Path:
        """Put it into a folder."""
        path = folder / self.name
        if callable(self.make):
            self.make(path)
        else:
            path.write_bytes(self.make)
        return path


def cases() -> Iterator[Case]:
    """All of them."""
    yield from _orientations()
    yield from _jpegs()
    yield from _pngs()
    yield from _others()
    yield from _profiles()
    yield from _damaged()
    yield from _no_pictures()
    yield from _sizes()
    yield from _bombs()
    yield from _names()
    yield from _places()


def _orientations() -> Iterator[Case]:
    near = {"JPEG": 3.0, "PNG": 0.5, "WEBP": 0.5, "TIFF": 0.5, "AVIF": 4.0}
    for kind, suffix in (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")):
        options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
        for turn in range(1, 9):
            content = pictures.with_orientation(pattern(), turn, kind, **options)
            yield Case(f"turned-{turn}.{suffix}", Cropped(tolerance=near[kind]), content)
    for kind, turn in (("TIFF", 6), ("TIFF", 3), ("AVIF", 6), ("AVIF", 8)):
        content = pictures.with_orientation(pattern(), turn, kind)
        yield Case(f"turned-{turn}.{kind.lower()}", Cropped(tolerance=near[kind]), content)
    yield Case("turned-behind-the-pixels.png", Cropped(), binary.late_orientation())


def _jpegs() -> Iterator[Case]:
    whole = pattern()
    near = Cropped(tolerance=4)
    yield Case("progressive.jpg", near, encoded(whole, "JPEG", quality=90, progressive=True))
    yield Case("coarse.jpg", Cropped(tolerance=8), encoded(whole, "JPEG", quality=20, subsampling=2))
    yield Case("restarts.jpg", near, encoded(whole, "JPEG", quality=90, restart_marker_blocks=4))
    yield Case("grey.jpg", Cropped(colours=greys(), tolerance=3), encoded(whole.convert("L"), "JPEG", quality=95))
    yield Case("printers.jpg", near, encoded(whole.convert("CMYK"), "JPEG", quality=95))
    yield Case("behind-the-end.jpg", near, binary.late_exif_jpeg())
    yield Case("no-end-mark.jpg", Refused(("corrupt",)), encoded(whole, "JPEG", quality=90)[:-2])
    yield Case("two-pictures.mpo", near, encoded(whole, "MPO", save_all=True, append_images=[Image.new("RGB", SIZE)]))
    broken = bytearray(pictures.with_orientation(whole, 6, "JPEG", quality=95))
    broken[broken.index(b"Exif\0\0") + 20] = 0x7F
    yield Case("broken-exif.jpg", Cropped(tolerance=4, warning="defect"), bytes(broken))
    thumbnail = encoded(whole.resize((80, 60)), "JPEG")
    yield Case("comment.jpg", near, encoded(whole, "JPEG", quality=95, comment=thumbnail))


def _pngs() -> Iterator[Case]:
    whole = pattern()
    alpha = whole.copy()
    alpha.putalpha(0)
    clear = np.dstack([np.asarray(whole), np.full((SIZE[1], SIZE[0]), 255, np.uint8)])
    clear[:, : SIZE[0] // 2, 3] = 0
    left = (WHITE[0], GREEN, WHITE[2], SAND)
    palette = whole.quantize(8)
    exact = Cropped(tolerance=1)
    yield Case("plain.png", exact, encoded(whole, "PNG"))
    yield Case("interlaced.png", exact, binary.png(np.asarray(whole), interlaced=True))
    yield Case("deep.png", exact, binary.png(deep()))
    yield Case("deep-interlaced.png", exact, binary.png(deep(), interlaced=True))
    grey = np.asarray(whole.convert("L")).astype(np.uint16)[:, :, None] * 257
    yield Case("deep-grey.png", Cropped(colours=greys(), tolerance=1), binary.png(grey))
    yield Case("deep-alpha.png", Cropped(colours=left, tolerance=1), binary.png(clear.astype(np.uint16) * 257))
    yield Case("half-clear.png", Cropped(colours=left, tolerance=1), binary.png(clear))
    yield Case("clear.png", Cropped(colours=WHITE, tolerance=0.5), encoded(alpha, "PNG"))
    yield Case("grey.png", Cropped(colours=greys(), tolerance=1), encoded(whole.convert("L"), "PNG"))
    yield Case("grey-alpha.png", Cropped(colours=greys(), tolerance=1), encoded(whole.convert("LA"), "PNG"))
    yield Case("palette.png", Cropped(tolerance=3), encoded(palette, "PNG"))
    first = Image.new("P", SIZE, 1)
    first.putpalette([0, 0, 0, *RED])
    first.paste(0, (0, 0, SIZE[0] // 2, SIZE[1]))
    half = (WHITE[0], RED, WHITE[2], RED)
    yield Case("palette-clear.png", Cropped(colours=half, tolerance=1), encoded(first, "PNG", transparency=0))
    bits = Image.new("1", SIZE, 0)
    bits.paste(1, (SIZE[0] // 2, 0, *SIZE))
    black = (0, 0, 0)
    yield Case("one-bit.png", Cropped(colours=(black, WHITE[0]) * 2, tolerance=1), encoded(bits, "PNG"))
    frames = [Image.new("RGB", SIZE, GREEN)]
    yield Case("moving.png", exact, encoded(whole, "PNG", save_all=True, append_images=frames))


def _others() -> Iterator[Case]:
    whole = pattern()
    exact, near = Cropped(tolerance=1), Cropped(tolerance=5)
    frames = [Image.new("RGB", SIZE, GREEN)]
    grey = Cropped(colours=greys(), tolerance=1)
    for name in ("lzw", "packbits", "adobe_deflate", "jpeg"):
        options: dict[str, Any] = {"compression": "jpeg" if name == "jpeg" else f"tiff_{name}"}
        if name == "packbits":
            options = {"compression": name}
        yield Case(f"{name}.tif", near, encoded(whole, "TIFF", **options))
    yield Case("printers.tif", near, encoded(whole.convert("CMYK"), "TIFF"))
    yield Case("lab.tif", Cropped(tolerance=8), encoded(pictures.in_lab(whole), "TIFF"))
    yield Case("palette.tif", near, encoded(whole.quantize(8), "TIFF"))
    yield Case("pages.tif", exact, encoded(whole, "TIFF", save_all=True, append_images=frames))
    for name, options in (
        ("deep", {}),
        ("deep-big-endian", {"byteorder": ">"}),
        ("big", {"bigtiff": True}),
        ("tiled", {"tile": (64, 64)}),
        ("planes", {"planarconfig": "separate"}),
    ):
        values = deep() if name.startswith("deep") else np.asarray(whole)
        if name == "planes":
            values = np.moveaxis(values, 2, 0)
        content = io.BytesIO()
        tifffile.imwrite(content, values, photometric="rgb", metadata=None, **options)
        yield Case(f"{name}.tif", exact, content.getvalue())
    tones = np.asarray(whole.convert("L"))
    yield Case("deep-grey.tif", grey, encoded(Image.fromarray(tones.astype(np.uint16) * 257), "TIFF"))
    yield Case("floats.tif", grey, encoded(Image.fromarray((tones / 255).astype(np.float32)), "TIFF"))
    yield Case("plain.bmp", exact, encoded(whole, "BMP"))
    yield Case("palette.bmp", Cropped(tolerance=3), encoded(whole.quantize(16), "BMP"))
    yield Case("top-down.bmp", exact, binary.top_down_bmp())
    yield Case("plain.gif", Cropped(tolerance=3), encoded(whole, "GIF"))
    yield Case("moving.gif", Cropped(tolerance=3), encoded(whole, "GIF", save_all=True, append_images=frames))
    yield Case("plain.webp", Cropped(tolerance=6), encoded(whole, "WEBP", quality=90))
    yield Case("moving.webp", exact, encoded(whole, "WEBP", lossless=True, save_all=True, append_images=frames))
    clear = whole.copy()
    clear.putalpha(0)
    yield Case("clear.webp", Cropped(colours=WHITE, tolerance=1), encoded(clear, "WEBP", lossless=True))
    yield Case("plain.avif", near, encoded(whole, "AVIF", quality=90))
    yield Case("clear.avif", Cropped(colours=WHITE, tolerance=2), encoded(clear, "AVIF", quality=90))
    yield Case("plain.jp2", exact, encoded(whole, "JPEG2000"))
    yield Case("deep-grey.jp2", grey, encoded(Image.fromarray(tones.astype(np.uint16) * 257), "JPEG2000"))
    yield Case("phone.heic", near, heic())
    yield Case("phone-turned.heic", near, heic(turn=6))


def heic(turn: int = 1, size: tuple[int, int] = SIZE) -> bytes:
    """What an iPhone saves."""
    exif = Image.Exif()
    exif[0x0112] = turn
    image = pattern(size)
    if turn == 6:
        image = image.transpose(Image.Transpose.ROTATE_90)
    content = io.BytesIO()
    # How well it is compressed is not what is looked at, and 48 megapixels take the encoder 12 s otherwise.
    quick = {"preset": "ultrafast"}
    pillow_heif.from_pillow(image).save(content, quality=90, exif=exif.tobytes(), enc_params=quick)
    return content.getvalue()


def _profiles() -> Iterator[Case]:
    swapped = (GREEN, RED, BLUE, (200, 225, 120))
    turned = {"icc_profile": pictures.swapped_profile()}
    # Through a real profile black stays black, and the channels trade places: not to the last digit.
    for kind, suffix in (("PNG", "png"), ("JPEG", "jpg"), ("TIFF", "tif"), ("WEBP", "webp")):
        options: dict[str, Any] = {"quality": 95} if kind == "JPEG" else {}
        content = encoded(_of_colours(swapped), kind, **options, **turned)
        yield Case(f"other-primaries.{suffix}", Cropped(tolerance=30), content)
    srgb = {"icc_profile": pictures.srgb_profile()}
    yield Case("srgb-profile.png", Cropped(tolerance=1), encoded(pattern(), "PNG", **srgb))
    odd = {"icc_profile": pictures.lab_profile()}
    yield Case("wrong-profile.png", Cropped(tolerance=1, warning="profile"), encoded(pattern(), "PNG", **odd))
    junk = {"icc_profile": b"no profile at all"}
    yield Case("broken-profile.jpg", Cropped(tolerance=4, warning="profile"), encoded(pattern(), "JPEG", **junk))


def _of_colours(colours: tuple[tuple[int, int, int], ...]) -> Image.Image:
    image = pattern()
    across, down = SIZE[0] // 2, SIZE[1] // 2
    for index, colour in enumerate(colours):
        x, y = across * (index % 2), down * (index // 2)
        image.paste(colour, (x, y, x + across, y + down))
    return image


def _damaged() -> Iterator[Case]:
    corrupt = Refused(("corrupt",))
    noisy = pictures.noisy((400, 300))
    for kind, suffix in (
        ("JPEG", "jpg"),
        ("PNG", "png"),
        ("WEBP", "webp"),
        ("AVIF", "avif"),
        ("GIF", "gif"),
        ("BMP", "bmp"),
        ("TIFF", "tif"),
        ("JPEG2000", "jp2"),
    ):
        content = encoded(noisy, kind)
        yield Case(f"broken-off.{suffix}", corrupt, content[: len(content) * 2 // 3])
    content = encoded(noisy, "JPEG", quality=90, progressive=True)
    yield Case("broken-off-progressive.jpg", corrupt, content[: len(content) // 2])
    yield Case("broken-off-early.jpg", corrupt, content[:400])
    yield Case("padded-with-zeros.jpg", corrupt, pictures.zero_padded_jpeg())
    yield Case("bad-checksum.png", corrupt, pictures.damaged_png())
    yield Case("broken-off.heic", corrupt, heic()[:-200])
    yield Case("header-only.png", corrupt, encoded(noisy, "PNG")[:60])
    yield Case("frame-larger-than-screen.gif", corrupt, binary.lying_gif(1400, 1400))
    yield Case("more-promised.jpg", corrupt, binary.lying_jpeg(3000, 3000))


def _no_pictures() -> Iterator[Case]:
    none = Refused(("not-a-picture",))
    yield Case("empty.jpg", Refused(("empty",)), b"")
    yield Case("zeros.jpg", none, bytes(50_000))
    yield Case("web-page.jpg", none, pictures.HTML)
    yield Case("web-page-with-mark.jpg", none, b"\xef\xbb\xbf\r\n" + pictures.HTML)
    yield Case("answer.png", none, b'{"error": "not found"}')
    yield Case("postscript.jpg", none, pictures.POSTSCRIPT)
    yield Case("document.jpg", none, b"%PDF-1.7\n" + bytes(range(256)) * 20)
    yield Case("archive.jpg", none, b"PK\3\4" + bytes(range(256)) * 20)
    yield Case("film.jpg", none, b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(2000))
    drawing = b'<svg xmlns="http://www.w3.org/2000/svg" width="200" height="200"><rect width="9" height="9"/></svg>'
    yield Case("drawing.png", none, drawing)
    yield Case("noise.webp", none, bytes(np.random.default_rng(3).integers(0, 256, 5000, dtype=np.uint8)))


def _sizes() -> Iterator[Case]:
    small = Refused(("too-small",))
    for size in ((1, 1), (63, 500), (500, 63), (4000, 3)):
        yield Case(f"small-{size[0]}-{size[1]}.png", small, encoded(Image.new("RGB", size, RED), "PNG"))
    for size in ((64, 64), (8000, 64), (64, 8000), (9001, 701)):
        yield Case(f"odd-{size[0]}-{size[1]}.png", Cropped(size, tolerance=3), encoded(pattern(size), "PNG"))
    flat = Cropped((10_000, 9_000), (RED,) * 4, tolerance=4)
    for name, outcome, content in (
        ("48-megapixels.jpg", _large(8000, 6000), lambda: encoded(pattern((8000, 6000)), "JPEG", quality=80)),
        ("48-megapixels.heic", _large(8064, 6048), lambda: heic(size=(8064, 6048))),
        ("30-megapixels.webp", _large(6000, 5000), lambda: encoded(pattern((6000, 5000)), "WEBP", method=0)),
        ("90-megapixels.webp", flat, lambda: encoded(Image.new("RGB", (10_000, 9_000), RED), "WEBP", method=0)),
        ("63-megapixels.tif", _large(9000, 7000), lambda: _in_strips(pattern((9000, 7000)))),
    ):
        yield Case(name, outcome, _later(content))


def _large(width: int, height: int) -> Cropped:
    return Cropped((width, height), tolerance=6)


def _in_strips(image: Image.Image) -> bytes:
    content = io.BytesIO()
    tifffile.imwrite(content, np.asarray(image), photometric="rgb", compression="zlib", rowsperstrip=64)
    return content.getvalue()


def _later(content: Callable[[], bytes]) -> Callable[[Path], None]:
    """What takes seconds to make is made when it is written."""

    def write(path: Path) -> None:
        path.write_bytes(content())

    return write


def _bombs() -> Iterator[Case]:
    large = Refused(("too-large",))
    damaged = Refused(("corrupt", "too-large"))
    one = (RED,) * 4
    yield Case("bomb.png", large, pictures.bomb_png(40_000, 40_000))
    yield Case("wide-bomb.png", large, pictures.bomb_png(2_000_000_000, 100))
    yield Case(
        "flat.png", Cropped((15_000, 12_800), one, tolerance=1), _later(lambda: binary.flat_png(15_000, 12_800, RED))
    )
    yield Case(
        "flat-turned.gif", Cropped((12_000, 12_000), one, 3), _later(lambda: encoded(_flat((12_000, 12_000)), "GIF"))
    )
    yield Case("lying.bmp", damaged, binary.lying_bmp(14_000, 14_000))
    yield Case("lying.jpg", damaged, binary.lying_jpeg(14_000, 14_000))
    yield Case("lying.gif", damaged, binary.lying_gif(14_000, 14_000))
    yield Case("lying.tif", damaged, binary.lying_tiff(14_000, 14_000))
    yield Case("lying-more.bmp", large, binary.lying_bmp(60_000, 60_000))
    yield Case("lying-more.jpg", large, binary.lying_jpeg(60_000, 60_000))
    yield Case("long-text.png", Refused(("corrupt",)), _later(binary.text_bomb))
    yield Case("many-scans.jpg", Cropped((1600, 1200), tolerance=9), binary.scans_bomb(200))


def _flat(size: tuple[int, int]) -> Image.Image:
    image = Image.new("P", size, 1)
    image.putpalette([0, 0, 0, *RED])
    return image


def _names() -> Iterator[Case]:
    content = encoded(pattern(), "PNG")
    fine = Cropped(tolerance=1)
    for name in (
        "new\nline.png",
        "tab\t.png",
        "caf\udce9.png",
        unicodedata.normalize("NFC", "été.png"),
        unicodedata.normalize("NFD", "été.png"),
        "-dash.png",
        "--out.png",
        " spaces .png",
        "quote'\"`$(x).png",
        "n" * 251 + ".png",
        "絵" * 83 + ".png",
        "photo (1).jpg",
        "photo (2).JPG",
        "UPPER.PNG",
        "wrong-ending.jpeg",
        "two.endings.jpg.png",
        "%s %d {x}.png",
    ):
        yield Case(name, fine, content)
    yield Case("no ending", fine, content)
    for name in ("._photo.jpg", "photo.jpg.part", "photo.jpg.crdownload", "photo.tmp", "~$photo.jpg", ".hidden.jpg"):
        yield Case(name, Ignored(), content)


def _places() -> Iterator[Case]:
    none = Refused(("not-a-file",))
    yield Case("folder.jpg", none, lambda path: path.mkdir())
    yield Case("pipe.jpg", none, os.mkfifo)
    yield Case("socket.jpg", none, _socket)
    yield Case("device.jpg", none, lambda path: path.symlink_to("/dev/zero"))
    yield Case("broken-link.jpg", none, lambda path: path.symlink_to("nowhere.jpg"))
    yield Case("looping-link.jpg", none, lambda path: path.symlink_to(path.name))
    yield Case("link.jpg", Cropped(tolerance=1), lambda path: path.symlink_to("plain.png"))


def _socket(path: Path) -> None:
    """A socket lies where it was bound; a short path of its own, for addresses are short."""
    before = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path.name)
    finally:
        os.chdir(before)
