"""Measures ``inspect`` of a full-size SDXL file, in process, against its budget of 20 ms.

    python benchmarks/inspect_file.py

The file has every name and shape of SDXL in fp16 and 6.9 GB of holes: only the header is read, so only it is written.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.convert import shapes_of
from handlers.convert.families import FAMILIES
from handlers.convert.header import TensorEntry, bytes_of, write_header
from handlers.convert.plan import Located, canonical, to_single
from handlers.models.inspect import inspect

_ROUNDS = 50


def write_sparse(family: str, file: Path) -> None:
    """A single file of a family with its real header, and holes for values."""
    found = {}
    for component in FAMILIES[family].components:
        shapes = shapes_of(family)[component.name]
        located = {
            name: Located(file, TensorEntry("F16", shape, 0, bytes_of("F16", shape))) for name, shape in shapes.items()
        }
        found[component.name] = canonical(component, located)
    plan = to_single(FAMILIES[family].components, found, family)
    header = write_header([(entry.name, entry.dtype, entry.shape) for entry in plan], {"format": "pt"})
    with file.open("wb") as out:
        out.write(header)
        out.truncate(len(header) + sum(entry.length for entry in plan))


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="fastsd-inspect-") as place:
        file = Path(place) / "sdxl.safetensors"
        write_sparse("sdxl", file)
        found = inspect(file)
        rows, spent = [], []
        for _ in range(_ROUNDS):
            began, worked = time.perf_counter(), time.process_time()
            inspect(file)
            rows.append(1000 * (time.perf_counter() - began))
            spent.append(1000 * (time.process_time() - worked))
        size = file.stat().st_size / 1e9
    print(f"{found.kind} {found.family}, {found.parameters:,} parameters, problems: {found.problems}")
    print(
        f"inspect of {size:.2f} GB: {statistics.median(rows):.1f} ms ({min(rows):.1f} to {max(rows):.1f}), "
        f"of which {statistics.median(spent):.1f} ms of work; budget 20 ms, load average {os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    main()
