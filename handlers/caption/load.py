"""Loading a captioner in a precision, or saying plainly why it cannot be."""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import Kosmos2Config, Kosmos2ForConditionalGeneration, Kosmos2Processor
from transformers.utils import logging as transformers_logging

from handlers.caption.memory import free_memory
from handlers.caption.precision import CHOICES, Machine, Precision, choose
from handlers.context import Waiting
from sessions.refusal import Refusal

FETCH = "fastsd models get kosmos-2"
_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Loaded:
    """A captioner in memory.

    Attributes:
        model: in eval mode, on its device.
        processor: its processor.
        precision: how the weights are kept.
    """

    model: Any
    processor: Any
    precision: Precision


def load(folder: Path, device: str, precision: str = "auto") -> Loaded:
    """Load a transformers folder, without the network.

    Raises:
        Refusal: there is no such precision, or this machine cannot have it.
        Waiting: the folder cannot be loaded.
    """
    transformers_logging.disable_progress_bar()
    if precision not in CHOICES:
        raise Refusal("precision", f"There is no precision {precision!r}.", f"Choose one of: {', '.join(CHOICES)}.")
    try:
        processor = Kosmos2Processor.from_pretrained(folder, local_files_only=True)
        parameters = _parameters(folder)
        kept = choose(parameters, machine_of(device)) if precision == "auto" else _checked(precision, device)
        model = _model(folder, device, kept)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise Waiting(
            f"The captioner in {folder} cannot be loaded ({error}). Fetch it again: {FETCH}",
            retry_after=300.0,
        ) from error
    return Loaded(model, processor, kept)


def machine_of(device: str) -> Machine:
    """What ``auto`` goes by on this machine."""
    kind = torch.device(device).type
    bits = has_bitsandbytes()
    if kind == "cuda":
        free = int(torch.cuda.mem_get_info(device)[0])
        return Machine(kind, free, torch.cuda.get_device_capability(device) >= (8, 0), bits)
    return Machine("cpu", free_memory(), bitsandbytes=bits)


def has_bitsandbytes() -> bool:
    """Whether bitsandbytes is installed; it is not loaded."""
    return importlib.util.find_spec("bitsandbytes") is not None


def _checked(precision: str, device: str) -> Precision:
    on_gpu = torch.device(device).type == "cuda"
    if precision == "4bit" and not on_gpu:
        advice = "Use int8 here: it is the fast one on a CPU."
        raise Refusal("precision", "4-bit weights need an NVIDIA GPU, and this runs on the CPU.", advice)
    if precision in ("int8", "4bit") and on_gpu and not has_bitsandbytes():
        advice = "Install it with: pip install bitsandbytes. Or use fp16."
        raise Refusal("precision", f"{precision} on a GPU needs the package bitsandbytes.", advice)
    return precision  # type: ignore[return-value]


def _parameters(folder: Path) -> int:
    """How many weights a folder holds, from its configuration alone."""
    with torch.device("meta"):
        model = Kosmos2ForConditionalGeneration(Kosmos2Config.from_pretrained(folder, local_files_only=True))
    return sum(weight.numel() for weight in model.parameters())


def _model(folder: Path, device: str, precision: Precision) -> Any:
    load_model = Kosmos2ForConditionalGeneration.from_pretrained
    if precision in _TYPES:
        return load_model(folder, dtype=_TYPES[precision], local_files_only=True).eval().to(device)
    if torch.device(device).type == "cuda":
        from transformers import BitsAndBytesConfig

        packing = (
            BitsAndBytesConfig(load_in_8bit=True)
            if precision == "int8"
            else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float16)
        )
        return load_model(
            folder, dtype=torch.float16, quantization_config=packing, device_map={"": device}, local_files_only=True
        ).eval()
    return quantized(load_model(folder, dtype=torch.float32, local_files_only=True).eval())


def quantized(model: Any) -> Any:
    """The model with int8 weights in its linear layers; activations are quantized as they come, a tensor at a time.

    One scale for a whole batch's activations: what a picture gets may depend, in its last bits, on its company.
    """
    with warnings.catch_warnings():
        # Its successor, torchao, computes this 3 to 7 times slower than bf16 on a CPU without compilation. A torch that
        # lacks it altogether raises here, and the tests of this precision say so.
        warnings.filterwarnings("ignore", message="torch.ao.quantization is deprecated", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="torch.quantize_per_tensor", category=UserWarning)
        return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8, inplace=True)


def require_square(processor: Any, side: int) -> None:
    """Check that the processor stretches the whole picture to side × side, so that boxes map as x · width, y · height.

    A plain CLIP processor keeps the aspect and cuts the ends off instead, and says nothing.

    Raises:
        Waiting: it does not.
    """
    tools = processor.image_processor
    size, crop = dict(tools.size), dict(tools.crop_size or {})
    square = {"height": side, "width": side}
    stretched = tools.do_resize and _lengths(size) == square
    uncut = not tools.do_center_crop or _lengths(crop) == square
    if not (stretched and uncut):
        raise Waiting(
            f"The captioner's processor does not stretch pictures to {side} × {side} (size {size}, crop {crop}): "
            f"its boxes would be wrong. Fetch it again: {FETCH}",
            retry_after=300.0,
        )


def _lengths(size: dict[str, int | None]) -> dict[str, int]:
    return {name: length for name, length in size.items() if length is not None}
