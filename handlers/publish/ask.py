"""Asking a WebUI: a small client of the API that A1111 and Forge share. Light, because the daemon uses it as well.

Every call blocks for at most its timeout; the daemon makes them in threads. What can go wrong is typed: nobody there
(``Absent``), not ready yet (``NotReady``), no right to ask (``Unauthorised``), or the WebUI says no (``Failed``).
"""

from __future__ import annotations

import base64
import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

CREDENTIALS = "FASTSD_WEBUI_AUTH"
_API = "/sdapi/v1"


class WebUIError(Exception):
    """A WebUI could not be asked, or said no. ``str()`` is a sentence for people."""


class Absent(WebUIError):  # noqa: N818 - it names the situation
    """Nobody answers at the address: connection refused or broken, or no answer in time."""


class NotReady(WebUIError):  # noqa: N818 - it names the situation
    """Something answers, but the API is not there (yet): 404, or 502 to 504 from a proxy."""


class Unauthorised(WebUIError):  # noqa: N818 - it names the situation
    """The API wants other credentials than these."""


class Failed(WebUIError):  # noqa: N818 - it names the situation
    """The API answered with an error, or with something that is no answer."""


class NotImplementedYet(WebUIError):  # noqa: N818 - it names the situation
    """A kind of WebUI that fastsd does not speak to yet."""


@dataclass(frozen=True)
class Model:
    """One entry of a WebUI's model list.

    Attributes:
        title: what the WebUI shows and accepts; changes once the file has been hashed.
        model_name: the name without folder and ending; stays, and is accepted as well.
        filename: the file, as the WebUI's process sees it.
        sha256: of the whole file, once the WebUI has computed it.
    """

    title: str
    model_name: str
    filename: str
    sha256: str | None = None


@dataclass(frozen=True)
class Lora:
    """One entry of a WebUI's list of LoRAs.

    Attributes:
        name: what a prompt calls it.
        filename: the file, as the WebUI's process sees it.
    """

    name: str
    filename: str


@dataclass(frozen=True)
class Picture:
    """What came of a txt2img request.

    Attributes:
        content: the picture file's bytes (PNG unless the WebUI is set otherwise).
        model_hash: the first ten hex digits of the SHA-256 of the model it was drawn with; None where hashing is off.
        model_name: that model's name.
        info: all that the WebUI says about it.
    """

    content: bytes
    model_hash: str | None
    model_name: str | None
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Activity:
    """What the WebUI is doing.

    Attributes:
        job: the running job's name, "" when there is none.
        job_count: pictures asked for; 0 when idle, -1 while a model is loading.
    """

    job: str
    job_count: int

    @property
    def idle(self) -> bool:
        """Nothing runs and nothing loads."""
        return self.job == "" and self.job_count == 0


