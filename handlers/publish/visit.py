"""One publication: what is brought to which WebUI, and how long to wait for it on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handlers.context import JobContext, Stopping, Waiting
from handlers.publish import swap
from handlers.publish.ask import A1111Client, Picture
from sessions import files

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Patience:
    """How long one job waits for a WebUI, in seconds, before it gives its worker back and is looked at again later.

    Attributes:
        busy: for a WebUI that draws, under ``switch: idle``.
        crashed: for a WebUI that went away while it loaded the model (a supervisor may be starting it again).
    """

    busy: float = 60.0
    crashed: float = 180.0


USUAL_PATIENCE = Patience()


@dataclass(frozen=True)
class Visit:
    """A model's way to a WebUI.

    Attributes:
        context: of the job.
        settings: ``webui``.
        patience: how long to wait for a WebUI.
        clock: seconds, monotonic.
        sleep: waits so many seconds.
    """

    context: JobContext
    settings: Mapping[str, Any]
    patience: Patience
    clock: Callable[[], float]
    sleep: Callable[[float], None]

    @property
    def model(self) -> Path:
        """The file to publish."""
        return Path(self.context.payload["model"])

    @property
    def switch(self) -> str:
        """``webui.switch``."""
        return str(self.settings.get("switch"))

    def sha256(self) -> str:
        """Of the model's file, as the payload or the file tells it."""
        known = self.context.payload.get("sha256")
        if isinstance(known, str):
            return known
        return swap.sha256_with_progress(
            self.model, lambda done, size: self.context.progress(done, size, "reading the model")
        )

    def place(self, shelf: swap.Shelf, sha256: str) -> swap.Placed:
        """Put the model on a shelf, under a second name where the first is another file's.

        Raises:
            Waiting: as ``swap.place``, or both names are taken.
        """
        placed = self._place(shelf, sha256, self.model.stem) or self.place_second(shelf, sha256)
        if placed is not None:
            return placed
        raise Waiting(
            f"The model is ready, but {shelf.folder} has other files named {self.model.name}: move them away.",
            retry_after=120.0,
        )

    def place_second(self, shelf: swap.Shelf, sha256: str) -> swap.Placed | None:
        """Put the model on a shelf under its second name; None where that is another file's."""
        return self._place(shelf, sha256, f"{self.model.stem}~{sha256[:8]}")

    def _place(self, shelf: swap.Shelf, sha256: str, stem: str) -> swap.Placed | None:
        def report(done: int, size: int) -> None:
            self.context.progress(done, size, "copying the model to the WebUI's folder")

        return swap.place(self.model, shelf, sha256, stem, report)

    def say(self, note: str) -> None:
        """What is done now, for people."""
        self.context.progress(0, 1, note)

    def keep(self, picture: Picture | None) -> list[Path]:
        """Write the picture that proves the model where one is asked for; returns the files."""
        wanted = self.context.payload.get("proof_picture")
        if picture is None or not wanted:
            return []
        files.write_bytes(Path(wanted), picture.content)
        return [Path(wanted)]

    def wait_until_idle(self, client: A1111Client) -> None:
        """Wait for a WebUI that draws.

        Raises:
            Waiting: it still does.
            Stopping, Cancelled: as the daemon wishes.
        """
        deadline = self.clock() + self.patience.busy
        while not client.idle():
            self._pause("waiting until the WebUI is idle")
            if self.clock() > deadline:
                raise Waiting("The model is ready. It waits until the WebUI is idle (webui.switch: idle).", 10.0)

    def until_back(self, client: A1111Client) -> bool:
        """Wait for a WebUI that went away; False when it stays away."""
        deadline = self.clock() + self.patience.crashed
        while not client.ready():
            self._pause("the WebUI went away; waiting for it")
            if self.clock() > deadline:
                return False
        return True

    def _pause(self, note: str) -> None:
        self.say(note)
        if self.context.is_stopping():
            raise Stopping
        self.sleep(POLL_SECONDS)
