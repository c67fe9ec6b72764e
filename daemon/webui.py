"""The WebUI as the daemon deals with it: supervised when fastsd.yaml has a command, else somebody else's or none."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from daemon.config import WebUIKeys
from daemon.state import State
from handlers.publish.kinds import LATER_KINDS

if TYPE_CHECKING:
    from daemon.services.webui import WebUISupervisor


class WebUIService:
    """Starts, stops and tells of the WebUI. Without a command it does nothing, and publishing asks for itself.

    Args:
        keys: ``webui`` of fastsd.yaml.
        supervisor: None where fastsd does not start the WebUI.
    """

    def __init__(self, keys: WebUIKeys, supervisor: WebUISupervisor | None) -> None:
        self._keys = keys
        self._supervisor = supervisor
        self._tasks: set[asyncio.Task[None]] = set()
        self._given_way = False

    @classmethod
    def of(
        cls,
        keys: WebUIKeys,
        state: State,
        environment: Mapping[str, str],
        *,
        changed: Callable[[], None],
    ) -> WebUIService:
        """The service that the settings ask for; nothing is started yet."""
        if keys.command is None or keys.kind in {"none", *LATER_KINDS}:
            return cls(keys, None)
        # Asking a WebUI takes modules that the daemon does without where there is none of ours.
        from daemon.services.webui import WebUISupervisor
        from handlers.publish.connect import connect

        supervisor = WebUISupervisor(
            keys.command,
            connect(keys.model_dump(mode="json"), environment),
            state.logs,
            mark=os.fspath(state.folder),
            environment=environment,
            on_change=lambda _: changed(),
        )
        return cls(keys, supervisor)

    async def start(self) -> None:
        """Have the WebUI running, if it is ours to run."""
        if self._supervisor is not None:
            await self._supervisor.start()

    async def stop(self) -> None:
        """End the WebUI that fastsd started."""
        if self._supervisor is not None:
            await self._supervisor.stop()

    async def kill(self) -> None:
        """End the WebUI that fastsd started, at once."""
        if self._supervisor is not None:
            await self._supervisor.kill()

    async def yield_gpu(self) -> None:
        """Before training: make room, as ``while_training`` says."""
        if self._supervisor is not None and not self._given_way:
            self._given_way = True
            await self._supervisor.yield_gpu(self._keys.while_training)

    def give_gpu_back(self) -> None:
        """After training: the WebUI returns, in the background."""
        if self._supervisor is not None and self._given_way:
            self._given_way = False
            task = asyncio.create_task(self._supervisor.resume())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def publish_gate(self) -> str | None:
        """Why nothing can be published now, or None."""
        if self._keys.kind in LATER_KINDS:
            return f"webui.kind: {self._keys.kind} is not supported yet: set it to a1111, forge or none in fastsd.yaml."
        if self._supervisor is None or self._supervisor.state.phase == "ready":
            return None
        if self._given_way:
            return "The model waits for the WebUI, which gave way to training and comes back after it."
        return f"The model waits for the WebUI. {self.describe()}"

    @property
    def is_coming(self) -> bool:
        """Whether a WebUI of ours is not there yet and will be."""
        if self._supervisor is None:
            return False
        return self._given_way or self._supervisor.state.phase in ("starting", "stopping", "crashed")

    def describe(self) -> str:
        """The WebUI's state in a sentence; "" where there is none of ours."""
        if self._supervisor is None:
            return ""
        state = self._supervisor.state
        return state.reason or f"It is {state.phase}."
