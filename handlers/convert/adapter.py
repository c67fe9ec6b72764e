"""A trained adapter → the one file that WebUIs read, with kohya's metadata, proven before it gets its name.

SD's is in kohya's layout; Flux' in the dotted names of diffusers and peft, with kohya's ``.alpha`` beside each pair:
kohya's flat names of Flux speak of layers that hold q, k and v together, where an adapter has a pair for each.

The source is what a run with ``method: lora`` or ``dora`` leaves: diffusers' file of tensors, and ``adapter.json``.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from handlers.convert.ask import Converted, Progress, Verify, check_room, counted, dtype_of, silent
from handlers.convert.lora import Lora, Pair, read_lora
from handlers.convert.lora_layout import plan_lora
from handlers.convert.lora_names import LORA_FAMILIES
from handlers.convert.plan import Entry, Located, as_type, whole
from handlers.convert.single import modelspec
from handlers.convert.source import Pipeline
from handlers.convert.verify import Pair as Compared
from handlers.convert.verify import Unproven, compare_all, compare_samples
from handlers.convert.write import write_safetensors
from handlers.large_imports import large_imports
from sessions import files
from sessions.layout import lora_prompt
from sessions.refusal import Refusal

if TYPE_CHECKING:
    from handlers.train.base import BaseModel

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
"""What diffusers' ``load_lora_weights`` looks for in a folder."""
ADAPTER_FACTS = "adapter.json"
_VARIANTS = ("dora",)
# What kohya's scripts call the bases; A1111 sorts LoRAs by it.
_BASES = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0", "flux": "flux1"}
_AGAIN = "Train again: save train.yaml once more."


@dataclass(frozen=True)
class AdapterFacts:
    """What ``adapter.json`` says.

    Attributes:
        method: ``lora`` or ``dora``.
        base: the name of the model that it was trained on.
        pipeline: family, prediction and resolution of that base; its folder is the adapter's.
        rank, alpha: of all its pairs.
        convolutions: whether a UNet's convolutions have pairs.
        parts: the components that it changes.
        is_schnell: whether the base is a FLUX.1 [schnell].
    """

    method: str
    base: str
    pipeline: Pipeline
    rank: int
    alpha: float
    parts: tuple[str, ...]
    convolutions: bool = False
    is_schnell: bool = False


def is_adapter(folder: Path) -> bool:
    """Whether a trained adapter lies in a folder."""
    return (folder / ADAPTER_FACTS).is_file()


