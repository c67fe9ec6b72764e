"""Is the written model the one that it was made of? Read again from the disk, translated back, compared.

Nothing of the writer's plan is used: what was written is planned in the other direction, and every tensor of the source
must come out of it once, with its shape and its values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from handlers.convert.pieces import Sources, exactly
from handlers.convert.plan import Entry, Located
from handlers.models.headers import BITS

_BLOCK = 4 << 20
_SAMPLE = 4096


class Unproven(Exception):  # noqa: N818 - what it is: a file that failed its proof
    """The written file is not the source: it must not get its name."""


Pair = tuple[Entry, Located]


def match(back: Mapping[str, Sequence[Entry]], wanted: Mapping[str, Mapping[str, Located]]) -> list[Pair]:
    """Pair every tensor of the source with what the written model gives for it, by name and shape.

    Args:
        back: component → the source's tensors, made of the written model.
        wanted: component → the source's tensors.

    Raises:
        Unproven: a tensor is missing, unknown, or has another shape.
    """
    pairs: list[Pair] = []
    for component in sorted({*back, *wanted}):
        have = {entry.name: entry for entry in back.get(component, ())}
        want = wanted.get(component, {})
        missing = [name for name in want if name not in have]
        if missing:
            raise Unproven(f"{len(missing)} tensors are missing, the first is {component}/{missing[0]}")
        for name, entry in have.items():
            if name not in want:
                raise Unproven(f"{component}/{name} is not in the source")
            if entry.shape != want[name].tensor.shape:
                raise Unproven(f"{component}/{name} has the shape {entry.shape}, not {want[name].tensor.shape}")
            pairs.append((entry, want[name]))
    return pairs


def compare_samples(pairs: Sequence[Pair]) -> None:
    """Compare the first, a middle and the last ``_SAMPLE`` bytes of every tensor.

    Raises:
        Unproven: values differ.
    """
    _compare(pairs, _sampled)


def compare_all(pairs: Sequence[Pair]) -> None:
    """Compare every byte of every tensor.

    Raises:
        Unproven: values differ.
    """
    _compare(pairs, _everything)


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


def _compare(pairs: Sequence[Pair], ranges: Callable[[int, int], Iterator[tuple[int, int]]]) -> None:
    """``ranges`` gives (first value, number of values) for a tensor of so many values of so many bytes."""
    with Sources() as sources:
        for entry, located in pairs:
            old = located.tensor
            old_size, size = BITS[old.dtype] // 8, max(BITS[old.dtype], BITS[entry.dtype]) // 8
            source = sources.descriptor(located.file)
            count = old.length // old_size
            if any(piece.turned for piece in entry.pieces):
                _same(b"".join(sources.read(entry)), exactly(source, old.begin, old.length), entry, located)
                continue
            for begin, values in ranges(count, size):
                have = sources.read_range(entry, begin, values)
                _same(have, exactly(source, old.begin + begin * old_size, values * old_size), entry, located)


def _same(have: bytes, made_of: bytes, entry: Entry, located: Located) -> None:
    if located.tensor.dtype != entry.dtype:
        from handlers.convert.cast import cast  # numpy: only where a type changed

        made_of = cast(made_of, located.tensor.dtype, entry.dtype)
    if have != made_of:
        raise Unproven(f"{entry.name} does not hold the values of its source")
