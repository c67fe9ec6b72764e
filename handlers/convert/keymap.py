"""Key maps as data: pairs of module names, read in both directions.

A table is a list of (name in the single file, name in the Diffusers component) pairs of modules. A key is translated by
the longest module name that it starts with; the rest (``.weight``, ``.bias``, ``.transformer_blocks.0…``) stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Component:
    """One component of a pipeline in a single file.

    Attributes:
        name: its folder in the Diffusers layout: ``unet``, ``vae``, ``text_encoder``.
        prefix: what its keys start with in the single file.
        modules: (single, Diffusers) module names; none: the names are the same.
        older: (older, current) Diffusers names, normalised before the table is read.
        optional: a prefix that the Diffusers keys may carry or not (``text_model.``); the single file has it.
        ignored: endings of buffers that no file should carry.
        ones: (module names in the single file) whose (C, C) weight is written as (C, C, 1, 1) there.
    """

    name: str
    prefix: str
    modules: tuple[tuple[str, str], ...] = ()
    older: tuple[tuple[str, str], ...] = ()
    optional: str = ""
    ignored: tuple[str, ...] = ("position_ids",)
    ones: frozenset[str] = frozenset()
    _to_single: Mapping[str, str] = field(init=False, repr=False, compare=False)
    _to_diffusers: Mapping[str, str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_to_single", {diffusers: single for single, diffusers in self.modules})
        object.__setattr__(self, "_to_diffusers", dict(self.modules))

    def is_ignored(self, key: str) -> bool:
        """Whether a Diffusers key is a buffer that is left out."""
        return key.rsplit(".", 1)[-1] in self.ignored

    def to_single(self, key: str) -> str | None:
        """The key in the single file of a Diffusers key; None when the table does not know its module."""
        for old, new in self.older:
            key = key.replace(old, new)
        if not self.modules:
            return self.prefix + self.optional + key.removeprefix(self.optional)
        translated = _translate(key, self._to_single)
        return None if translated is None else self.prefix + translated

    def to_diffusers(self, key: str) -> str | None:
        """The Diffusers key (current names, without the optional prefix) of a key in the single file, or None."""
        if not key.startswith(self.prefix):
            return None
        key = key.removeprefix(self.prefix)
        if not self.modules:
            return key.removeprefix(self.optional) if key.startswith(self.optional) else None
        return _translate(key, self._to_diffusers)

    def current(self, key: str) -> str:
        """A Diffusers key under its current name, without the optional prefix: what ``to_diffusers`` gives."""
        for old, new in self.older:
            key = key.replace(old, new)
        return key.removeprefix(self.optional)

    def shape_in_single(self, key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that a tensor has in the single file.

        Args:
            key: its key there.
            shape: its shape in the Diffusers component.
        """
        module, _, leaf = key.removeprefix(self.prefix).rpartition(".")
        return (*shape, 1, 1) if leaf == "weight" and len(shape) == 2 and module in self.ones else shape


def _translate(key: str, table: Mapping[str, str]) -> str | None:
    module = key
    while module:
        module = module.rpartition(".")[0]
        if module in table:
            return table[module] + key[len(module) :]
    return None


def with_leaves(modules: Iterable[tuple[str, str]], leaves: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The pairs of the parts of modules: every module with every leaf, on both sides."""
    inner = list(leaves)
    return [(f"{single}.{a}", f"{diffusers}.{b}") for single, diffusers in modules for a, b in inner]
