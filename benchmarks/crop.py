"""Measures cropping beside other croppers and prints tables.

    python benchmarks/crop.py                   speed, then quality
    python benchmarks/crop.py --scenes 0        speed alone
    python benchmarks/crop.py --rounds 0        quality alone

Speed: a 12-megapixel JPEG → 512 × 512, JPEG 95, from a file to a file, all croppers in turn in one run; the floor is
libvips' thumbnail alone (shrink-on-load, centre, no subject). smartcrop takes part where it is installed
(``pip install smartcrop``). Quality: scenes with a known subject (``benchmarks/scenes.py``); "whole" is the share of
subjects of which 95 % are inside the window, "off" the mean distance of the window from the best one, in shorter sides.
CPU time counts, so that other work on the machine disturbs little.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("VIPS_CONCURRENCY", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cv2
import numpy as np
import pyvips
from PIL import Image

from benchmarks.scenes import Scene, fractal, scenes
from handlers.context import JobContext
from handlers.crop.job import CropHandler
from handlers.crop.subject import Finders, find_subject
from handlers.crop.window import PixelBox, square_window

SIDE = 512
Cropper = Callable[[Path, Path], None]


def large_jpeg(path: Path, seed: int = 1) -> None:
    """4000 × 3000, with the detail of a photograph: about 3 MB."""
    random = np.random.default_rng(seed)
    canvas = np.stack([fractal(random, 4000, 3000, 0.6) for _ in range(3)], axis=2) * 200 + 20
    cv2.circle(canvas, (2600, 1500), 700, (200.0, 60.0, 40.0), -1)
    grain = random.normal(0, 5, (3000, 4000, 1))
    Image.fromarray(np.clip(canvas + grain, 0, 255).astype(np.uint8)).save(path, quality=90)


def fastsd() -> Cropper:
    """The crop handler, warm, as a worker runs it."""
    handler = CropHandler()

    def crop(source: Path, output: Path) -> None:
        payload = {"source": str(source), "output": str(output), "resolution": SIDE}
        handler.run(_context(payload))

    return crop


def _context(payload: Mapping[str, Any]) -> JobContext:
    return JobContext(1, "crop", payload, "cpu", Path(), lambda *_: None, lambda: False, lambda: False)


def pillow_naive(source: Path, output: Path) -> None:
    """What a short script does: decode all, cut the centre, resize, save."""
    with Image.open(source) as image:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        part = image.convert("RGB").crop((left, top, left + side, top + side))
        part.resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(output, quality=95)


def vips_thumbnail(source: Path, output: Path) -> None:
    """The floor."""
    pyvips.Image.thumbnail(str(source), SIDE, height=SIDE, crop="centre").jpegsave(str(output), Q=95)


def vips_attention(source: Path, output: Path) -> None:
    """Libvips' own idea of a subject."""
    pyvips.Image.thumbnail(str(source), SIDE, height=SIDE, crop="attention").jpegsave(str(output), Q=95)


def smartcrop() -> Cropper | None:
    """Smartcrop of PyPI, on a picture that was reduced to four times the crop first; None where it is not installed."""
    try:
        from smartcrop import SmartCrop
    except ImportError:
        return None
    cropper = SmartCrop()

    def crop(source: Path, output: Path) -> None:
        with Image.open(source) as image:
            image.draft("RGB", (SIDE * 2, SIDE * 2))
            reduced = image.convert("RGB")
        found = cropper.crop(reduced, 100, 100, prescale=True)["top_crop"]
        box = (found["x"], found["y"], found["x"] + found["width"], found["y"] + found["height"])
        reduced.resize((SIDE, SIDE), Image.Resampling.LANCZOS, box=box).save(output, quality=95)

    return crop


def measure_speed(rounds: int, folder: Path) -> None:
    """One core: CPU milliseconds a picture, in turn. Two processes: pictures a second beside one."""
    source, output = folder / "large.jpg", folder / "crop.jpg"
    large_jpeg(source)
    croppers: dict[str, Cropper] = {"libvips thumbnail (floor)": vips_thumbnail, "fastsd": fastsd()}
    croppers |= {"libvips attention": vips_attention, "Pillow, naive": pillow_naive}
    if (other := smartcrop()) is not None:
        croppers["smartcrop"] = other
    times: dict[str, list[float]] = {name: [] for name in croppers}
    for turn in range(rounds + 1):
        for name, crop in croppers.items():
            start = time.process_time()
            crop(source, output)
            if turn:  # the first warms up
                times[name].append(time.process_time() - start)
    floor = statistics.median(times["libvips thumbnail (floor)"])
    print(f"12-megapixel JPEG ({source.stat().st_size / 1e6:.1f} MB) → {SIDE}², one core, {rounds} rounds in turn")
    print(f"{'cropper':28} {'ms':>8} {'× floor':>8}")
    for name, values in times.items():
        print(f"{name:28} {statistics.median(values) * 1e3:8.1f} {statistics.median(values) / floor:8.2f}")


