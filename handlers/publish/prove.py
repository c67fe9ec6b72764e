"""Proof that a WebUI serves a model: a small picture that says which file it was drawn with.

That the WebUI accepted the choice proves nothing: A1111 keeps its old model when the new one cannot be loaded, and
Forge has not tried yet. When a model is not taken, the previous one is chosen again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from handlers.publish.ask import A1111Client, Absent, Failed, Model, NotReady, Picture, WebUIError

PROMPT = "a photo"
SIZE = 64
SEED = 7


class NotTaken(Exception):  # noqa: N818 - it names the situation
    """The WebUI does not draw with the model. ``str()`` says why, and what it draws with now."""


@dataclass(frozen=True)
class Proof:
    """What shows that the model is served.

    Attributes:
        picture: the picture.
        kind: ``picture``: its hash is the file's; ``name``: the WebUI hashes nothing, its name is the file's.
    """

    picture: Picture
    kind: Literal["picture", "name"]


def draw(client: A1111Client, prompt: str = PROMPT) -> Picture:
    """One step, 64 × 64 pixels, a fixed seed: the cheapest picture that a model can draw."""
    return client.txt2img(prompt, steps=1, width=SIZE, height=SIZE, seed=SEED)


def judge(picture: Picture, model: Model, sha256: str) -> Proof:
    """Whether a picture was drawn with a model.

    Args:
        picture: what was drawn.
        model: the model's entry in the WebUI's list.
        sha256: of its file.

    Raises:
        NotTaken: it was drawn with another one.
    """
    if picture.model_hash is None and picture.model_name == model.model_name:
        return Proof(picture, "name")
    if picture.model_hash == sha256[:10]:
        return Proof(picture, "picture")
    drew_with = f"{picture.model_name} [{picture.model_hash}]"
    if picture.model_name == model.model_name:
        raise NotTaken(
            f"it serves an older file of the name {model.model_name}: it drew with {drew_with}, and the file's hash is "
            f"{sha256[:10]}. Restart the WebUI"
        )
    raise NotTaken(f"it kept another model: it drew with {drew_with} and not with {model.model_name} [{sha256[:10]}]")


def choose_and_prove(
    client: A1111Client,
    model: Model,
    sha256: str,
    until_back: Callable[[], bool],
) -> Proof:
    """Choose a model, draw with it, and go back to the previous one when that fails.

    Args:
        client: the WebUI.
        model: the entry to choose.
        sha256: of its file.
        until_back: waits for a WebUI that has just gone away; False when it stays away.

    Raises:
        NotTaken: the WebUI does not draw with the model.
        Absent: the WebUI went away and did not come back.
        handlers.publish.ask.WebUIError: it could not be asked for what it serves now.
    """
    back_to = _name_of_chosen(client)
    if back_to == model.model_name:
        back_to = None
    try:
        client.switch(model.model_name)
        return judge(draw(client), model, sha256)
    except (Failed, NotTaken) as error:
        reason = str(error)
    except (Absent, NotReady) as error:
        if not until_back():
            raise
        reason = f"it went away while it loaded the model ({error})"
    reason = reason.rstrip(".")
    raise NotTaken(
        f"The WebUI at {client.url} does not take {model.model_name}: {reason}. {_go_back(client, back_to, model)}"
    )


def _name_of_chosen(client: A1111Client) -> str | None:
    """The name of the chosen model: unlike its title, a WebUI that starts anew knows it too."""
    title = client.chosen()
    names = (model.model_name for model in client.models() if title in (model.title, model.model_name))
    return next(names, title)


def _go_back(client: A1111Client, name: str | None, failed: Model) -> str:
    """Choose the previous model again and draw with it. Returns the sentence that says how that went."""
    if name is None:
        return "Its log says more."
    try:
        client.switch(name)
        try:
            draw(client)
        except Failed:
            # After a failed load Forge cannot load the previous model either until a third one was chosen.
            _detour(client, name, failed)
    except WebUIError as error:
        return f"Its previous model, {name}, could not be chosen again either: restart it. ({error})"
    return f"It has its previous model again, {name}; its log says more."


def _detour(client: A1111Client, name: str, failed: Model) -> None:
    """Draw with ``name`` after having chosen some third model.

    Raises:
        Failed: no way leads back.
    """
    for model in client.models():
        if model.model_name in (name, failed.model_name):
            continue
        client.switch(model.model_name)
        try:
            draw(client)
        except Failed:
            continue
        client.switch(name)
        draw(client)
        return
    raise Failed("it draws with no model any more")
