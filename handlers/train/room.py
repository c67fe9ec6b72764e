"""Whether there is room for a run: in the GPU's memory, and on the disk. Looked at before the first step."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

import torch

from handlers.free_memory import free_memory
from handlers.train import checkpoint, memory
from handlers.train.base import BaseModel
from handlers.train.fresh import DTYPES
from handlers.train.memory import GB, Load, Optimizer
from handlers.train.optimizers import usable_optimizers
from handlers.train.place import Place
from handlers.train.plan import Plan
from handlers.train.quantise import can_quantise
from handlers.train.trainable import adapted_layers
from sessions.refusal import Refusal
from sessions.spec import TrainSpec


def fitted(plan: Plan, spec: TrainSpec, base: BaseModel, devices: Sequence[str]) -> Plan:
    """The plan with means that fit the GPU, or what ``memory:`` names; on a CPU nothing need be saved by default.

    Raises:
        Refusal: code ``memory``: nothing fits.
    """
    wanted: Optimizer | None = None if spec.optimizer == "auto" else spec.optimizer
    card = gpu_bytes(devices[0])
    size = memory.bytes_named(spec.memory) or card
    if not size:
        return plan
    load = load_of(plan, base, len(devices))
    available = usable_optimizers()
    means = memory.choose(load, wanted, available, size)
    if means is None:
        needed = memory.least(load, wanted, available)
        who = "the GPU has" if spec.memory == "auto" else f"memory: {spec.memory} allows"
        raise Refusal(
            "memory",
            f"Training {plan.base} with method: {plan.method} at {plan.resolution} pixels"
            + (f" and {wanted}" if wanted else "")
            + f" takes about {needed / GB:.0f} GB of GPU memory; {who} {size / GB:.0f}.",
            "Write method: lora, or a smaller resolution or batch_size, into train.yaml."
            if not plan.is_adapter
            else "Write a smaller resolution or batch_size into train.yaml.",
        )
    return plan.with_means(means)


def load_of(plan: Plan, base: BaseModel, devices: int) -> Load:
    """What the stage of the run that takes most asks of memory."""
    counts = base.parameters()
    denoiser = counts[base.training.denoiser]
    encoders = sum(counts[name] for name in base.training.encoders) if plan.text_encoder_steps else 0
    if plan.is_adapter:
        parts = [base.training.denoiser, *(base.training.encoders if encoders else ())]
        trained, frozen = base.adapter_parameters(adapted_layers(plan, parts), plan.lora_rank), denoiser + encoders
    elif plan.is_one_stage or plan.train_unet_in_stage_1:
        trained, frozen = denoiser + encoders, 0
    else:
        trained, frozen = denoiser, 0  # the text encoders' stage, with the denoiser frozen, takes less
    if plan.has_teacher and not plan.is_adapter:
        frozen += denoiser
    return Load(
        family=plan.family,
        trained=trained,
        frozen=frozen,
        denoiser=denoiser,
        resolution=plan.resolution,
        pictures=plan.pictures_a_step,
        half=plan.precision != "fp32",
        adapter=plan.is_adapter,
        average=plan.ema,
        devices=devices,
        scales_loss=plan.precision == "fp16",
        quantises=plan.is_adapter and base.training.draws_from_embeddings and can_quantise(),
    )


def check_memory(base: BaseModel, plan: Plan) -> None:
    """Refuse to read a base that this machine's memory cannot hold: nothing would be raised, the process would end.

    Only of bases so large that it must be asked; their text encoders are read before, and are gone by then.

    Raises:
        Refusal: code ``memory``.
    """
    if not base.training.draws_from_embeddings:
        return
    needed = base.parameters()[base.training.denoiser] * DTYPES[plan.precision].itemsize
    free = free_memory()
    if needed > free:
        raise Refusal(
            "memory",
            f"{plan.base} takes {needed / GB:.0f} GB of the computer's memory while it is read; "
            f"{free / GB:.0f} are free.",
            "Close other programs, or use base: sdxl.",
        )


def gpu_bytes(device: str) -> int:
    """All memory of the GPU, 0 for a CPU."""
    return int(torch.cuda.mem_get_info(device)[1]) if device.startswith("cuda") else 0


def check_disk(place: Place, base: BaseModel, plan: Plan, reserve: int) -> None:
    """Refuse before the start what would fill the disk hours later: checkpoints, and models with their single files."""
    parts = [base.training.denoiser, *(base.training.encoders if plan.text_encoder_steps else ())]
    if plan.is_adapter:
        trained = base.adapter_parameters(adapted_layers(plan, parts), plan.lora_rank)
        written = trained
    else:
        counts = base.parameters()
        trained = sum(counts[name] for name in parts)
        written = sum(counts.values())
    # float32 weights, their average, and the optimizer's moments, in the newest two and the one being written.
    a_number = 4 + memory.MOMENTS[plan.optimizer] + (4 if plan.ema else 0)
    checkpoints = a_number * trained * (checkpoint.KEPT + 1)
    result = 2 * written * base.finished_dtype().itemsize
    count = len(plan.kept_steps)
    # The folder of an intermediate model goes once its file is proven; where nobody converts, all of them stand.
    kept = count * result
    needed = checkpoints + result + kept
    free = shutil.disk_usage(place.now()).free
    if free < needed + reserve:
        models = f", {kept / GB:.2f} for {count} intermediate model{'' if count == 1 else 's'}" if count else ""
        raise Refusal(
            "disk",
            f"Training {plan.base} needs {needed / GB:.2f} GB of disk "
            f"({checkpoints / GB:.2f} for checkpoints, {result / GB:.2f} for the model{models}); "
            f"{free / GB:.2f} GB are free"
            + (f", of which {reserve / GB:.2f} must stay free (limits.disk_reserve)." if reserve else "."),
            f"Make room and save train.yaml again{', or write a larger save_every' if count else ''}.",
        )
