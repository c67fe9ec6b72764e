"""The end of a run: a whole Diffusers folder, or adapters, in ``.fastsd/finished/<run>/``; or nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from handlers.convert.adapter import ADAPTER_FACTS, ADAPTER_FILE
from handlers.train.auto import Plan
from handlers.train.families import Family
from handlers.train.place import Place, folder_in
from handlers.train.trainable import Adapter
from sessions import files
from sessions.layout import PRIVATE

_FOLDER = "finished"


def finished_folder(session: Path, run: str) -> Path:
    """Where the finished model of a run lies."""
    return session / PRIVATE / _FOLDER / run


def write_finished(place: Place, run: str, family: Family, pipeline: Any, *, denoiser: Any, dtype: torch.dtype) -> Path:
    """Write the trained pipeline in ``dtype``; the modules are converted in place.

    Args:
        place: the session.
        run: the run's id.
        family: of the base.
        pipeline: gives VAE, tokenizers, scheduler, and the text encoders: trained, or the base's.
        denoiser: the trained UNet or transformer.
        dtype: of all weights.

    Returns:
        The folder.
    """
    for name in family.encoders:
        getattr(pipeline, name).to("cpu")
    whole = family.assemble(pipeline, denoiser.to("cpu"), pipeline.scheduler).to(dtype=dtype)

    def write(temporary: Path) -> None:
        whole.save_pretrained(temporary, safe_serialization=True)
        _forget_paths(temporary)

    return _publish(place, run, write)


def write_adapters(
    place: Place, run: str, pipeline: Any, adapters: Mapping[str, Adapter], *, plan: Plan, dtype: torch.dtype
) -> Path:
    """Write trained adapters as diffusers' ``pytorch_lora_weights.safetensors``, and ``adapter.json`` beside it.

    Args:
        place: the session.
        run: the run's id.
        pipeline: of the base; it knows how its adapters are written.
        adapters: name of the module → adapter.
        plan: the run's.
        dtype: of the tensors.

    Returns:
        The folder.
    """
    parts: dict[str, Any] = {}
    for name, adapter in adapters.items():
        parts[f"{name}_lora_layers"] = {key: value.to("cpu", dtype) for key, value in adapter.tensors().items()}
        parts[f"{name}_lora_adapter_metadata"] = adapter.config()
    facts = {
        "rank": plan.lora_rank,
        "alpha": plan.lora_alpha,
        "method": plan.method,
        "base": plan.base,
        "family": plan.family,
        "prediction": _prediction(pipeline.scheduler.config),
        "resolution": plan.resolution,
        "parts": sorted(adapters),
    }

    def write(temporary: Path) -> None:
        pipeline.save_lora_weights(temporary, safe_serialization=True, **parts)
        _order_header(temporary / ADAPTER_FILE)
        files.write_json(temporary / ADAPTER_FACTS, facts)

    return _publish(place, run, write)


def _prediction(config: Mapping[str, Any]) -> str:
    """What a schedule's model predicts: a flow's schedule does not say, since there is but one."""
    return {"v_prediction": "v", "epsilon": "epsilon"}.get(str(config.get("prediction_type")), "flow")


def _publish(place: Place, run: str, fill: Callable[[Path], None]) -> Path:
    """Fill the run's finished folder: whole and on the disk, or not there."""

    def write(session: Path) -> Path:
        parent = folder_in(session, PRIVATE, _FOLDER)
        files.sweep_temporaries(parent)
        final = parent / run
        temporary = files.temporary_name(final)
        temporary.mkdir()
        try:
            fill(temporary)
            files.sync_tree(temporary)
            if final.exists():
                shutil.rmtree(final)
            files.publish(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return final

    return place.write(write)


def _order_header(file: Path) -> None:
    """Put a safetensors header into one order: its writer's changes from process to process.

    The same header in another order has the same length; what is left over is filled with spaces, as the format allows.
    """
    with file.open("r+b") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
        ordered = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        if len(ordered) <= length:
            opened.seek(8)
            opened.write(ordered.ljust(length))


def _forget_paths(folder: Path) -> None:
    """Configurations remember from which path they were loaded; a model that travels should not."""
    for path in folder.rglob("*.json"):
        value = json.loads(path.read_bytes())
        if isinstance(value, dict) and "_name_or_path" in value:
            del value["_name_or_path"]
            files.write_json(path, value)
