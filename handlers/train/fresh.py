"""A denoiser of the base, as a run needs it."""

from __future__ import annotations

from typing import Any

import torch

from handlers.train.base import BaseModel
from handlers.train.plan import Plan
from handlers.train.quantise import quantise

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def fresh_denoiser(base: BaseModel, plan: Plan, device: str) -> Any:
    """A denoiser of the base: in float32 to be trained; to stand under an adapter, as coarse as it is computed with.

    Args:
        base: of the run.
        plan: the run's.
        device: where it will compute; what is quantised lies there already.
    """
    if not plan.is_adapter:
        return base.load_denoiser()
    denoiser = base.load_denoiser(DTYPES[plan.precision])
    return quantise(denoiser, device) if plan.quantised else denoiser
