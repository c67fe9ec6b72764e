"""More steps from a finished run (``continue:``): its model is the base, and what is left open stays as it was.

Weights only, as in fast-stable-diffusion: a finished run has given its optimizer up, and its steps began at a rate that
the new ones begin at again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from handlers.convert.cast import decode
from handlers.convert.lora import read_lora
from handlers.convert.pieces import exactly
from handlers.convert.plan import Located
from handlers.models import catalogue
from handlers.models.registry import Model
from handlers.train.auto import Plan
from handlers.train.base import BaseModel, find_base, unpacked
from sessions.layout import RUNS
from sessions.refusal import Refusal
from sessions.spec import LoraSpec, TrainSpec


def plan_of_run(session: Path, continued: Mapping[str, Any]) -> Plan | None:
    """The plan of the run that is trained on from; None for a model that somebody else made.

    Raises:
        Refusal: code ``spec``: its run.json cannot be read.
    """
    run = str(continued["run"])
    if not run:
        return None
    try:
        return Plan.from_json(json.loads((session / RUNS / run / "run.json").read_bytes())["plan"])
    except (OSError, ValueError, KeyError, TypeError):
        raise Refusal(
            "spec",
            f"runs/{run}/run.json, which says how that run was trained, cannot be read.",
            "Leave continue out and name the model as base: put its file under Models/.",
        ) from None


def base_of_run(session: Path, continued: Mapping[str, Any], models: Path | None, cache: Path) -> BaseModel:
    """What more steps of a run begin with: its finished model; for an adapter, the base below it.

    Args:
        session: the session's folder.
        continued: ``run`` and ``model``, a file in the session.
        models: the tree's Models folder, or None.
        cache: the worker's cache folder.

    Raises:
        Refusal: its file is gone or broken.
        Waiting: there is no room to unpack it, or an adapter's base is not on this machine.
    """
    plan = plan_of_run(session, continued)
    file = _model_of(session, continued)
    if plan is None:
        return find_base(file.name, session, cache)
    if plan.is_adapter:
        return find_base(plan.base, models, cache)
    origin = catalogue.BUILT_IN if plan.miniature else f"{RUNS}/{continued['run']}"
    model = Model(
        file.stem, plan.family, "checkpoint", file, plan.resolution, file.stat().st_size, origin, present=True
    )
    return BaseModel(model, unpacked(model, None, cache))


def _model_of(session: Path, continued: Mapping[str, Any]) -> Path:
    file = session / str(continued["model"])
    if not file.is_file():
        raise Refusal("spec", f"The model {file.name} is gone.", "Put it back, or leave continue out.")
    return file


def adapter_of_run(session: Path, continued: Mapping[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
    """The adapter that a run made, by component and peft's names, in float32; nothing where it made a whole model.

    Args:
        session: the session's folder.
        continued: ``run`` and ``model``, a file in the session.

    Raises:
        Refusal: its file is gone or broken.
    """
    plan = plan_of_run(session, continued)
    if plan is None or not plan.is_adapter:
        return {}
    lora = read_lora(_model_of(session, continued), variants=("dora",))
    found: dict[str, dict[str, torch.Tensor]] = {}
    for pair in lora.pairs:
        halves = {".lora_A.weight": pair.down, ".lora_B.weight": pair.up, ".lora_magnitude_vector": pair.scale}
        for ending, located in halves.items():
            if located is not None:
                found.setdefault(pair.module.part, {})[pair.module.path + ending] = _tensor(located)
    return found


def _tensor(located: Located) -> torch.Tensor:
    with located.file.open("rb") as opened:
        raw = exactly(opened.fileno(), located.tensor.begin, located.tensor.length)
    values = decode(raw, located.tensor.dtype).astype("<f4")
    return torch.from_numpy(values.reshape(located.tensor.shape).copy())


def as_before(spec: TrainSpec, former: Plan | None) -> TrainSpec:
    """What train.yaml leaves open stays as the former run had it; its text encoder is left as it is.

    Args:
        spec: the train.yaml.
        former: the former run's plan; None for a model that somebody else made.

    Raises:
        Refusal: code ``spec``: the former run made an adapter, and this one asks for something else.
    """
    values = spec.to_json()
    if former is not None:
        before = {
            "instance": former.instance,
            "class": former.class_,
            "concept": former.concept,
            "resolution": former.resolution,
            "method": former.method,
        }
        values |= {key: value for key, value in before.items() if values[key] == "auto" and value}
        if former.is_adapter:
            values["lora"] = _same_adapter(spec, former)
    if values["text_encoder"]["steps"] == "auto":
        values["text_encoder"] = {**values["text_encoder"], "steps": 0}
    return TrainSpec.from_json(values)


def _same_adapter(spec: TrainSpec, former: Plan) -> dict[str, Any]:
    size = {"rank": former.lora_rank, "alpha": former.lora_alpha, "convolutions": former.lora_convolutions}
    fresh = LoraSpec().model_dump()
    other = [key for key, value in spec.lora.model_dump().items() if value not in (fresh[key], size[key])]
    if other or spec.method not in ("auto", former.method):
        asked = f"lora.{other[0]}" if other else f"method: {spec.method}"
        raise Refusal(
            "spec",
            f"continue goes on from a {former.method} of rank {former.lora_rank} and alpha {former.lora_alpha:g}, "
            f"and {asked} asks for another.",
            f"Leave {asked.partition(':')[0]} out, or leave continue out.",
        )
    return size
