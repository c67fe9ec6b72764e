"""The families that can be trained: one small module each, behind ``interface.Family``."""

from __future__ import annotations

from handlers.train.families.flux import Flux
from handlers.train.families.interface import Embedded, Family
from handlers.train.families.sd import StableDiffusion
from handlers.train.families.sdxl import StableDiffusionXL

__all__ = ["FAMILIES", "Embedded", "Family", "family_of"]

FAMILIES: dict[str, Family] = {
    "sd1": StableDiffusion("sd1"),
    "sd2": StableDiffusion("sd2"),
    "sdxl": StableDiffusionXL(),
    "flux": Flux(),
}


def family_of(name: str) -> Family:
    """The family of a plan; models that nobody could tell the family of are read as SD 1."""
    return FAMILIES[name or "sd1"]
