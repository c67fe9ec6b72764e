"""The publish job: a finished model goes to the WebUI, and a picture proves that it arrived."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from handlers.context import JobContext, JobResult, Waiting
from handlers.publish import prove, swap
from handlers.publish.ask import A1111Client, Absent, Model, NotImplementedYet, NotReady, Unauthorised, WebUIError
from handlers.publish.connect import connect, probe
from handlers.publish.lora_job import NO_LORA_FACTS, is_lora, lora_shelf, publish_lora
from handlers.publish.visit import USUAL_PATIENCE, Patience, Visit
from sessions.refusal import Refusal

__all__ = ["Patience", "PublishHandler"]
_NO_FACTS = {"published": None, "sd_model_hash": None, "previous": None}


class PublishHandler:
    """Places a model in the WebUI's folder, has it chosen and proves it; a LoRA is drawn with, and nothing is chosen.

    Args:
        patience: how long to wait for a WebUI.
        clock: seconds, monotonic.
        sleep: waits so many seconds.
    """

    def __init__(
        self,
        patience: Patience = USUAL_PATIENCE,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._patience = patience
        self._clock = clock
        self._sleep = sleep

    def run(self, context: JobContext) -> JobResult:
        """Publish ``model`` (absolute path) as the ``webui`` settings say.

        Payload: ``model``, ``name``, ``run``, ``webui`` {``kind``, ``url``, ``models``, ``loras``, ``switch``, and
        ``user`` and ``password`` unless FASTSD_WEBUI_AUTH is set}; optional: ``sha256`` of the model, where it is known
        already, and ``proof_picture``: where to keep the picture. Of a LoRA also ``model_kind`` (``lora``), ``family``
        and ``trigger``: the words that it answers to.

        Facts: ``run``; ``published``: the file in the WebUI's folder; ``sd_model_hash``; ``proof``: ``picture``,
        ``name`` (a WebUI that hashes nothing), ``announced`` (``switch: announce``) or ``none`` (``kind: none``);
        ``previous``: the title of the model that was chosen before. Of a LoRA ``model_kind``, ``prompt``: what to write
        to draw with it; ``lora_hash`` in place of ``sd_model_hash``; no ``previous``; and ``proof`` may be ``listed``:
        then ``note`` says why no picture was asked for.

        Raises:
            Refusal: the model's file is gone.
            Waiting: the WebUI is absent, starting, busy, or wants other settings.
            handlers.publish.prove.NotTaken: the WebUI does not draw with the model.
        """
        settings: dict[str, Any] = dict(context.payload["webui"])
        visit = Visit(context, settings, self._patience, self._clock, self._sleep)
        if settings.get("kind") == "none":
            nothing = NO_LORA_FACTS if is_lora(visit) else _NO_FACTS
            return JobResult({"run": context.payload["run"], **nothing, "proof": "none"})
        if not visit.model.is_file():
            raise Refusal("gone", f"The model {visit.model.name} is no longer there.", "Put it back, or train again.")
        try:
            client = connect(settings)
            return _publish(visit, client)
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


def _publish(visit: Visit, client: A1111Client) -> JobResult:
    try:
        probe(client)
    except WebUIError:
        _leave_for_later(visit)
        raise
    if visit.switch == "idle":
        visit.wait_until_idle(client)
    return publish_lora(visit, client) if is_lora(visit) else _publish_checkpoint(visit, client)


def _publish_checkpoint(visit: Visit, client: A1111Client) -> JobResult:
    sha256 = visit.sha256()
    placed, entry = _list(visit, client, swap.Shelf(swap.models_folder(visit.settings.get("models"), client)), sha256)
    facts = {
        "run": visit.context.payload["run"],
        "published": str(placed.path),
        "sd_model_hash": sha256[:10],
        "previous": client.chosen(),
    }
    if visit.switch == "announce":
        return JobResult({**facts, "proof": "announced"})
    visit.say("the WebUI loads the model")
    proof = prove.choose_and_prove(client, entry, sha256, lambda: visit.until_back(client))
    return JobResult({**facts, "proof": proof.kind}, visit.keep(proof.picture))


def _leave_for_later(visit: Visit) -> None:
    """Place the model for a WebUI that is not there: it finds it when it starts."""
    shelf = lora_shelf(visit, None) if is_lora(visit) else _configured_shelf(visit)
    if shelf is not None and not swap.seems_placed(visit.model, shelf.folder):
        visit.place(shelf, visit.sha256())


def _configured_shelf(visit: Visit) -> swap.Shelf | None:
    models = visit.settings.get("models")
    return swap.Shelf(Path(models).expanduser()) if models else None


def _list(visit: Visit, client: A1111Client, shelf: swap.Shelf, sha256: str) -> tuple[swap.Placed, Model]:
    """Place the model and find its entry in the WebUI's list, under a second name if the first is spoilt there."""
    placed = visit.place(shelf, sha256)
    entry = _find(visit, client, placed)
    if entry.sha256 is not None and entry.sha256 != sha256:
        # It has seen another file of this name, and will serve that one for as long as it lives.
        second = visit.place_second(shelf, sha256)
        if second is not None:
            placed, entry = second, _find(visit, client, second)
    return placed, entry


def _find(visit: Visit, client: A1111Client, placed: swap.Placed) -> Model:
    visit.say("the WebUI reads its folder")
    client.refresh()
    entry = swap.find(client.models(), placed.path)
    if entry is None:
        raise Waiting(
            f"The model is ready in {placed.path.parent}, but the WebUI at {client.url} does not list it: set "
            "webui.models in fastsd.yaml to the folder that this WebUI reads.",
            retry_after=60.0,
        )
    return entry
