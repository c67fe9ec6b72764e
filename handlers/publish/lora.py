"""LoRAs in a WebUI: where they go, and a small picture that says which file it was drawn with.

A LoRA is not chosen: it draws where a prompt names it, on whatever model is chosen. So nothing is switched here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from handlers.models.inspect import inspect
from handlers.publish.ask import A1111Client, Absent, Failed, Lora, Model, NotReady, Picture, WebUIError
from handlers.publish.folders import beside
from handlers.publish.prove import NotTaken, draw
from handlers.publish.swap import models_folder
from sessions.layout import lora_prompt

_HASHES = "Lora hashes"
_TELLS = "lora_add_hashes_to_infotext"
DIGITS = 12
_BLOCK = 1 << 22


class Stale(NotTaken):
    """The WebUI knows another file under the LoRA's name."""


@dataclass(frozen=True)
class LoraProof:
    """What shows that a LoRA is served.

    Attributes:
        kind: ``picture``: a picture names its hash; ``name``: the WebUI lists it, draws with its name and tells no
            hashes; ``listed``: it is listed, and no picture was asked for.
        picture: the picture, if there is one.
        note: why no picture was asked for.
    """

    kind: Literal["picture", "name", "listed"]
    picture: Picture | None = None
    note: str | None = None


def loras_folder(settings: Mapping[str, Any], client: A1111Client | None) -> Path | None:
    """The folder to publish LoRAs to.

    ``webui.loras``; else ``Lora`` beside the configured folder of checkpoints; else the folder that the WebUI tells;
    else ``Lora`` beside the one that it keeps its models in.

    Args:
        settings: of the WebUI.
        client: to ask it; None where it is not there.

    Returns:
        The folder; None where the settings do not tell and nobody can be asked.

    Raises:
        Waiting: the WebUI does not tell either.
        handlers.publish.ask.WebUIError: the WebUI cannot be asked.
    """
    if settings.get("loras"):
        return Path(settings["loras"]).expanduser()
    models = settings.get("models")
    configured = beside(Path(models).expanduser()) if models else None
    if client is None or (configured and configured.is_dir()):
        return configured
    told = client.loras_folder()
    if told and Path(told).is_dir():
        return Path(told)
    return configured or beside(models_folder(None, client))


def data_hash(file: Path) -> str:
    """The SHA-256 of what follows a safetensors file's header, 64 hex digits: what A1111 and kohya know a LoRA by."""
    digest = hashlib.sha256()
    with file.open("rb") as reader:
        reader.seek(8 + int.from_bytes(reader.read(8), "little"))
        while block := reader.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def chosen_model(client: A1111Client) -> Model | None:
    """The entry of the model that is chosen."""
    title = client.chosen()
    return next((model for model in client.models() if title in (model.title, model.model_name)), None)


def prove_lora(
    client: A1111Client, lora: Lora, digest: str, *, family: str, trigger: str, until_back: Callable[[], bool]
) -> LoraProof:
    """Draw with a LoRA on the model that is chosen, if that is of its family.

    Args:
        client: the WebUI.
        lora: its entry in the list.
        digest: ``data_hash`` of its file.
        family: sd1, sd2, sdxl or flux.
        trigger: the words that the LoRA answers to.
        until_back: waits for a WebUI that has just gone away; False when it stays away.

    Raises:
        Stale: the WebUI drew with another file of that name.
        NotTaken: the WebUI does not draw with the LoRA.
        Absent, NotReady: the WebUI went away and did not come back.
    """
    model = chosen_model(client)
    if model is None:
        return LoraProof("listed", note="no model is chosen in the WebUI to draw with")
    other = family_of(model)
    if other not in (None, family):
        return LoraProof("listed", note=f"the WebUI's model, {model.model_name}, is {other}; the LoRA is for {family}")
    try:
        picture = draw(client, lora_prompt(lora.name, trigger))
    except (Absent, NotReady) as error:
        if not until_back():
            raise
        raise NotTaken(f"The WebUI at {client.url} went away while it drew with {lora.name} ({error}).") from error
    except Failed as error:
        return _without(client, model, lora, error)
    return judge(picture, lora, digest, tells=client.options().get(_TELLS) is True)


def family_of(model: Model) -> str | None:
    """The family of a model's file; None where it cannot be looked into from here."""
    try:
        return inspect(Path(model.filename)).family
    except (OSError, ValueError):
        return None


def _without(client: A1111Client, model: Model, lora: Lora, error: Failed) -> LoraProof:
    """Whose fault is it that there is no picture: the LoRA's, or that of the model that is chosen?"""
    try:
        draw(client)
    except WebUIError:
        return LoraProof("listed", note=f"the WebUI draws nothing with its model, {model.model_name}, at present")
    raise NotTaken(f"The WebUI at {client.url} does not draw with {lora.name}: {error}") from error


def judge(picture: Picture, lora: Lora, digest: str, *, tells: bool) -> LoraProof:
    """Whether a picture was drawn with a LoRA.

    Args:
        picture: what was drawn.
        lora: the LoRA's entry in the WebUI's list.
        digest: ``data_hash`` of its file.
        tells: whether the WebUI is set to tell the hashes of LoRAs.

    Raises:
        Stale: it was drawn with another file of that name.
        NotTaken: it was drawn without it.
    """
    told = hashes_of(picture)
    # A1111 leaves out what parts its entries; strange white space may stand around a name.
    name = lora.name.replace(",", "").strip()
    if name not in told:
        if told or (tells and picture.model_hash is not None):
            raise NotTaken(f"The WebUI drew without {lora.name}, which it lists: its log says why.")
        return LoraProof("name", picture)
    if told[name] != digest[:DIGITS]:
        raise Stale(
            f"The WebUI serves an older file of the name {lora.name}: it drew with {told[name]}, and the file's hash "
            f"is {digest[:DIGITS]}. Restart the WebUI."
        )
    return LoraProof("picture", picture)


def hashes_of(picture: Picture) -> dict[str, str]:
    """The LoRAs that a picture says it was drawn with: name → 12 hex digits."""
    parameters = picture.info.get("extra_generation_params")
    text = parameters.get(_HASHES, "") if isinstance(parameters, dict) else ""
    rows = (row.rpartition(":") for row in str(text).split(",") if ":" in row)
    return {name.strip(): digest.strip() for name, _, digest in rows}
