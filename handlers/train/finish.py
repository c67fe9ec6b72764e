"""The end of a run: a whole Diffusers folder, or adapters, in ``.fastsd/finished/<run>/``; or nothing.

Intermediate models are written in the same way, from copies: training goes on with the modules.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from handlers.convert.adapter import ADAPTER_FACTS, ADAPTER_FILE
from handlers.train.families import Family
from handlers.train.place import Place, folder_in
from handlers.train.plan import Plan
from handlers.train.prompts import subject_of
from handlers.train.trainable import Adapter
from sessions import files
from sessions.layout import FINISHED, KEPT_FACTS


def finished_folder(session: Path, run: str) -> Path:
    """Where the finished model of a run lies, or an intermediate one by its name."""
    return session / FINISHED / run


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


def write_kept(
    place: Place,
    name: str,
    family: Family,
    pipeline: Any,
    *,
    denoiser: Any,
    dtype: torch.dtype,
    facts: Mapping[str, Any],
) -> Path:
    """Write the pipeline as it is now, as ``write_finished`` would; its modules stay as they are.

    Args:
        place: the session.
        name: of the intermediate model.
        family: of the base.
        pipeline: as it is now.
        denoiser: as it is now.
        dtype: of all weights.
        facts: for ``intermediate.json`` in the folder.

    Returns:
        The folder.
    """
    whole = family.assemble(pipeline, denoiser, pipeline.scheduler)
    for part, module in whole.components.items():
        if isinstance(module, torch.nn.Module):
            setattr(whole, part, copied(module, dtype))

    def write(temporary: Path) -> None:
        whole.save_pretrained(temporary, safe_serialization=True)
        _forget_paths(temporary)
        files.write_json(temporary / KEPT_FACTS, dict(facts))

    return _publish(place, name, write)


def copied(module: torch.nn.Module, dtype: torch.dtype) -> Any:
    """A copy of a module on the CPU with its floating-point tensors in ``dtype``, rounded as ``module.to`` would."""
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        value = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        memo[id(tensor)] = torch.nn.Parameter(value, requires_grad=False) if is_parameter else value
    # What stands in the memo takes its original's place: nothing is ever there twice in full precision.
    return copy.deepcopy(module, memo)


def write_adapters(
    place: Place,
    run: str,
    pipeline: Any,
    adapters: Mapping[str, Adapter],
    *,
    plan: Plan,
    dtype: torch.dtype,
    kept: Mapping[str, Any] | None = None,
) -> Path:
    """Write trained adapters as diffusers' ``pytorch_lora_weights.safetensors``, and ``adapter.json`` beside it.

    Args:
        place: the session.
        run: the run's id, or the name of an intermediate model.
        pipeline: of the base; it knows how its adapters are written.
        adapters: name of the module → adapter.
        plan: the run's.
        dtype: of the tensors.
        kept: for ``intermediate.json`` in the folder of an intermediate model.

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
        "convolutions": plan.lora_convolutions,
        "method": plan.method,
        "base": plan.base,
        "family": plan.family,
        "prediction": _prediction(pipeline.scheduler.config),
        "resolution": plan.resolution,
        "parts": sorted(adapters),
        **({"schnell": True} if plan.family == "flux" and not _is_guided(adapters) else {}),
    }

    def write(temporary: Path) -> None:
        pipeline.save_lora_weights(temporary, safe_serialization=True, **parts)
        _order_header(temporary / ADAPTER_FILE)
        files.write_json(temporary / ADAPTER_FACTS, facts)
        if kept is not None:
            files.write_json(temporary / KEPT_FACTS, dict(kept))

    return _publish(place, run, write)


def metadata_of(record: Mapping[str, Any], plan: Plan, steps: int) -> dict[str, Any]:
    """What the header of a model's file says of its run.

    Args:
        record: of run.json.
        plan: the run's.
        steps: that were done, over both stages.
    """
    return {
        "title": record.get("name"),
        "date": record["started_at"],
        "trigger_phrase": subject_of(plan.instance, plan.class_, record["inputs"][0]["source"]),
        "resolution": f"{plan.resolution}x{plan.resolution}",
        "fastsd.run": record["run"],
        "fastsd.base": plan.base,
        "fastsd.steps": steps,
        "fastsd.pictures": trained_on(record),
    }


def trained_on(record: Mapping[str, Any]) -> int:
    """How many pictures of the subject a run learns from."""
    return sum(not (entry.get("prior") or entry.get("held_out")) for entry in record["inputs"])


def _is_guided(adapters: Mapping[str, Adapter]) -> bool:
    """Whether a Flux is told a guidance, as [dev] is and [schnell] is not."""
    return any(adapter.module.config.guidance_embeds for adapter in adapters.values())


def _prediction(config: Mapping[str, Any]) -> str:
    """What a schedule's model predicts: a flow's schedule does not say, since there is but one."""
    return {"v_prediction": "v", "epsilon": "epsilon"}.get(str(config.get("prediction_type")), "flow")


def _publish(place: Place, run: str, fill: Callable[[Path], None]) -> Path:
    """Fill the run's finished folder: whole and on the disk, or not there."""

    def write(session: Path) -> Path:
        parent = folder_in(session, *FINISHED.split("/"))
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
