"""A LoRA taken out of a model: the best approximation, of a given rank, of what was trained into each module.

Of all matrices of a rank, the one nearest to D in the Frobenius norm keeps the singular vectors of its largest singular
values (Eckart & Young 1936). The vectors are eigenvectors of D·Dᵀ or Dᵀ·D, whichever is smaller.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from handlers.convert.ask import Progress, check_room, dtype_of, silent
from handlers.convert.cast import cast, decode
from handlers.convert.families import FAMILIES
from handlers.convert.lora import read_lora
from handlers.convert.lora_alpha import scalar
from handlers.convert.lora_names import FLAT_FAMILIES, Module, dotted, flat, to_kohya
from handlers.convert.lora_write import Written, matrix_of
from handlers.convert.pieces import Sources
from handlers.convert.plan import Entry, to_components, whole
from handlers.convert.recognise import read_single
from handlers.convert.single import read_folder
from handlers.convert.source import read_pipeline
from handlers.convert.verify import Unproven
from handlers.convert.write import write_safetensors
from sessions import files
from sessions.refusal import Refusal

if TYPE_CHECKING:
    from numpy import float32
    from numpy.typing import NDArray

_ALIKE = "Name a model and the base that it was trained from."
_TOLERANCE = 0.02
"""How much more than computed, as a share of all, may be lost by the output's number type."""


def extract_lora(
    tuned: Path, base: Path, output: Path, rank: int, *, dtype: str = "fp16", progress: Progress = silent
) -> tuple[Written, float]:
    """Write what distinguishes a model from its base as a LoRA in kohya's layout.

    Args:
        tuned: the trained model, a Diffusers folder or one file.
        base: what it was trained from.
        output: the ``.safetensors`` file to make.
        rank: of each module, at most its smaller side.
        dtype: fp32, fp16 or bf16.
        progress: called with (modules done, modules in all, what is done); may raise to stop.

    Returns:
        What was made, and the share of the difference (of its squares) that the LoRA holds, measured on the file.

    Raises:
        Refusal: one of them cannot be read, they are of different families or shapes, or do not differ.
        Unproven: the written LoRA is not as near as it should be; it was removed.
        OSError: reading or writing failed.
    """
    began = time.monotonic()
    wanted = dtype_of(dtype) or "F16"
    if output.suffix != ".safetensors":
        raise Refusal("output", f"{output.name} is no .safetensors file.", "Give the output the ending .safetensors.")
    family, have = _modules(tuned)
    other, want = _modules(base)
    if family != other:
        raise Refusal("source", f"{tuned.name} is of the family {family}, {base.name} of {other}.", _ALIKE)
    differences = []
    with Sources() as sources:
        for number, (module, entry) in enumerate(have.items()):
            progress(number, len(have), "comparing")
            found = _difference(sources, module, entry, want.get(module), rank)
            if found is not None:
                differences.append(found)
        if not differences:
            raise Refusal("source", f"{tuned.name} does not differ from {base.name}.", _ALIKE)
        entries = [entry for found in differences for entry in found.entries(family, wanted)]
        check_room(output.parent, sum(entry.length for entry in entries))
        done = 0

        def wrote(_count: int) -> None:
            nonlocal done
            done += 1
            progress(done, len(entries), "writing")

        metadata = {"format": "pt", "modelspec.title": f"{tuned.name} less {base.name}"}
        with files.atomic_path(output) as temporary:
            write_safetensors(temporary, entries, metadata, wrote)
            kept = _prove(sources, temporary, differences)
            size = temporary.stat().st_size
    return Written(output, family, len(differences), size, time.monotonic() - began), kept


def _modules(path: Path) -> tuple[str, dict[Module, Entry]]:
    """The family of a model, and the weights of the modules that LoRAs change."""
    if path.is_dir():
        family = FAMILIES[read_pipeline(path).family]
        found = read_folder(path, family)
        parts: Mapping[str, list[Entry]] = {
            name: [whole(key, located) for key, located in tensors.items()] for name, tensors in found.items()
        }
    else:
        single = read_single(path, "trained")
        family = FAMILIES[single.family]
        parts, _ = to_components(family.components, single.tensors)
    if family.name not in FLAT_FAMILIES:
        raise Refusal("source", f"{path.name} is of the family {family.name}.", "SD 1, SD 2 and SDXL can be compared.")
    return family.name, dict(_weights(parts))


def _weights(parts: Mapping[str, list[Entry]]) -> Iterator[tuple[Module, Entry]]:
    for part, entries in parts.items():
        if part == "vae":
            continue
        for entry in entries:
            path = entry.name.removesuffix(".weight")
            if entry.name.endswith(".weight") and len(entry.shape) > 1 and dotted(flat(path)) == path:
                yield Module(part, path), entry


