"""Weights & Biases, for who names a project in fastsd.yaml (``wandb: PROJECT``).

The key comes from the environment (``WANDB_API_KEY``), as all that the package asks there; ``WANDB_MODE=offline``
writes for a later ``wandb sync``. Its files lie in the cache, not in the tree.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from handlers.train.viewers import Row, scalars

_PATIENCE_SECONDS = 30.0


class WandbRun:
    """One run of a project; the same run again after a resume, which takes no step twice.

    Args:
        project: its name.
        identity: of the run, unlike every other.
        name: what people call it.
        plan: how it is trained.
        folder: for the package's own files.

    Raises:
        ImportError: the package is not installed.
    """

    def __init__(self, project: str, identity: str, name: str, *, plan: Mapping[str, Any], folder: Path) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError("the package wandb is not installed (pip install 'fastsd[wandb]')") from error
        folder.mkdir(parents=True, exist_ok=True)
        self._wandb: Any = wandb
        # Nothing of the machine, the code or the terminal is sent: only what is logged here.
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            save_code=False,
            x_disable_meta=True,
            x_disable_machine_info=True,
            init_timeout=_PATIENCE_SECONDS,
        )
        self._run: Any = wandb.init(
            project=project,
            id=identity,
            name=name,
            config=dict(plan),
            dir=folder,
            resume="allow",
            reinit="finish_previous",
            settings=settings,
        )

    def begin(self, rows: Sequence[Row], samples: Mapping[int, Path]) -> None:
        """As ``viewers.Viewer.begin``: what it has already, it leaves."""
        at = {row["step"]: row for row in rows}
        for step in sorted(at.keys() | samples.keys()):
            self._log(step, at.get(step), samples.get(step))

    def note(self, rows: Sequence[Row]) -> None:
        """As ``viewers.Viewer.note``."""
        for row in rows:
            self._log(row["step"], row, None)

    def show(self, step: int, sample: Path) -> None:
        """As ``viewers.Viewer.show``."""
        self._log(step, None, sample)

    def _log(self, step: int, row: Row | None, sample: Path | None) -> None:
        values: dict[str, Any] = dict(scalars(row)) if row else {}
        if sample:
            values["samples"] = self._wandb.Image(str(sample))
        self._run.log(values, step=step)

    def close(self) -> None:
        """As ``viewers.Viewer.close``; without a network it would try for hours, so it gets half a minute.

        Raises:
            TimeoutError: it did not end in time; what it has not sent stays in its folder.
        """
        ending = threading.Thread(target=self._run.finish, daemon=True)
        ending.start()
        ending.join(_PATIENCE_SECONDS)
        if ending.is_alive():
            raise TimeoutError("not all was sent; `wandb sync` sends the rest")
