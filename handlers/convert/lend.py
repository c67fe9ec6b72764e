"""Parts that a file lacks (a VAE, a text encoder, T5's tokenizer), lent by the family's base where it is here."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from handlers.convert.families import Family
from handlers.models import catalogue, registry
from sessions.refusal import Refusal


def lend(folder: Path, family: Family, missing: Sequence[str], cache: Path) -> None:
    """Copy missing components, and tokenizers without files, from the family's base on this machine.

    Args:
        folder: the Diffusers folder under way.
        family: its family.
        missing: the components of which the file has no tensor.
        cache: the folder of downloaded models.

    Raises:
        Refusal: code ``source``: something is missing and nobody lends it; the advice names the command.
        OSError: copying failed.
    """
    if family.drawing.name in missing:
        raise Refusal("source", f"The file has no {family.drawing.name}.", "It is no model that draws.")
    empty = [place.name for place in sorted(folder.glob("tokenizer*")) if not any(place.iterdir())]
    wanted = [*missing, *empty]
    if not wanted:
        return
    lender = _lender(family, wanted, cache)
    for name in wanted:
        shutil.rmtree(folder / name, ignore_errors=True)
        shutil.copytree(lender / name, folder / name)


def _lender(family: Family, wanted: Sequence[str], cache: Path) -> Path:
    """The first base of the family on this machine that has all that is wanted; the usual one is asked first."""
    usual = catalogue.ENTRIES.get(family.filler)
    others = (entry for entry in catalogue.ENTRIES.values() if entry.origin != catalogue.BUILT_IN)
    for entry in (usual, *(entry for entry in others if entry.family == family.name)):
        place = registry.local_copy(entry, cache) if entry else None
        if place is not None and all((place / name).is_dir() for name in wanted):
            return place
    raise Refusal(
        "source",
        f"The file has no {' and no '.join(wanted)}, and the base {family.filler} that has is not on this machine.",
        f"Get it with: fastsd models get {family.filler}" if usual else "Use a file that is whole.",
    )
