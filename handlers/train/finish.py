"""The end of a run: a whole Diffusers folder in ``.fastsd/finished/<run>/``, or none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from handlers.train.place import Place, folder_in
from sessions import files
from sessions.layout import PRIVATE

_FOLDER = "finished"


def finished_folder(session: Path, run: str) -> Path:
    """Where the finished model of a run lies."""
    return session / PRIVATE / _FOLDER / run


def write_finished(place: Place, run: str, pipeline: Any, *, unet: Any, text_encoder: Any, dtype: torch.dtype) -> Path:
    """Write the trained pipeline in ``dtype``; the modules are converted in place.

    Args:
        place: the session.
        run: the run's id.
        pipeline: gives VAE, tokenizer and scheduler.
        unet: the trained UNet.
        text_encoder: the trained, or the base's, text encoder.
        dtype: of all weights.

    Returns:
        The folder.
    """
    whole = StableDiffusionPipeline(
        vae=pipeline.vae,
        text_encoder=text_encoder.to("cpu"),
        tokenizer=pipeline.tokenizer,
        unet=unet.to("cpu"),
        scheduler=pipeline.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(dtype=dtype)

    def write(session: Path) -> Path:
        parent = folder_in(session, PRIVATE, _FOLDER)
        files.sweep_temporaries(parent)
        final = parent / run
        temporary = files.temporary_name(final)
        temporary.mkdir()
        try:
            whole.save_pretrained(temporary, safe_serialization=True)
            _forget_paths(temporary)
            files.sync_tree(temporary)
            if final.exists():
                shutil.rmtree(final)
            files.publish(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return final

    return place.write(write)


def _forget_paths(folder: Path) -> None:
    """Configurations remember from which path they were loaded; a model that travels should not."""
    for path in folder.rglob("*.json"):
        value = json.loads(path.read_bytes())
        if isinstance(value, dict) and "_name_or_path" in value:
            del value["_name_or_path"]
            files.write_json(path, value)
