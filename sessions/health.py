"""What a set of pictures lacks, told in a few plain lines: what goes in decides what is learned. Pure.

Looks at the records of crops (``health``, ``sha256``, ``picture``), never at a picture. Records of older versions have
no ``health``: then nothing is said of what it would tell.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations, pairwise
from statistics import median
from typing import Any

FEW = 5
"""Pictures below which a set teaches little."""
_SMALLEST = 512
"""Pixels of the shorter side from which a picture is large enough, where nobody says at what a set trains."""
_NAMED = 4
_GROUPS = 3
# Sharpness is what the crop job measures, the deviation of the Laplacian of a lightness of 0..255: below the floor a
# picture is blurred in any company; below the ceiling it is where the others are much sharper.
_BLURRED = 5.0
_SHARP = 20.0
_BEHIND = 0.25
# The mean of the lightness, 0..1. The bounds are wide: a subject before a black or a white ground is neither.
_DARK, _BRIGHT = 0.08, 0.96
_NEAR = 6
"""Bits of 64 by which the difference hashes of two pictures may differ that people would call the same …"""
_TELLING = 4
"""… and at most one in so many of those that say anything: on an even ground, few of them do."""
_MOST_COMPARED = 3000
_HASH_BITS = 64

Record = Mapping[str, Any]


def review(records: Sequence[Record], resolution: int = _SMALLEST) -> list[str]:
    """Lines about a set, the most important first; none where nothing is to be said.

    Args:
        records: the crops of the pictures that would train.
        resolution: pixels of a side at which they would.
    """
    if not records:
        return []
    ordered = sorted(records, key=lambda record: str(record["source"]))
    names = _Names([str(record["source"]) for record in ordered])
    copies = _copies(ordered)
    extra = {str(record["source"]) for group in copies for record in group[1:]}
    single = [record for record in ordered if str(record["source"]) not in extra]
    alike = _alike(single)
    distinct = len(single) - sum(len(group) - 1 for group in alike)
    lines = [
        *_on_number(len(single), distinct),
        *_on_groups("The same file more than once", copies, names, "One of each is enough."),
        *_on_groups("Nearly the same picture", alike, names, "Other poses, places and light teach more."),
    ]
    sharpness = [value for record in single if (value := _number(record, "sharpness")) is not None]
    typical = median(sharpness) if sharpness else 0.0
    for what, belongs, advice in _FINDINGS:
        found = [record for record in single if belongs(record, typical)]
        if found:
            lines.append(f"{what}: {names.some(found)}. {advice}")
    small = [record for record in single if _is_smaller(record, resolution)]
    if small:
        larger = "A larger version would train better."
        lines.append(f"Smaller than {resolution} pixels: {names.some(small)}. {larger}")
    return lines


def _on_number(pictures: int, distinct: int) -> list[str]:
    if pictures < FEW:
        number = "Only one picture" if pictures == 1 else f"Only {pictures} pictures"
        return [f"{number}: ten to twenty that differ in pose, place and light teach far more."]
    if distinct <= pictures / 2:
        return [f"The pictures are too similar: of {pictures}, only {distinct} differ clearly."]
    return []


def _on_groups(what: str, groups: Sequence[Sequence[Record]], names: _Names, advice: str) -> list[str]:
    if not groups:
        return []
    shown = "; ".join(names.some(group, " = ") for group in groups[:_GROUPS])
    more = f"; and {len(groups) - _GROUPS} more" if len(groups) > _GROUPS else ""
    return [f"{what}: {shown}{more}. {advice}"]


class _Names:
    """What the pictures are called: by their names, by their paths where two have the same name."""

    def __init__(self, sources: Iterable[str]) -> None:
        self._count: defaultdict[str, int] = defaultdict(int)
        for source in sources:
            self._count[source.rsplit("/", 1)[-1]] += 1

    def some(self, records: Sequence[Record], between: str = ", ") -> str:
        """The first few names, and how many more there are."""
        shown = between.join(self._of(str(record["source"])) for record in records[:_NAMED])
        return shown + (f" and {len(records) - _NAMED} more" if len(records) > _NAMED else "")

    def _of(self, source: str) -> str:
        name = source.rsplit("/", 1)[-1]
        return name if self._count[name] == 1 else source


def _copies(records: Sequence[Record]) -> list[list[Record]]:
    """Groups of pictures whose files are the same, byte by byte."""
    groups: defaultdict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record.get("sha256"):
            groups[str(record["sha256"])].append(record)
    return [group for group in groups.values() if len(group) > 1]


def _alike(records: Sequence[Record]) -> list[list[Record]]:
    """Groups of pictures that look the same: each is near to another of its group."""
    by_hash: defaultdict[int, list[Record]] = defaultdict(list)
    for record in records:
        value = _hash(record)
        if value is not None and _is_near(value, value):  # else it says nothing, as of a page or a wall
            by_hash[value].append(record)
    if len(by_hash) > _MOST_COMPARED:
        return []
    root = {value: value for value in by_hash}

    def top(value: int) -> int:
        while root[value] != value:
            root[value] = value = root[root[value]]
        return value

    for one, other in _candidates(list(by_hash)):
        if _is_near(one, other):
            root[top(one)] = top(other)
    groups: defaultdict[int, list[Record]] = defaultdict(list)
    for value, found in by_hash.items():
        groups[top(value)] += found
    found_groups = [sorted(group, key=lambda record: str(record["source"])) for group in groups.values()]
    return sorted((group for group in found_groups if len(group) > 1), key=lambda group: str(group[0]["source"]))


def _is_near(one: int, other: int) -> bool:
    telling = min((one | other).bit_count(), _HASH_BITS - (one & other).bit_count())
    limit = min(_NEAR, telling // _TELLING)
    return limit > 0 and (one ^ other).bit_count() <= limit


def _candidates(hashes: Sequence[int]) -> Iterable[tuple[int, int]]:
    """Pairs that share one of ``_NEAR + 1`` parts of their bits, as any two that differ in ``_NEAR`` bits do."""
    parts = _NEAR + 1
    edges = [_HASH_BITS * part // parts for part in range(parts + 1)]
    for low, high in pairwise(edges):
        buckets: defaultdict[int, list[int]] = defaultdict(list)
        for value in hashes:
            buckets[value >> low & (1 << high - low) - 1].append(value)
        for bucket in buckets.values():
            yield from combinations(bucket, 2)


def _hash(record: Record) -> int | None:
    try:
        return int(str(_health(record)["dhash"]), 16)
    except (KeyError, ValueError):
        return None


def _health(record: Record) -> Mapping[str, Any]:
    value = record.get("health")
    return value if isinstance(value, Mapping) else {}


def _number(record: Record, *keys: str) -> float | None:
    value: Any = _health(record)
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, int | float) else None


def _is_blurred(record: Record, typical: float) -> bool:
    sharpness = _number(record, "sharpness")
    return sharpness is not None and (sharpness < _BLURRED or sharpness < min(_SHARP, _BEHIND * typical))


def _is_dark(record: Record, _typical: float) -> bool:
    mean = _number(record, "exposure", "mean")
    return mean is not None and mean < _DARK


def _is_bright(record: Record, _typical: float) -> bool:
    mean = _number(record, "exposure", "mean")
    return mean is not None and mean > _BRIGHT


def _is_smaller(record: Record, resolution: int) -> bool:
    side = _number(record, "shorter_side")
    if side is None:
        side = min((float(length) for length in record.get("picture") or ()), default=None)
    return side is not None and side < resolution


_Finding = tuple[str, Callable[[Record, float], bool], str]
_FINDINGS: tuple[_Finding, ...] = (
    ("Blurred", _is_blurred, "A blurred picture teaches blur."),
    ("Too dark", _is_dark, "Little can be learned from them."),
    ("Too bright", _is_bright, "Little can be learned from them."),
)
