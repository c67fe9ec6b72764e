"""Is the written file the model that it was made of? Read again from the disk, translated back, compared.

Nothing of the writer's plan is used: names go the other way through the table, shapes and types come from the two
headers, and every tensor of the source must be met exactly once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from handlers.convert.cast import cast
from handlers.convert.header import SIZES, Tensor, read_bytes, read_header
from handlers.convert.keymap import Component
from handlers.convert.source import Located

_BLOCK = 4 << 20
_SAMPLE = 4096


class Unproven(Exception):  # noqa: N818 - what it is: a file that failed its proof
    """The written file is not the source: it must not get its name."""


Pair = tuple[str, Tensor, Located]


def match_headers(
    file: Path, components: Sequence[Component], found: Mapping[str, Mapping[str, Located]]
) -> list[Pair]:
    """Pair every tensor of the file with the source's, by name and shape.

    Returns:
        (name in the file, its tensor, the source's), in the order of the file.

    Raises:
        Unproven: a tensor is missing, unknown, or has another shape.
        Refusal: code ``corrupt``: the file is torn.
    """
    wanted = {
        (component.name, component.current(key)): located
        for component in components
        for key, located in found[component.name].items()
        if not component.is_ignored(key)
    }
    pairs: list[Pair] = []
    tensors = read_header(file).tensors
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].begin):
        component, key = _owner(name, components)
        located = wanted.pop((component.name, key), None)
        if located is None:
            raise Unproven(f"{name} is not in the source")
        if tensor.shape != component.shape_in_single(name, located.tensor.shape):
            raise Unproven(f"{name} has the shape {tensor.shape}, its source {located.tensor.shape}")
        pairs.append((name, tensor, located))
    if wanted:
        component_name, key = next(iter(wanted))
        raise Unproven(f"{len(wanted)} tensors are missing, the first is {component_name}/{key}")
    return pairs


def _owner(name: str, components: Sequence[Component]) -> tuple[Component, str]:
    for component in components:
        key = component.to_diffusers(name)
        if key is not None:
            return component, key
    raise Unproven(f"{name} belongs to no component")


def compare_samples(file: Path, pairs: Sequence[Pair]) -> None:
    """Compare the first, a middle and the last ``_SAMPLE`` bytes of every tensor.

    Raises:
        Unproven: values differ.
    """
    _compare(file, pairs, _sampled)


def compare_all(file: Path, pairs: Sequence[Pair]) -> None:
    """Compare every byte of every tensor.

    Raises:
        Unproven: values differ.
    """
    _compare(file, pairs, _everything)


def _sampled(count: int, size: int) -> Iterator[tuple[int, int]]:
    values = max(1, _SAMPLE // size)
    if count <= 3 * values:
        yield 0, count
        return
    for begin in (0, (count - values) // 2, count - values):
        yield begin, values


def _everything(count: int, size: int) -> Iterator[tuple[int, int]]:
    values = _BLOCK // size
    for begin in range(0, count, values):
        yield begin, min(values, count - begin)


def _compare(file: Path, pairs: Sequence[Pair], ranges: Callable[[int, int], Iterator[tuple[int, int]]]) -> None:
    """``ranges`` gives (first value, number of values) for a tensor of so many values of so many bytes."""
    with ExitStack() as stack:
        written = stack.enter_context(file.open("rb"))
        opened: dict[Path, IO[bytes]] = {}
        for name, tensor, located in pairs:
            if located.file not in opened:
                opened[located.file] = stack.enter_context(located.file.open("rb"))
            source, old = opened[located.file], located.tensor
            new_size, old_size = SIZES[tensor.dtype], SIZES[old.dtype]
            for begin, values in ranges(tensor.length // new_size, max(new_size, old_size)):
                have = read_bytes(written.fileno(), tensor.begin + begin * new_size, values * new_size)
                made_of = read_bytes(source.fileno(), old.begin + begin * old_size, values * old_size)
                if have != cast(made_of, old.dtype, tensor.dtype):
                    raise Unproven(f"{name} does not hold the values of its source")
