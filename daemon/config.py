"""fastsd.yaml: the settings of a tree. Every key is optional; what is wrong is told with line, reason and fix."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from handlers.models import segments
from sessions.documents import read_document
from sessions.layout import SETTINGS
from sessions.refusal import Refusal

_SECONDS = {"ms": 0.001, "s": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_FACTORS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}


def seconds(value: Any) -> float:
    """A length of time: a number of seconds, or "10s", "5min", "2h".

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf:
        return float(value)
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(ms|s|min|m|h|d)\s*", str(value))
    if not match:
        message = f"{value!r} is no length of time. Write for example 10s, 5min or 2h"
        raise ValueError(message)
    return float(match[1]) * _SECONDS[match[2]]


def quantity(value: Any) -> int:
    """A number with a factor: 200M, 5GB, 1500.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf:
        return int(value)
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]?)(?:i?b)?\s*", str(value).lower())
    if not match:
        message = f"{value!r} is no number. Write for example 200M or 5GB"
        raise ValueError(message)
    return int(float(match[1]) * _FACTORS[match[2]])


def language(value: Any) -> str:
    """A language's code: two or three small letters.

    Raises:
        ValueError: it is none.
    """
    # YAML 1.1 reads Norwegian's code as a truth value.
    code = "no" if value is False else str(value).strip().lower()
    if not re.fullmatch(r"[a-z]{2,3}", code):
        message = f"{value!r} is no language. Write codes of two or three letters, like [de, fr]"
        raise ValueError(message)
    return code


Languages = list[Annotated[str, BeforeValidator(language)]]
Seconds = Annotated[float, BeforeValidator(seconds)]
Quantity = Annotated[int, BeforeValidator(quantity)]
MaybeSeconds = Annotated[float | None, BeforeValidator(lambda value: None if value == "auto" else seconds(value))]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WatchKeys(_Settings):
    """``watch``: how the tree is looked at."""

    events: Literal["auto", "native", "scan"] = "auto"
    poll: Seconds = 10.0
    settle: Seconds = 2.0
    rescan: MaybeSeconds = None
    ignore: list[str] = Field(default_factory=list)


class CaptionKeys(_Settings):
    """``caption``: what the captioner is asked, and what becomes of its lines."""

    mode: Literal["brief", "detailed"] = "brief"
    prompt: str | None = None
    prefix: str = ""
    suffix: str = ""
    drop: list[str] = Field(default_factory=list)
    blacklist: list[str] = Field(default_factory=list)
    instance: str | None = None
    class_: str | None = Field(default=None, alias="class")
    concept: Literal["object", "face", "style"] = "object"
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8", "4bit"] = "auto"
    check: Literal["auto"] | bool = "auto"

    def parameters(self) -> dict[str, Any]:
        """What the text of a caption depends on, as far as it is no default: other parameters, other captions."""
        return self.model_dump(by_alias=True, exclude_defaults=True, exclude={"precision", "check"})


class WebUIKeys(_Settings):
    """``webui``: where finished models go."""

    kind: Literal["auto", "a1111", "forge", "sdnext", "comfyui", "sdcpp", "none"] = "auto"
    url: str = "http://127.0.0.1:7860"
    command: list[str] | None = None
    models: Path | None = None
    loras: Path | None = None
    switch: Literal["always", "idle", "announce"] = "idle"
    while_training: Literal["stop", "unload", "keep"] = "stop"


class LimitKeys(_Settings):
    """``limits``: what is refused before it does harm."""

    picture_pixels: Quantity = 200_000_000
    disk_reserve: Quantity = 5_000_000_000
    segment_memory: Quantity = segments.MEMORY


class Settings(_Settings):
    """Everything that fastsd.yaml can say."""

    captioner: str = "kosmos-2"
    base: str = "auto"
    gpus: Literal["each", "all"] = "each"
    search: str | None = None
    caption: CaptionKeys = CaptionKeys()
    watch: WatchKeys = WatchKeys()
    webui: WebUIKeys = WebUIKeys()
    limits: LimitKeys = LimitKeys()
    quiet_hours: str | None = None
    languages: Languages = Field(default_factory=list)
    translator: str = "m2m100"
    wandb: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^/\\#?%:\x00-\x1f]+$")] | None = None


class BadSettings(Exception):  # noqa: N818 - the refusal says what is wrong
    """The settings cannot be used.

    Attributes:
        file: the settings file.
        refusal: what is wrong with it.
    """

    def __init__(self, file: Path, refusal: Refusal) -> None:
        super().__init__(f"{file}: {refusal}")
        self.file = file
        self.refusal = refusal


def load_settings(root: Path, chosen: Path | None = None) -> Settings:
    """The settings of a tree: the file chosen with --config, else fastsd.yaml in the root, else the defaults.

    Raises:
        BadSettings: the file is chosen and absent, cannot be read, or says something wrong.
    """
    file = chosen or root / SETTINGS
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        if chosen is None:
            return Settings()
        raise BadSettings(file, Refusal("config", "There is no such file.", "Check --config.")) from None
    except OSError as error:
        advice = "Give the user that fastsd runs as the right to read it."
        raise BadSettings(file, Refusal("config", f"It cannot be read: {error.strerror}.", advice)) from None
    except UnicodeDecodeError as error:
        raise BadSettings(file, Refusal("config", f"It cannot be read: {error}.", "Save it as UTF-8 text.")) from None
    try:
        return read_document(text, Settings, "config")
    except Refusal as refusal:
        raise BadSettings(file, refusal) from None
