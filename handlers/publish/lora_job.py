"""Publishing a LoRA: it is placed beside the WebUI's others and drawn with on whatever model is chosen."""

from __future__ import annotations

from typing import Any

from handlers.context import JobResult, Waiting
from handlers.publish import lora, swap
from handlers.publish.ask import A1111Client, Lora, NotReady
from handlers.publish.visit import Visit
from sessions.layout import lora_prompt

NO_LORA_FACTS: dict[str, Any] = {"model_kind": "lora", "published": None, "lora_hash": None, "note": None}


def is_lora(visit: Visit) -> bool:
    """Whether it is a LoRA that is published."""
    return visit.context.payload.get("model_kind") == "lora"


def lora_shelf(visit: Visit, client: A1111Client | None) -> swap.Shelf | None:
    """Where LoRAs go; None where no WebUI is there to be asked and the settings do not tell.

    Raises:
        Waiting, handlers.publish.ask.WebUIError: as ``lora.loras_folder``.
    """
    folder = lora.loras_folder(visit.settings, client)
    return None if folder is None else swap.Shelf(folder, "webui.loras", "LoRA")


def publish_lora(visit: Visit, client: A1111Client) -> JobResult:
    """Place a LoRA, have the WebUI list it, and draw with it; the facts are those of ``PublishHandler.run``.

    Raises:
        Waiting: the WebUI does not list it, or its folder cannot be used.
        handlers.publish.prove.NotTaken: the WebUI does not draw with it.
        handlers.publish.ask.WebUIError: it could not be asked.
    """
    shelf = lora_shelf(visit, client)
    assert shelf is not None, "a WebUI that is there has a folder"
    sha256, digest = visit.sha256(), lora.data_hash(visit.model)
    placed = visit.place(shelf, sha256)
    entry = _find(visit, client, placed)
    proof = None
    if visit.switch != "announce":
        try:
            proof = _prove(visit, client, entry, digest)
        except lora.Stale:
            # It has seen another file of this name, and will serve that one for as long as it lives.
            second = visit.place_second(shelf, sha256)
            if second is None or second.path == placed.path:
                raise
            placed, entry = second, _find(visit, client, second)
            proof = _prove(visit, client, entry, digest)
    facts = {
        "run": visit.context.payload["run"],
        "model_kind": "lora",
        "published": str(placed.path),
        "lora_hash": digest[: lora.DIGITS],
        "prompt": lora_prompt(entry.name, _trigger(visit)),
        "proof": proof.kind if proof else "announced",
        "note": proof.note if proof else None,
    }
    return JobResult(facts, visit.keep(proof.picture if proof else None))


def _trigger(visit: Visit) -> str:
    return str(visit.context.payload.get("trigger") or "")


def _prove(visit: Visit, client: A1111Client, entry: Lora, digest: str) -> lora.LoraProof:
    visit.say("the WebUI draws with the LoRA")
    return lora.prove_lora(
        client,
        entry,
        digest,
        family=str(visit.context.payload.get("family")),
        trigger=_trigger(visit),
        until_back=lambda: visit.until_back(client),
    )


def _find(visit: Visit, client: A1111Client, placed: swap.Placed) -> Lora:
    visit.say("the WebUI reads its folder of LoRAs")
    folder = placed.path.parent
    try:
        client.refresh_loras()
        entry = swap.find(client.loras(), placed.path)
    except NotReady as error:
        raise Waiting(
            f"The LoRA is ready in {folder}, but the WebUI at {client.url} has no list of LoRAs: switch its built-in "
            "extension for LoRAs on.",
            retry_after=60.0,
        ) from error
    if entry is None:
        raise Waiting(
            f"The LoRA is ready in {folder}, but the WebUI at {client.url} does not list it: set webui.loras in "
            "fastsd.yaml to the folder that this WebUI reads.",
            retry_after=60.0,
        )
    return entry
