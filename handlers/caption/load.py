"""Loading a captioner in a precision, or saying plainly why it cannot be."""

from __future__ import annotations

import importlib.util
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from handlers.caption.precision import CHOICES, Machine, Precision, choose
from handlers.context import Waiting
from handlers.free_memory import free_memory
from sessions.refusal import Refusal


@dataclass(frozen=True)
class Kind:
    """A kind of captioner.

    Attributes:
        name: by which ``fastsd models get`` fetches it.
        classes: what transformers' names of its classes begin with.
    """

    name: str
    classes: str

    @property
    def fetch(self) -> str:
        """The command that fetches it."""
        return f"fastsd models get {self.name}"

    def part(self, ending: str) -> Any:
        """One of its classes: ``Config``, ``Processor``, ``ForConditionalGeneration``."""
        return getattr(transformers, f"{self.classes}{ending}")


KOSMOS_2 = Kind("kosmos-2", "Kosmos2")
BLIP_2 = Kind("blip-2", "Blip2")
FLORENCE_2 = Kind("florence-2", "Florence2")
# By the model_type of config.json.
_KINDS = {"kosmos-2": KOSMOS_2, "blip-2": BLIP_2, "florence2": FLORENCE_2}
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


def kind_of(folder: Path) -> Kind:
    """What lies in a transformers folder; Kosmos-2 where it cannot be told: loading then says what is wrong."""
    try:
        settings = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return KOSMOS_2
    return _KINDS.get(str(settings.get("model_type")) if isinstance(settings, dict) else "", KOSMOS_2)


def load(folder: Path, device: str, precision: str = "auto", kind: Kind = KOSMOS_2) -> Loaded:
    """Load a transformers folder, without the network.

    Raises:
        Refusal: there is no such precision, or this machine cannot have it.
        Waiting: the folder cannot be loaded.
    """
    transformers_logging.disable_progress_bar()
    if precision not in CHOICES:
        raise Refusal("precision", f"There is no precision {precision!r}.", f"Choose one of: {', '.join(CHOICES)}.")
    try:
        processor = kind.part("Processor").from_pretrained(folder, local_files_only=True)
        parameters = _parameters(folder, kind)
        kept = choose(parameters, machine_of(device)) if precision == "auto" else _checked(precision, device)
        model = _model(folder, device, kept, kind)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise Waiting(
            f"The captioner in {folder} cannot be loaded ({error}). Fetch it again: {kind.fetch}",
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


def _parameters(folder: Path, kind: Kind) -> int:
    """How many weights a folder holds, from its configuration alone."""
    with torch.device("meta"):
        model = kind.part("ForConditionalGeneration")(
            kind.part("Config").from_pretrained(folder, local_files_only=True)
        )
    return sum(weight.numel() for weight in model.parameters())


def _model(folder: Path, device: str, precision: Precision, kind: Kind) -> Any:
    load_model = kind.part("ForConditionalGeneration").from_pretrained
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


def require_square(processor: Any, side: int, kind: Kind = KOSMOS_2) -> None:
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
            f"its boxes would be wrong. Fetch it again: {kind.fetch}",
            retry_after=300.0,
        )


def _lengths(size: dict[str, int | None]) -> dict[str, int]:
    return {name: length for name, length in size.items() if length is not None}