class A1111Client:
    """Speaks to one A1111 or Forge.

    Args:
        url: its address, ``http://127.0.0.1:7860``.
        user, password: of ``--api-auth``; None without.
        timeout: seconds for calls that should return at once.

    Raises:
        ValueError: the address is none of http or https.
    """

    def __init__(self, url: str, user: str | None = None, password: str | None = None, timeout: float = 10.0) -> None:
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            message = f"webui.url must look like http://127.0.0.1:7860, not {url!r}"
            raise ValueError(message)
        self.url = url.rstrip("/")
        self.timeout = timeout
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if user is not None:
            token = base64.b64encode(f"{user}:{password or ''}".encode()).decode("ascii")
            self._headers["Authorization"] = f"Basic {token}"
        # A proxy of the environment is for the world outside, not for a WebUI beside us.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ready(self) -> bool:
        """Whether the API answers; a refusal of the credentials is an answer."""
        try:
            self.models()
        except (Absent, NotReady, Failed):
            return False
        except Unauthorised:
            return True
        return True

    def models(self) -> list[Model]:
        """The models that the WebUI lists."""
        rows = self._get(f"{_API}/sd-models")
        try:
            return [Model(row["title"], row["model_name"], row["filename"], row.get("sha256")) for row in rows]
        except (TypeError, KeyError, AttributeError) as error:
            raise Failed(
                f"The WebUI at {self.url} answered its list of models in a form that fastsd does not know."
            ) from error

    def loras(self) -> list[Lora]:
        """The LoRAs that the WebUI lists."""
        rows = self._get(f"{_API}/loras")
        try:
            return [Lora(row["name"], row["path"]) for row in rows]
        except (TypeError, KeyError, AttributeError) as error:
            raise Failed(
                f"The WebUI at {self.url} answered its list of LoRAs in a form that fastsd does not know."
            ) from error

    def refresh_loras(self, timeout: float = 600.0) -> None:
        """Have the folder of LoRAs read again; a WebUI that reads large files first takes its time."""
        self._post(f"{_API}/refresh-loras", {}, timeout)

    def refresh(self, timeout: float = 600.0) -> None:
        """Have the model folder read again. It waits behind a picture that is being drawn."""
        self._post(f"{_API}/refresh-checkpoints", {}, timeout)

    def options(self) -> Mapping[str, Any]:
        """The WebUI's settings."""
        value = self._get(f"{_API}/options")
        if not isinstance(value, dict):
            raise Failed(f"The WebUI at {self.url} answered its settings in a form that fastsd does not know.")
        return value

    def chosen(self) -> str | None:
        """The title of the model that is chosen; Forge may not have loaded it yet."""
        title = self.options().get("sd_model_checkpoint")
        return title if isinstance(title, str) and title else None

    def switch(self, title: str, timeout: float = 900.0) -> None:
        """Choose a model by its title or name.

        That it returns does not mean that the model is loaded: A1111 goes back to the old one silently when it cannot
        load, and Forge loads at the next picture. Only a picture proves it.

        Raises:
            Failed: no such model is listed.
        """
        self._post(f"{_API}/options", {"sd_model_checkpoint": title}, timeout)

    def txt2img(
        self,
        prompt: str,
        *,
        steps: int,
        width: int,
        height: int,
        seed: int,
        timeout: float = 900.0,
    ) -> Picture:
        """Draw one picture.

        Args:
            prompt: what to draw.
            steps: sampling steps.
            width: pixels.
            height: pixels.
            seed: the same seed gives the same picture.
            timeout: seconds; loading a model may be part of it.
        """
        request = {
            "prompt": prompt,
            "steps": steps,
            "width": width,
            "height": height,
            "seed": seed,
            "save_images": False,
            "do_not_save_samples": True,
            "do_not_save_grid": True,
        }
        answer = self._post(f"{_API}/txt2img", request, timeout)
        try:
            info = json.loads(answer["info"])
            content = base64.b64decode(answer["images"][0].rsplit(",", 1)[-1], validate=True)
            return Picture(content, info.get("sd_model_hash") or None, info.get("sd_model_name") or None, info)
        except (TypeError, KeyError, IndexError, ValueError, AttributeError) as error:
            raise Failed(f"The WebUI at {self.url} answered a request for a picture without one.") from error

    def activity(self) -> Activity:
        """What the WebUI is doing now."""
        answer = self._get(f"{_API}/progress?skip_current_image=true")
        try:
            state = answer["state"]
            return Activity(str(state["job"]), int(state["job_count"]))
        except (TypeError, KeyError, ValueError) as error:
            raise Failed(
                f"The WebUI at {self.url} answered its progress in a form that fastsd does not know."
            ) from error

    def idle(self) -> bool:
        """Whether it neither draws nor loads."""
        return self.activity().idle

    def memory(self) -> Mapping[str, Any]:
        """Bytes of RAM and GPU memory in use, as the WebUI tells them."""
        value = self._get(f"{_API}/memory")
        return value if isinstance(value, dict) else {}

    def folder(self) -> str | None:
        """The folder that ``--ckpt-dir`` names, or None."""
        return self._flag("ckpt_dir")

    def loras_folder(self) -> str | None:
        """The folder that ``--lora-dir`` names, or None."""
        return self._flag("lora_dir")

    def _flag(self, name: str) -> str | None:
        flags = self._get(f"{_API}/cmd-flags")
        value = flags.get(name) if isinstance(flags, dict) else None
        return value if isinstance(value, str) and value else None

    def unload(self, timeout: float = 120.0) -> None:
        """Have the model leave the GPU; the process keeps its CUDA context and RAM."""
        self._post(f"{_API}/unload-checkpoint", {}, timeout)

    def reload(self, timeout: float = 900.0) -> None:
        """Have the model return to the GPU after ``unload``."""
        self._post(f"{_API}/reload-checkpoint", {}, timeout)

    def interrupt(self) -> None:
        """End the picture that is being drawn."""
        self._post(f"{_API}/interrupt", {}, self.timeout)

    def kill(self) -> None:
        """End the WebUI's process, where ``--api-server-stop`` allows it; otherwise ``NotReady``."""
        try:
            self._post(f"{_API}/server-kill", {}, self.timeout)
        except Absent:
            return  # it died before it could answer: that is what was asked for

    def is_comfyui(self) -> bool:
        """Whether what answers here is a ComfyUI: it has another API, and no other WebUI has this page."""
        try:
            value = self._get("/system_stats")
        except WebUIError:
            return False
        return isinstance(value, dict) and "comfyui_version" in value.get("system", {})

    def _get(self, path: str) -> Any:
        return self._send(urllib.request.Request(self.url + path, headers=self._headers), self.timeout)  # noqa: S310 - http(s) only, see __init__

    def _post(self, path: str, body: Mapping[str, Any], timeout: float) -> Any:
        content = json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, content, self._headers, method="POST")  # noqa: S310 - as above
        return self._send(request, timeout)

    def _send(self, request: urllib.request.Request, timeout: float) -> Any:
        try:
            with self._opener.open(request, timeout=timeout) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error) from error
        except TimeoutError as error:
            raise Absent(f"The WebUI at {self.url} did not answer within {timeout:g} s.") from error
        except urllib.error.URLError as error:
            raise Absent(f"No WebUI answers at {self.url} ({error.reason}).") from error
        except (OSError, http.client.HTTPException) as error:
            raise Absent(f"The WebUI at {self.url} broke the connection off ({type(error).__name__}).") from error
        except ValueError as error:
            raise Failed(f"What answers at {self.url} is no WebUI's API: its answer is not JSON.") from error

    def _refused(self, error: urllib.error.HTTPError) -> WebUIError:
        if error.code in (401, 403):
            return Unauthorised(
                f"The WebUI at {self.url} asks for a user and a password: set the environment variable "
                f"{CREDENTIALS}=user:password to what its --api-auth says, and restart fastsd."
            )
        if error.code in (404, 405, 502, 503, 504):
            return NotReady(
                f"The API of the WebUI at {self.url} is not there (HTTP {error.code}): it is still starting, or it was "
                "started without --api."
            )
        return Failed(f"The WebUI at {self.url} answered with HTTP {error.code}: {_reason(error)}")


def _reason(error: urllib.error.HTTPError) -> str:
    """The most telling line of an error's body."""
    try:
        body = error.read(100_000)
    except (OSError, http.client.HTTPException):
        return str(error.reason)
    try:
        value = json.loads(body)
    except ValueError:
        return str(error.reason)
    if isinstance(value, dict):
        for key in ("errors", "detail", "error"):
            if value.get(key):
                return str(value[key])[:500]
    return str(error.reason)