@dataclass(frozen=True)
class _Difference:
    """What was trained into a module.

    Attributes:
        module: which.
        tuned, base: its weights.
        rank: of the LoRA.
        square: the sum of the squares of the difference.
    """

    module: Module
    tuned: Entry
    base: Entry
    rank: int
    square: float

    def matrix(self, sources: Sources) -> NDArray[float32]:
        """The difference: rows x the rest."""
        return _subtracted(sources, self.tuned, self.base)

    def entries(self, family: str, dtype: str) -> list[Entry]:
        """The tensors of the pair, made when they are written."""
        name = to_kohya(self.module, family)
        rows, *inner = self.tuned.shape
        factors = _Factors(self)
        ones = (1,) * (len(inner) - 1)
        down = Entry(f"{name}.lora_down.weight", dtype, (self.rank, *inner), (), factors.down)
        up = Entry(f"{name}.lora_up.weight", dtype, (rows, self.rank, *ones), (), factors.up)
        return [down, up, scalar(f"{name}.alpha", dtype, float(self.rank))]


class _Factors:
    """The halves of a pair; computed for the first, given up with the second."""

    def __init__(self, difference: _Difference) -> None:
        self._difference = difference
        self._up: NDArray[float32] | None = None

    def down(self, sources: Sources, entry: Entry) -> bytes:
        """Rank x in."""
        up, down = nearest(self._difference.matrix(sources), self._difference.rank)
        self._up = up
        return cast(down.tobytes(), "F32", entry.dtype)

    def up(self, _sources: Sources, entry: Entry) -> bytes:
        """Out x rank."""
        assert self._up is not None, "the first half is written first"
        up, self._up = self._up, None
        return cast(up.tobytes(), "F32", entry.dtype)


def nearest(matrix: NDArray[float32], rank: int) -> tuple[NDArray[float32], NDArray[float32]]:
    """(out x rank, rank x in): the factors of the nearest matrix of a rank, as large as each other."""
    import numpy as np

    exact = matrix.astype("<f8")
    is_wide = exact.shape[0] <= exact.shape[1]
    squares, vectors = np.linalg.eigh(exact @ exact.T if is_wide else exact.T @ exact)
    vectors = vectors[:, ::-1][:, :rank]
    sizes = np.sqrt(np.maximum(squares[::-1][:rank], 0.0))
    scale = np.sqrt(np.where(sizes > 0, sizes, 1.0))
    if is_wide:
        up, down = vectors * scale, (vectors.T @ exact) / scale[:, None]
    else:
        up, down = (exact @ vectors) / scale, (vectors * scale).T
    return np.ascontiguousarray(up, "<f4"), np.ascontiguousarray(down, "<f4")


def _difference(sources: Sources, module: Module, tuned: Entry, base: Entry | None, rank: int) -> _Difference | None:
    """The difference of a module; None where there is none."""
    if base is None or base.shape != tuned.shape:
        raise Refusal("source", f"{module.part}.{module.path} is another one in the base.", _ALIKE)
    square = float((_subtracted(sources, tuned, base).astype("<f8") ** 2).sum())
    if square == 0.0:
        return None
    return _Difference(module, tuned, base, min(rank, tuned.shape[0], prod(tuned.shape[1:])), square)


def _subtracted(sources: Sources, tuned: Entry, base: Entry) -> NDArray[float32]:
    values = []
    for entry in (tuned, base):
        plain = replace(entry, dtype=entry.pieces[0].dtype)
        raw = b"".join(sources.read(plain))
        values.append(decode(raw, plain.dtype).astype("<f4").reshape(entry.shape[0], -1))
    difference: NDArray[float32] = values[0] - values[1]
    return difference


def _prove(sources: Sources, file: Path, differences: list[_Difference]) -> float:
    """Read the LoRA again: the share of the difference that it holds, which is what the computed factors hold."""
    import numpy as np

    pairs = {pair.module: pair for pair in read_lora(file).pairs}
    lost = total = 0.0
    for found in differences:
        pair = pairs.get(found.module)
        if pair is None:
            raise Unproven(f"{found.module.path} is missing")
        matrix = found.matrix(sources)
        added = np.float32(pair.alpha / pair.rank) * (matrix_of(sources, pair.up) @ matrix_of(sources, pair.down))
        rest = float(((matrix - added).astype("<f8") ** 2).sum())
        up, down = nearest(matrix, found.rank)
        least = float(((matrix - up @ down).astype("<f8") ** 2).sum())
        if not rest <= least + _TOLERANCE * found.square:
            raise Unproven(f"{found.module.path} is {rest:g} away, not {least:g}")
        lost, total = lost + rest, total + found.square
    return 1.0 - lost / total
