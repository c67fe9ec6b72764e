"""Measures conversion against its budgets and prints a table.

    python benchmarks/convert.py                    SD 1.5 at full size, 2.1 GB of random fp16 weights
    python benchmarks/convert.py --family sdxl      6.9 GB; needs three times that on the disk
    python benchmarks/convert.py --diffusers        beside them, diffusers' route (loads all with torch)

Everything is interleaved in one run: cp + sync of the same bytes, then each conversion, again and again. Memory is the
largest resident set of the child that converted (ru_maxrss). The weights are deleted at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from handlers.convert.families import FAMILIES
from handlers.convert.header import bytes_of, write_header

HERE = Path(__file__).resolve().parent.parent
CONFIGS = HERE / "handlers" / "convert" / "configs"
_BLOCK = 1 << 20

_CONVERT = (
    "import sys; from pathlib import Path; from handlers.convert.job import convert;"
    "convert(Path(sys.argv[1]), Path(sys.argv[2]), verify=sys.argv[3])"
)
_BACK = (
    "import sys; from pathlib import Path; from handlers.convert.job import convert_single;"
    "convert_single(Path(sys.argv[1]), Path(sys.argv[2]), verify=sys.argv[3], cache=Path(sys.argv[2]).parent)"
)
_DIFFUSERS = (
    "import sys, torch, warnings; warnings.simplefilter('ignore'); from pathlib import Path;"
    "from diffusers import StableDiffusionPipeline as P;"
    "p = P.from_single_file(sys.argv[1], config=sys.argv[3], local_files_only=True, torch_dtype=torch.float16,"
    "safety_checker=None); p.save_pretrained(sys.argv[2])"
)


def shapes_of(family: str) -> dict[str, dict[str, tuple[int, ...]]]:
    """Component → names and shapes of the full-size classes, told by a child so that torch stays out of this one."""
    program = """
import importlib, json, sys, torch
documents = json.loads(open(sys.argv[1]).read())["documents"]
told = {}
for name in sys.argv[2:]:
    library, kind = documents["model_index.json"][name]
    kind = getattr(importlib.import_module(library), kind)
    config = documents[f"{name}/config.json"]
    with torch.device("meta"):
        model = kind(kind.config_class(**config)) if library == "transformers" else kind.from_config(config)
    told[name] = {key: list(t.shape) for key, t in model.state_dict().items() if "position_ids" not in key}
print(json.dumps(told))
"""
    names = [part.name for part in FAMILIES[family].components]
    command = [sys.executable, "-c", program, str(CONFIGS / f"{family}.json"), *names]
    told = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    return {name: {key: tuple(shape) for key, shape in shapes.items()} for name, shapes in told.items()}


def make_weights(family: str, folder: Path) -> None:
    """Write a Diffusers folder of the full size with random fp16 weights of small size (no NaN, no infinity)."""
    documents = json.loads((CONFIGS / f"{family}.json").read_bytes())["documents"]
    for name, document in documents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(document))
    for component in FAMILIES[family].components:
        shapes = shapes_of(family)[component.name]
        stem = "model" if component.name.startswith("text") else "diffusion_pytorch_model"
        with (folder / component.name / f"{stem}.safetensors").open("wb") as out:
            out.write(write_header([(key, "F16", shape) for key, shape in shapes.items()], {"format": "pt"}))
            left = sum(bytes_of("F16", shape) for shape in shapes.values())
            while left:
                # The upper byte of a half precision number without its two largest exponent bits: below 2 in size.
                block = bytearray(os.urandom(min(left, _BLOCK)))
                block[1::2] = bytes(block[1::2]).translate(bytes(value & 0xBF for value in range(256)))
                out.write(block)
                left -= len(block)
    (folder / "tokenizer").mkdir(exist_ok=True)


def measured(command: Sequence[str]) -> tuple[float, float]:
    """Seconds and MB (largest resident set) of a command and its children, with the disk synced at the end.

    Raises:
        RuntimeError: it failed.
    """
    os.sync()  # what earlier ones left to write is not this one's
    began = time.monotonic()
    process = subprocess.Popen(command, cwd=HERE)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        message = f"{command[0]} ended with {process.returncode}"
        raise RuntimeError(message)
    return time.monotonic() - began, usage.ru_maxrss * 1024 / 1e6


def copied(source: Path, target: Path) -> tuple[float, float]:
    """``cp`` of a file, synced as the conversions sync theirs."""
    return measured(["sh", "-c", 'cp "$0" "$1" && sync "$1"', str(source), str(target)])


def rounds(top: Path, family: str, with_diffusers: bool) -> Iterator[tuple[str, Callable[[], tuple[float, float]]]]:
    """(name, what to measure) in the order of a round."""
    folder, single, made = top / "folder", top / "single.safetensors", top / "made"

    def python(program: str, *arguments: str) -> tuple[float, float]:
        return measured([sys.executable, "-c", program, *arguments])

    yield "cp + sync", lambda: copied(single, made)
    target = f"{made}.safetensors"
    yield "folder → file, sample", lambda: python(_CONVERT, str(folder), target, "sample")
    yield "folder → file, all", lambda: python(_CONVERT, str(folder), target, "all")
    yield "file → folder, sample", lambda: python(_BACK, str(single), str(made), "sample")
    if with_diffusers and family == "sd1":
        yield "diffusers, file → folder", lambda: python(_DIFFUSERS, str(single), str(made), str(folder))


def clear(top: Path) -> None:
    """Remove what a measurement made."""
    for path in (top / "made", top / "made.safetensors"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("sd1", "sd2", "sdxl"), default="sd1")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--diffusers", action="store_true")
    parser.add_argument("--where", type=Path, default=None, help="a folder on the disk to measure (default: temporary)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fastsd-convert-", dir=arguments.where) as place:
        top = Path(place)
        make_weights(arguments.family, top / "folder")
        single = top / "single.safetensors"
        measured([sys.executable, "-c", _CONVERT, str(top / "folder"), str(single), "all"])
        print(f"{arguments.family}: {single.stat().st_size / 1e9:.2f} GB, load average {os.getloadavg()[0]:.1f}")
        found: dict[str, list[tuple[float, float]]] = {}
        for _ in range(arguments.rounds):
            for name, run in rounds(top, arguments.family, arguments.diffusers):
                found.setdefault(name, []).append(run())
                clear(top)
        # A round trip of the full size: the same tensors, byte by byte.
        measured([sys.executable, "-c", _BACK, str(single), str(top / "made"), "all"])
        measured([sys.executable, "-c", _CONVERT, str(top / "made"), str(top / "made.safetensors"), "all"])
        print(f"round trip: {'identical' if same(single, top / 'made.safetensors') else 'DIFFERENT'}")
    for name, rows in found.items():
        seconds = statistics.median(row[0] for row in rows)
        ratios = [row[0] / copy[0] for row, copy in zip(rows, found["cp + sync"], strict=True)]
        spread = f"{statistics.median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{name:<28} {seconds:6.2f} s  {spread:<24} {max(row[1] for row in rows):7.1f} MB")


def same(left: Path, right: Path) -> bool:
    """Whether two files hold the same tensors under the same names."""
    from handlers.convert.header import read_bytes, read_header

    first, second = read_header(left).tensors, read_header(right).tensors
    with left.open("rb") as one, right.open("rb") as other:
        return first.keys() == second.keys() and all(
            read_bytes(one.fileno(), a.begin, a.length) == read_bytes(other.fileno(), second[name].begin, a.length)
            for name, a in first.items()
        )


if __name__ == "__main__":
    main()
