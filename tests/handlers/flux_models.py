"""Tiny Flux bases under Models/, for the tests of training: real classes, random weights, a T5 tokenizer of letters."""

from __future__ import annotations

import string
from pathlib import Path

from transformers import T5TokenizerFast

from tests.handlers import convert_models

DEV, SCHNELL = "tiny-dev", "tiny-schnell"


def letters() -> T5TokenizerFast:
    """T5's tokenizer, which knows letters and few words."""
    known = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁a", -2.5), ("▁photo", -4.0)]
    known += [(letter, -3.0) for letter in string.ascii_letters + string.digits + ",.-"]
    return T5TokenizerFast(vocab=known, extra_ids=0)


def build(name: str, models: Path) -> Path:
    """Write a tiny base as ``Models/<name>``; returns its folder."""
    return convert_models.save(lambda: convert_models.flux(guided=name == DEV, words=letters()), models / name)
