"""From the ``webui`` settings to a client that speaks to it. Light, because the daemon uses it as well."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from handlers.publish.ask import CREDENTIALS, A1111Client, NotImplementedYet, NotReady
from handlers.publish.kinds import A1111_KINDS, LATER_KINDS


def credentials_from(environment: Mapping[str, str]) -> tuple[str | None, str | None]:
    """User and password from ``FASTSD_WEBUI_AUTH=user:password``; (None, None) where it is not set."""
    user, colon, password = environment.get(CREDENTIALS, "").partition(":")
    return (user, password) if colon else (None, None)


def connect(settings: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> A1111Client:
    """A client for the ``webui`` settings.

    Args:
        settings: ``kind``, ``url`` and, where the environment has no credentials, ``user`` and ``password``.
        environment: where ``FASTSD_WEBUI_AUTH`` may stand.

    Raises:
        NotImplementedYet: the kind is one that fastsd does not speak to yet.
        ValueError: the kind or the address is none.
    """
    kind = str(settings.get("kind", "auto"))
    if kind in LATER_KINDS:
        raise NotImplementedYet(
            f"webui.kind: {kind} is not supported yet: set it to a1111, forge or none in fastsd.yaml."
        )
    if kind != "auto" and kind not in A1111_KINDS:
        message = f"webui.kind must be auto, a1111 or forge to ask a WebUI, not {kind!r}"
        raise ValueError(message)
    user, password = credentials_from(environment)
    if user is None:
        user, password = settings.get("user"), settings.get("password")
    return A1111Client(str(settings.get("url", "http://127.0.0.1:7860")), user, password)


def probe(client: A1111Client) -> None:
    """Find out, for ``kind: auto``, whether what answers speaks this API.

    Raises:
        Absent, NotReady, Unauthorised, Failed: as the calls of the client do.
        NotImplementedYet: it is a ComfyUI.
    """
    try:
        client.activity()
    except NotReady:
        if client.is_comfyui():
            raise NotImplementedYet(
                f"What answers at {client.url} is a ComfyUI, which is not supported yet: copy the model by hand, or "
                "set webui.kind: none in fastsd.yaml."
            ) from None
        raise
