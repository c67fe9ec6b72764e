"""How A1111 and Forge lay their folders out. Light, because the daemon uses it as well."""

from __future__ import annotations

from pathlib import Path

_CHECKPOINTS = "Stable-diffusion"
_LORAS = "Lora"


def beside(checkpoints: Path) -> Path:
    """The folder of LoRAs of a WebUI that keeps its checkpoints in this one, or in one above it."""
    for folder in (checkpoints, *checkpoints.parents):
        if folder.name == _CHECKPOINTS:
            return folder.parent / _LORAS
    return checkpoints.parent / _LORAS
