"""Key maps as data: rules between names in one file and names in a Diffusers component, read in both directions.

A rule pairs one module (or whole key) of the single file with one or several of the component. A key is translated by
the longest rule that it starts with; the rest (``.weight``, ``.bias``, ``.transformer_blocks.0…``) stays. ``#`` in a
rule stands for the first number of a key: the rules of a layer are written once, however many layers there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

Form = Literal["same", "ones", "transposed", "halves"]


@dataclass(frozen=True)
class Rule:
    """One line of a table.

    Attributes:
        single: the module or key in the single file.
        diffusers: the modules or keys of the component; several lie one behind the other (first axis) in the single
            file's tensor.
        shares: how much of the first axis each of several takes; empty: as much as the others.
        form: how the single file has the tensor: ``same``; ``ones``: a (C, C) weight as (C, C, 1, 1); ``transposed``:
            rows as columns; ``halves``: the second half of the first axis before the first.
    """

    single: str
    diffusers: tuple[str, ...]
    shares: tuple[int, ...] = ()
    form: Form = "same"

    @property
    def weights(self) -> tuple[int, ...]:
        """``shares``, or ones."""
        return self.shares or (1,) * len(self.diffusers)


@dataclass(frozen=True)
class Match:
    """What a table says of a key: the tensor of the single file, and its parts in the component (canonical names)."""

    single: str
    parts: tuple[str, ...]
    rule: Rule


_SAME = Rule("", ("",))


@dataclass(frozen=True)
class Component:
    """One component of a pipeline in a single file.

    Attributes:
        name: its folder in the Diffusers layout: ``unet``, ``vae``, ``text_encoder``.
        prefix: what its keys start with in the single file.
        rules: the table; none: the names are the same.
        aliases: prefixes that single files have in place of ``prefix``, read and never written.
        older: (older, current) Diffusers names, normalised before the table is read.
        optional: a prefix that the Diffusers keys may carry or not (``text_model.``); canonical names go without.
        bare: canonical keys that are written without the optional prefix.
        ignored: endings of buffers that no file should carry.
        dropped: beginnings of keys behind the prefix that single files have and the component has not.
        tied: (other, canonical) names of one tensor, of which a file may have either or both.
    """

    name: str
    prefix: str
    rules: tuple[Rule, ...] = ()
    aliases: tuple[str, ...] = ()
    older: tuple[tuple[str, str], ...] = ()
    optional: str = ""
    bare: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ("position_ids",)
    dropped: tuple[str, ...] = ()
    tied: tuple[tuple[str, str], ...] = ()
    _by_single: Mapping[str, Rule] = field(init=False, repr=False, compare=False)
    _by_diffusers: Mapping[str, Rule] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_single", {rule.single: rule for rule in self.rules})
        object.__setattr__(self, "_by_diffusers", {part: rule for rule in self.rules for part in rule.diffusers})

    def is_ignored(self, key: str) -> bool:
        """Whether a key, of either side, is a buffer that is left out."""
        return key.rsplit(".", 1)[-1] in self.ignored

    def current(self, key: str) -> str:
        """A Diffusers key under its canonical name: current, without the optional prefix."""
        for old, new in self.older:
            key = key.replace(old, new)
        key = key.removeprefix(self.optional)
        return dict(self.tied).get(key, key)

    def written(self, key: str) -> str:
        """The name under which a canonical key is written into a Diffusers folder."""
        return key if key in self.bare else self.optional + key

    def match_diffusers(self, key: str) -> Match | None:
        """What a canonical Diffusers key belongs to; None when the table does not know its module."""
        if not self.rules:
            return Match(self.prefix + key, (key,), _SAME)
        for module, rest, number in _prefixes(key):
            rule = self._by_diffusers.get(module)
            if rule:
                return self._match(rule, rest, number)
        return None

    def match_single(self, key: str) -> Match | None:
        """What a key of the single file holds; None when it is none of this component's. Aliases are understood."""
        for inner in self._inner(key):
            if not self.rules:
                return Match(self.prefix + inner, (inner,), _SAME)
            for module, rest, number in _prefixes(inner):
                rule = self._by_single.get(module)
                if rule:
                    return self._match(rule, rest, number)
        return None

    def is_dropped(self, key: str) -> bool:
        """Whether a key of the single file is one that the component has no use for."""
        return any(inner.startswith(self.dropped) for inner in self._inner(key)) if self.dropped else False

    def _inner(self, key: str) -> Iterator[str]:
        for prefix in (self.prefix, *self.aliases):
            if key.startswith(prefix):
                yield key.removeprefix(prefix)

    def _match(self, rule: Rule, rest: str, number: str) -> Match:
        def fill(name: str) -> str:
            return name.replace("#", number) + rest

        return Match(self.prefix + fill(rule.single), tuple(fill(part) for part in rule.diffusers), rule)


def _prefixes(key: str) -> Iterator[tuple[str, str, str]]:
    """Every module that a key starts with, the longest first, as (module, rest, number): plain, and with ``#``."""
    words = key.split(".")
    place = next((index for index, word in enumerate(words) if word.isdecimal()), len(words))
    for count in range(len(words), 0, -1):
        rest = "".join(f".{word}" for word in words[count:])
        yield ".".join(words[:count]), rest, "#"
        if place < count:
            yield ".".join([*words[:place], "#", *words[place + 1 : count]]), rest, words[place]


def pairs(modules: Iterable[tuple[str, str]], form: Form = "same") -> list[Rule]:
    """Rules of modules that have one counterpart each."""
    return [Rule(single, (diffusers,), form=form) for single, diffusers in modules]


def with_leaves(modules: Iterable[tuple[str, str]], leaves: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The pairs of the parts of modules: every module with every leaf, on both sides."""
    inner = list(leaves)
    return [(f"{single}.{a}", f"{diffusers}.{b}") for single, diffusers in modules for a, b in inner]