def measure_processes(rounds: int, folder: Path) -> None:
    """How much two processes bring, wall-clock; a busy machine has no second core to give."""
    source = folder / "large.jpg"
    script = (
        "import sys; from pathlib import Path; from benchmarks.crop import fastsd\n"
        "crop = fastsd(); crop(Path(sys.argv[1]), Path(sys.argv[2])); print('warm', flush=True); sys.stdin.readline()\n"
        "for _ in range(int(sys.argv[3])): crop(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    rates: dict[int, float] = {}
    for processes in (1, 2, 1, 2):
        running = [
            subprocess.Popen(
                [sys.executable, "-c", script, str(source), str(folder / f"crop-{index}.jpg"), str(rounds)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=Path(__file__).resolve().parent.parent,
            )
            for index in range(processes)
        ]
        for process in running:
            assert process.stdout is not None
            process.stdout.readline()
        start = time.perf_counter()
        for process in running:  # all begin before one is waited for
            assert process.stdin is not None
            process.stdin.write(b"\n")
            process.stdin.flush()
        for process in running:
            process.communicate()
        rate = processes * rounds / (time.perf_counter() - start)
        rates[processes] = max(rates.get(processes, 0.0), rate)
    print(f"\npictures a second: {rates[1]:.1f} in one process, {rates[2]:.1f} in two: × {rates[2] / rates[1]:.2f}")
    print(f"(load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores)")


def measure_quality(count: int) -> None:
    """Windows on scenes with a known subject."""
    finders = Finders()

    def ours(image: Image.Image) -> PixelBox:
        return square_window(image.size, find_subject(image, finders).boxes)

    croppers: dict[str, Callable[[Image.Image], PixelBox]] = {
        "centre": lambda image: square_window(image.size, []),
        "libvips attention": _attention,
        "fastsd": ours,
    }
    if (other := _smartcrop_window()) is not None:
        croppers["smartcrop"] = other
    whole: dict[str, list[bool]] = {name: [] for name in croppers}
    off: dict[str, list[float]] = {name: [] for name in croppers}
    for scene in scenes(count):
        for name, crop in croppers.items():
            inside, error = judged(scene, crop(scene.image))
            whole[name].append(inside)
            off[name].append(error)
    print(f"\n{count} scenes\n{'cropper':28} {'whole':>8} {'off':>8}")
    for name in croppers:
        print(f"{name:28} {statistics.mean(whole[name]):8.1%} {statistics.mean(off[name]):8.3f}")


def judged(scene: Scene, window: PixelBox) -> tuple[bool, float]:
    """Whether the subject is whole in a window, and how far the window is from the best one, in shorter sides."""
    width, height = scene.image.size
    x0, y0, x1, y1 = (edge * length for edge, length in zip(scene.box, (width, height) * 2, strict=True))
    across = max(0.0, min(x1, window[2]) - max(x0, window[0]))
    down = max(0.0, min(y1, window[3]) - max(y0, window[1]))
    best = square_window(scene.image.size, [scene.box])
    error = max(abs(window[0] - best[0]), abs(window[1] - best[1])) / min(width, height)
    return across * down >= 0.95 * (x1 - x0) * (y1 - y0), error


def _attention(image: Image.Image) -> PixelBox:
    """Where libvips' attention puts the window: it tells the place that it found most interesting."""
    pixels = pyvips.Image.new_from_memory(image.tobytes(), image.width, image.height, 3, "uchar")
    side = min(image.size)
    options: dict[str, Any] = {"interesting": "attention", "attention_x": True, "attention_y": True}
    _, place = pixels.copy(interpretation="srgb").smartcrop(side, side, **options)
    x, y = place["attention_x"] / image.width, place["attention_y"] / image.height
    return square_window(image.size, [(max(0.0, x - 1e-3), max(0.0, y - 1e-3), min(1.0, x + 1e-3), min(1.0, y + 1e-3))])


def _smartcrop_window() -> Callable[[Image.Image], PixelBox] | None:
    try:
        from smartcrop import SmartCrop
    except ImportError:
        return None
    cropper = SmartCrop()

    def crop(image: Image.Image) -> PixelBox:
        found = cropper.crop(image, 100, 100, prescale=True)["top_crop"]
        return (found["x"], found["y"], found["x"] + found["width"], found["y"] + found["height"])

    return crop


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--scenes", type=int, default=300)
    options = parser.parse_args()
    cv2.setNumThreads(1)
    pyvips.cache_set_max(0)
    if options.rounds:
        with tempfile.TemporaryDirectory(prefix="fastsd-") as folder:
            measure_speed(options.rounds, Path(folder))
            measure_processes(options.rounds, Path(folder))
    if options.scenes:
        measure_quality(options.scenes)


if __name__ == "__main__":
    main()
