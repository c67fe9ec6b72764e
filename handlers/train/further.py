"""More steps from a finished run (``continue:``): its model is the base, and what is left open stays as it was.

Weights only, as in fast-stable-diffusion: a finished run has given its optimizer up, and its steps began at a rate that
the new ones begin at again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from handlers.models import catalogue
from handlers.models.registry import Model
from handlers.train.auto import Plan
from handlers.train.base import BaseModel, unpacked
from sessions.layout import RUNS
from sessions.refusal import Refusal
from sessions.spec import TrainSpec


def plan_of_run(session: Path, continued: Mapping[str, Any]) -> Plan:
    """The plan of the run that is trained on from.

    Raises:
        Refusal: code ``spec``: its run.json cannot be read.
    """
    run = str(continued["run"])
    try:
        return Plan.from_json(json.loads((session / RUNS / run / "run.json").read_bytes())["plan"])
    except (OSError, ValueError, KeyError, TypeError):
        raise Refusal(
            "spec",
            f"runs/{run}/run.json, which says how that run was trained, cannot be read.",
            "Leave continue out and name the model as base: put its file under Models/.",
        ) from None


def base_of_run(session: Path, continued: Mapping[str, Any], cache: Path) -> BaseModel:
    """The finished model of a run as a base.

    Args:
        session: the session's folder.
        continued: ``run`` and ``model``, a file in the session.
        cache: the worker's cache folder.

    Raises:
        Refusal: the run made an adapter, or its file is gone or broken.
        Waiting: there is no room to unpack it.
    """
    plan = plan_of_run(session, continued)
    if plan.is_adapter:
        raise Refusal(
            "spec",
            f"The run {continued['run']} made a {plan.method}; training on from one comes with a later version.",
            "Train a new one with more unet.steps.",
        )
    file = session / str(continued["model"])
    if not file.is_file():
        raise Refusal("spec", f"The model {file.name} is gone.", "Put it back, or leave continue out.")
    origin = catalogue.BUILT_IN if plan.miniature else f"{RUNS}/{continued['run']}"
    model = Model(
        file.stem, plan.family, "checkpoint", file, plan.resolution, file.stat().st_size, origin, present=True
    )
    return BaseModel(model, unpacked(model, None, cache))


def as_before(spec: TrainSpec, former: Plan) -> TrainSpec:
    """What train.yaml leaves open stays as the former run had it; its text encoder is left as it is."""
    values = spec.to_json()
    before = {
        "instance": former.instance,
        "class": former.class_,
        "concept": former.concept,
        "resolution": former.resolution,
        "method": former.method,
    }
    values |= {key: value for key, value in before.items() if values[key] == "auto" and value}
    if values["text_encoder"]["steps"] == "auto":
        values["text_encoder"] = {**values["text_encoder"], "steps": 0}
    return TrainSpec.from_json(values)
