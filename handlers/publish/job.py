"""The publish job: a finished model goes to the WebUI, and a picture proves that it arrived."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handlers.context import JobContext, JobResult, Stopping, Waiting
from handlers.publish import prove, swap
from handlers.publish.ask import A1111Client, Absent, Model, NotImplementedYet, NotReady, Unauthorised, WebUIError
from handlers.publish.connect import connect, probe
from sessions import files
from sessions.refusal import Refusal

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


class PublishHandler:
    """Places a model in the WebUI's folder, has it chosen and proves it.

    Args:
        patience: how long to wait for a WebUI.
        clock: seconds, monotonic.
        sleep: waits so many seconds.
    """

    def __init__(
        self,
        patience: Patience = Patience(),
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._patience = patience
        self._clock = clock
        self._sleep = sleep

    def run(self, context: JobContext) -> JobResult:
        """Publish ``model`` (absolute path) as the ``webui`` settings say.

        Payload: ``model``, ``name``, ``run``, ``webui`` {``kind``, ``url``, ``models``, ``switch``, and ``user`` and
        ``password`` unless FASTSD_WEBUI_AUTH is set}; optional: ``sha256`` of the model, where it is known already, and
        ``proof_picture``: where to keep the picture.

        Facts: ``run``; ``published``: the file in the WebUI's folder; ``sd_model_hash``; ``proof``: ``picture``,
        ``name`` (a WebUI that hashes nothing), ``announced`` (``switch: announce``) or ``none`` (``kind: none``);
        ``previous``: the title of the model that was chosen before.

        Raises:
            Refusal: the model's file is gone.
            Waiting: the WebUI is absent, starting, busy, or wants other settings.
            handlers.publish.prove.NotTaken: the WebUI does not draw with the model.
        """
        settings: dict[str, Any] = dict(context.payload["webui"])
        model = Path(context.payload["model"])
        facts: dict[str, Any] = {"run": context.payload["run"]}
        if settings.get("kind") == "none":
            return JobResult({**facts, "published": None, "sd_model_hash": None, "proof": "none", "previous": None})
        if not model.is_file():
            raise Refusal("gone", f"The model {model.name} is no longer there.", "Put it back, or train again.")
        try:
            client = connect(settings)
            return self._publish(context, client, settings, model, facts)
        except Absent as error:
            raise Waiting(
                f"The model is ready. It waits for a WebUI at {settings.get('url')}: start it, or set webui.kind: none "
                "in fastsd.yaml."
            ) from error
        except NotReady as error:
            raise Waiting(f"The model is ready. {error}", retry_after=5.0) from error
        except Unauthorised as error:
            raise Waiting(f"The model is ready. {error}", retry_after=60.0) from error
        except NotImplementedYet as error:
            raise Waiting(f"The model is ready. {error}", retry_after=600.0) from error

    def _publish(
        self,
        context: JobContext,
        client: A1111Client,
        settings: dict[str, Any],
        model: Path,
        facts: dict[str, Any],
    ) -> JobResult:
        try:
            probe(client)
        except WebUIError:
            self._leave_for_later(context, settings, model)
            raise
        if settings.get("switch") == "idle":
            self._wait_until_idle(context, client)
        sha256 = _sha256(context, model)
        facts["sd_model_hash"] = sha256[:10]
        folder = swap.models_folder(settings.get("models"), client)
        placed, entry = self._list(context, client, model, folder, sha256)
        facts["published"] = str(placed.path)
        facts["previous"] = client.chosen()
        if settings.get("switch") == "announce":
            return JobResult({**facts, "proof": "announced"})
        context.progress(0, 1, "the WebUI loads the model")
        proof = prove.choose_and_prove(client, entry, sha256, lambda: self._until_back(context, client))
        outputs = []
        if context.payload.get("proof_picture"):
            picture = Path(context.payload["proof_picture"])
            files.write_bytes(picture, proof.picture.content)
            outputs.append(picture)
        return JobResult({**facts, "proof": proof.kind}, outputs)

    def _leave_for_later(self, context: JobContext, settings: dict[str, Any], model: Path) -> None:
        """Place the model for a WebUI that is not there: it finds it when it starts."""
        if not settings.get("models"):
            return
        folder = Path(settings["models"]).expanduser()
        if not swap.seems_placed(model, folder):
            self._place(context, model, folder, _sha256(context, model))

    def _list(
        self,
        context: JobContext,
        client: A1111Client,
        model: Path,
        folder: Path,
        sha256: str,
    ) -> tuple[swap.Placed, Model]:
        """Place the model and find its entry in the WebUI's list, under a second name if the first is spoilt there."""
        placed = self._place(context, model, folder, sha256)
        entry = self._find(context, client, placed)
        if entry.sha256 is not None and entry.sha256 != sha256:
            # It has seen another file of this name, and will serve that one for as long as it lives.
            second = swap.place(model, folder, sha256, _second_stem(model, sha256), _copying(context))
            if second is not None:
                placed, entry = second, self._find(context, client, second)
        return placed, entry

    def _place(self, context: JobContext, model: Path, folder: Path, sha256: str) -> swap.Placed:
        for stem in (model.stem, _second_stem(model, sha256)):
            placed = swap.place(model, folder, sha256, stem, _copying(context))
            if placed is not None:
                return placed
        raise Waiting(
            f"The model is ready, but {folder} has other files named {model.name}: move them away.", retry_after=120.0
        )

    def _find(self, context: JobContext, client: A1111Client, placed: swap.Placed) -> Model:
        context.progress(0, 1, "the WebUI reads its folder")
        client.refresh()
        entry = swap.find(client.models(), placed.path)
        if entry is None:
            raise Waiting(
                f"The model is ready in {placed.path.parent}, but the WebUI at {client.url} does not list it: set "
                "webui.models in fastsd.yaml to the folder that this WebUI reads.",
                retry_after=60.0,
            )
        return entry

    def _wait_until_idle(self, context: JobContext, client: A1111Client) -> None:
        deadline = self._clock() + self._patience.busy
        while not client.idle():
            self._pause(context, "waiting until the WebUI is idle")
            if self._clock() > deadline:
                raise Waiting("The model is ready. It waits until the WebUI is idle (webui.switch: idle).", 10.0)

    def _until_back(self, context: JobContext, client: A1111Client) -> bool:
        deadline = self._clock() + self._patience.crashed
        while not client.ready():
            self._pause(context, "the WebUI went away; waiting for it")
            if self._clock() > deadline:
                return False
        return True

    def _pause(self, context: JobContext, note: str) -> None:
        context.progress(0, 1, note)
        if context.is_stopping():
            raise Stopping
        self._sleep(POLL_SECONDS)


def _sha256(context: JobContext, model: Path) -> str:
    known = context.payload.get("sha256")
    if isinstance(known, str):
        return known
    return swap.sha256_with_progress(model, lambda done, size: context.progress(done, size, "reading the model"))


def _second_stem(model: Path, sha256: str) -> str:
    return f"{model.stem}~{sha256[:8]}"


def _copying(context: JobContext) -> swap.Report:
    return lambda done, size: context.progress(done, size, "copying the model to the WebUI's folder")
