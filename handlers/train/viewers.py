"""Who else looks at a run while it trains: TensorBoard, and Weights & Biases where it is configured.

A viewer shows what ``metrics.jsonl`` says, no more: every process of a run gives it all rows that count once more, so
that a kill and a resume double nothing and lose nothing. What fails in a viewer is told in a line of ``log.txt``, and
the run goes on without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

Row = Mapping[str, Any]
"""A row of ``metrics.jsonl``: ``step``, ``stage``, ``loss``, ``learning_rate`` …, see ``scalars``."""


class Viewer(Protocol):
    """Something that shows a run."""

    def begin(self, rows: Sequence[Row], samples: Mapping[int, Path], /) -> None:
        """A process of the run begins: all rows that count, and step → sample grid."""

    def note(self, rows: Sequence[Row]) -> None:
        """Steps were done."""

    def show(self, step: int, sample: Path, /) -> None:
        """A sample grid was drawn."""

    def close(self) -> None:
        """The process ends its work on the run."""


class Viewers:
    """Several viewers, none of which can stop the run.

    Args:
        makers: what is shown in → makes the viewer; may raise ``ImportError`` where its package is missing.
        told: told in a line of what went wrong.
    """

    def __init__(self, makers: Mapping[str, Callable[[], Viewer]], told: Callable[[str], None]) -> None:
        self._told = told
        self._viewers: dict[str, Viewer] = {}
        self._rows: list[Row] = []
        for name, make in makers.items():
            try:
                self._viewers[name] = make()
            except ImportError as error:
                told(f"{name} shows nothing of this run: {error}")
            except Exception as error:
                self._lose(name, error)

    def begin(self, rows: Sequence[Row], samples: Mapping[int, Path]) -> None:
        """As ``Viewer.begin``."""
        self._each(lambda viewer: viewer.begin(rows, samples))

    def note(self, row: Row) -> None:
        """A step was done; it is shown with the next ``flush``."""
        self._rows.append(row)

    def flush(self) -> None:
        """Show what was noted since the last time."""
        rows, self._rows = self._rows, []
        if rows:
            self._each(lambda viewer: viewer.note(rows))

    def show(self, step: int, sample: Path) -> None:
        """As ``Viewer.show``."""
        self.flush()
        self._each(lambda viewer: viewer.show(step, sample))

    def close(self) -> None:
        """As ``Viewer.close``."""
        self.flush()
        self._each(lambda viewer: viewer.close())
        self._viewers.clear()

    def _each(self, action: Callable[[Viewer], None]) -> None:
        for name, viewer in list(self._viewers.items()):
            try:
                action(viewer)
            except Exception as error:
                self._viewers.pop(name, None)
                self._lose(name, error)

    def _lose(self, name: str, error: Exception) -> None:
        said = " ".join(str(error).split())[:200]
        self._told(f"{name} shows no more of this run ({type(error).__name__}: {said}); the training goes on")


def scalars(row: Row) -> Iterator[tuple[str, float]]:
    """What is shown of a row as curves: name and value."""
    yield "loss/train", float(row["loss"])
    if row.get("validation_loss") is not None:
        yield "loss/held out", float(row["validation_loss"])
    rates = row.get("rates") or {"all": row["learning_rate"]}
    for part, rate in rates.items():
        yield f"learning rate/{part}", float(rate)
    if row.get("seconds") is not None:
        yield "seconds a step", float(row["seconds"])
    if row.get("memory"):
        yield "memory in GB", row["memory"] / 1e9
