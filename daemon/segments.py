"""Which salient-object network crops are made with here: it may come, change or go while the daemon runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handlers.models import segments
from handlers.models.segments import SegmentNetwork


@dataclass
class Networks:
    """The networks of a tree.

    Attributes:
        models: () → the tree's Models folder, None where there is none.
        cache: the folder of downloads.
    """

    models: Callable[[], Path | None]
    cache: Path
    _known: SegmentNetwork | None = None

    def known(self) -> SegmentNetwork | None:
        """The one that was here at the last look: nobody wants to look into a mounted folder for each picture."""
        return self._known

    def parameters(self) -> Mapping[str, Any] | None:
        """The same, as a crop's parameters tell it. What is wanted changes only with a look, which all crops follow."""
        return self._known.to_json() if self._known else None

    def look(self) -> bool:
        """Look again. Returns whether another one is here than before: then other crops may be wanted."""
        before, self._known = self._known, segments.find(self.models(), self.cache)
        return before != self._known