def read_facts(folder: Path) -> AdapterFacts:
    """Read ``adapter.json``.

    Raises:
        Refusal: code ``source``: it is damaged, or of a family that has no adapters.
        OSError: it cannot be read.
    """
    try:
        value = json.loads((folder / ADAPTER_FACTS).read_bytes())
        family, prediction = str(value["family"]), str(value.get("prediction", "epsilon"))
        facts = AdapterFacts(
            str(value["method"]),
            str(value["base"]),
            Pipeline(folder, family, prediction, "base", int(value.get("resolution", 512))),
            int(value["rank"]),
            float(value["alpha"]),
            tuple(map(str, value["parts"])),
            value.get("convolutions") is True,
            bool(value.get("schnell")),
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Refusal("source", f"The {ADAPTER_FACTS} of {folder.name} is damaged.", _AGAIN) from None
    if family not in LORA_FAMILIES:
        raise Refusal(
            "source", f"{folder.name} holds an adapter of {family}.", "SD 1, SD 2, SDXL and Flux are converted."
        )
    return facts


def convert_adapter(
    source: Path,
    output: Path,
    *,
    dtype: str | None = None,
    metadata: Mapping[str, object] | None = None,
    verify: Verify = "sample",
    base: BaseModel | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> Converted:
    """Convert a trained adapter to one file in kohya's layout; it appears whole and proven, or not at all.

    Args:
        source: the folder with ``adapter.json``.
        output: the ``.safetensors`` file to make.
        dtype: fp32, fp16 or bf16; None keeps each tensor's type.
        metadata: title, date, trigger_phrase … for the header.
        verify: ``header``, ``sample`` or ``all`` (the file is read again and compared with its source), or ``forward``
            (``all``, then the base computes with it what it computes with the source; imports torch). Without its
            base, or memory for it, ``forward`` becomes ``all``.
        base: what it was trained on; None where that is not on this machine any more.
        device: for ``forward``.
        progress: called with (bytes done, bytes in all, what is done); may raise to stop.

    Raises:
        Refusal: the source cannot be converted.
        Waiting: there is too little room on the disk.
        Unproven: the written file is not the source; it was removed.
        OSError: reading or writing failed.
    """
    began = time.monotonic()
    wanted = dtype_of(dtype)
    if output.suffix != ".safetensors":
        raise Refusal("output", f"{output.name} is no .safetensors file.", "Give the output the ending .safetensors.")
    facts = read_facts(source)
    lora = read_lora(source / ADAPTER_FILE, _VARIANTS)
    # An alpha that is written in another type may be another number.
    plan = [as_type([entry], wanted)[0] if entry.pieces else entry for entry in _planned(lora, facts)]
    total = sum(entry.length for entry in plan)
    check_room(output.parent, total)
    wrote = counted(progress, total)
    with files.atomic_path(output) as temporary:
        write_safetensors(temporary, plan, adapter_header(facts, metadata or {}), wrote)
        progress(total, total, "checking")
        prove(read_lora(temporary, _VARIANTS), lora, verify)
        if verify == "forward" and base is not None:
            with large_imports():  # torch: only for this proof
                from handlers.convert.adapter_forward import compare_adapters

            progress(total, total, "checking that it computes the same")
            if not compare_adapters(temporary, source / ADAPTER_FILE, base, facts, device):
                verify = "all"
        size = temporary.stat().st_size
    verified = "all" if verify == "forward" and base is None else verify
    return Converted(output, facts.pipeline, size, len(plan), verified, time.monotonic() - began)


def _planned(lora: Lora, facts: AdapterFacts) -> list[Entry]:
    parts = {pair.module.part for pair in lora.pairs}
    if parts != set(facts.parts):
        what = f"{lora.path.parent.name} changes {' and '.join(sorted(parts))}, not {' and '.join(facts.parts)}."
        raise Refusal("source", what, _AGAIN)
    return plan_lora(lora, "kohya", facts.pipeline.family)


def adapter_header(facts: AdapterFacts, extra: Mapping[str, object]) -> dict[str, str]:
    """The metadata of the file: modelspec's fields, and kohya's, by which WebUIs know what it is for.

    Args:
        facts: of the adapter.
        extra: title, date, trigger_phrase …, as ``single.modelspec`` takes them.
    """
    spoken = modelspec(facts.pipeline, extra)
    family = facts.pipeline.family
    is_v = facts.pipeline.prediction == "v"
    of_convolutions = {"conv_dim": str(facts.rank), "conv_alpha": f"{facts.alpha:g}"}
    architecture = spoken["modelspec.architecture"].replace("dev", "schnell" if facts.is_schnell else "dev")
    return {
        **spoken,
        "modelspec.architecture": f"{architecture}/lora",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(facts.rank),
        "ss_network_alpha": f"{facts.alpha:g}",
        **({"ss_network_args": json.dumps(of_convolutions)} if facts.convolutions else {}),
        "ss_base_model_version": _BASES[family] + ("_v" if is_v and family != "sdxl" else ""),
        "ss_v2": str(family == "sd2"),
        "ss_sd_model_name": facts.base,
        "fastsd.method": facts.method,
    }


def lora_facts(facts: AdapterFacts, payload: Mapping[str, Any]) -> dict[str, Any]:
    """What is to be known of a LoRA besides what is of every model: how it is asked for, and what it was trained on."""
    trigger = (payload.get("metadata") or {}).get("trigger_phrase")
    variant = facts.method if facts.method in _VARIANTS else None
    return {"model_kind": "lora", "variant": variant, "base": facts.base, "trigger": trigger}


def lora_sidecar(stem: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the file beside a LoRA says of it; the last two keys are those that A1111 and Forge look for there."""
    trigger = str(facts["trigger"] or "")
    return {
        "kind": facts["model_kind"],
        "variant": facts["variant"],
        "base": facts["base"],
        "prompt": lora_prompt(stem, trigger),
        "activation text": trigger,
        "preferred weight": 1.0,
    }


def prove(made: Lora, wanted: Lora, verify: Verify) -> None:
    """Compare a written adapter, translated back into modules and pairs, with its source.

    Raises:
        Unproven: a module, a strength or a value differs.
    """
    have = {pair.module: pair for pair in made.pairs}
    if have.keys() != {pair.module for pair in wanted.pairs} or len(made.pairs) != len(wanted.pairs):
        raise Unproven("the written LoRA changes other modules than its source")
    pairs: list[Compared] = []
    for pair in wanted.pairs:
        label = f"{pair.module.part}.{pair.module.path}"
        other = have[pair.module]
        if other.alpha != pair.alpha:
            raise Unproven(f"the alpha of {label} is {other.alpha:g}, not {pair.alpha:g}")
        ours, theirs = _halves(other), _halves(pair)
        if ours.keys() != theirs.keys():
            raise Unproven(f"{label} has {' and '.join(ours)}, its source {' and '.join(theirs)}")
        pairs += [_compared(f"{label} {half}", ours[half], theirs[half]) for half in theirs]
    if verify == "sample":
        compare_samples(pairs)
    elif verify in ("all", "forward"):
        compare_all(pairs)


def _halves(pair: Pair) -> dict[str, Located]:
    halves = {"down": pair.down, "up": pair.up}
    return halves if pair.scale is None else {**halves, "scale": pair.scale}


def _compared(label: str, made: Located, wanted: Located) -> Compared:
    tensor, shape = made.tensor, wanted.tensor.shape
    # A DoRA's lengths are one number a row in either layout: (rows), (1, rows, 1, 1) or (rows, 1, …).
    fits = math.prod(tensor.shape) == math.prod(shape) if label.endswith(" scale") else tensor.shape == shape
    if not fits:
        raise Unproven(f"{label} has the shape {tensor.shape}, not {shape}")
    return whole(label, made), wanted
