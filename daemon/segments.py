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

    def here(self) -> SegmentNetwork | None:
        """The one that lies here now."""
        return segments.find(self.models(), self.cache)

    def parameters(self) -> Mapping[str, Any] | None:
        """The one that was here at the last look, as a crop's parameters tell it.

        What crops are wanted must not change between two looks at all of them.
        """
        return self._known.to_json() if self._known else None

    def look(self) -> bool:
        """Look again. Returns whether another one is here than before: then other crops may be wanted."""
        before, self._known = self._known, self.here()
        return before != self._known
