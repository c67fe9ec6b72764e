"""One file → Diffusers folder, streamed and proven; configurations come with fastsd, so nothing needs the network."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from handlers.convert import configure
from handlers.convert.ask import Converted, Progress, Verify, Weights, check_room, counted, dtype_of, silent
from handlers.convert.families import FAMILIES, Family
from handlers.convert.lend import lend
from handlers.convert.plan import Entry, Located, as_type, to_components, to_single
from handlers.convert.recognise import Single, read_single
from handlers.convert.single import read_folder
from handlers.convert.source import Pipeline
from handlers.convert.verify import compare_all, compare_samples, match
from handlers.convert.write import write_safetensors
from handlers.large_imports import large_imports
from sessions import files
from sessions.refusal import Refusal


def convert_single(
    source: Path,
    output: Path,
    *,
    cache: Path,
    dtype: str | None = None,
    verify: Verify = "sample",
    like: Path | None = None,
    weights: Weights = "trained",
    device: str = "cpu",
    progress: Progress = silent,
) -> Converted:
    """Convert one file to a Diffusers folder; it appears whole and proven, or not at all.

    Args:
        source: a ``.safetensors`` file or a pickle.
        output: the folder to make.
        cache: the folder of downloaded models, which lend what the file lacks.
        dtype: fp32, fp16 or bf16; None keeps each tensor's type.
        verify: as in ``single.convert``.
        like: a Diffusers folder of the same shape to take configurations and tokenizers from; None: the family's own.
        weights: ``trained``, or the ``ema`` average of them that some files carry.
        device: for ``forward``.
        progress: as in ``single.convert``.

    Raises:
        Refusal: the source cannot be converted, or a part is missing; or something lies where the folder should.
        Waiting: there is too little room on the disk.
        Unproven: the written folder is not the source; it was removed.
        OSError: reading or writing failed.
    """
    began = time.monotonic()
    wanted = dtype_of(dtype)
    if output.exists():
        raise Refusal("output", f"{output.name} exists already.", "Name a folder that does not exist yet.")
    single = read_single(source, weights)
    family = FAMILIES[single.family]
    planned, unknown = to_components(family.components, single.tensors)
    if unknown:
        raise Refusal(
            "source",
            f"The tensor {unknown[0]} is not known in a model of the family {family.name}.",
            "Is it a model of another family, or several in one file?",
        )
    plan = {name: as_type(entries, wanted) for name, entries in planned.items()}
    total = sum(entry.length for entries in plan.values() for entry in entries)
    check_room(output.parent, total)
    wrote = counted(progress, total)
    temporary = files.temporary_name(output)
    try:
        configuration = configure.configuration_of(single, family, like)
        configure.write(configuration, temporary)
        for name, entries in plan.items():
            _write_component(temporary / name, family, name, entries, wrote)
        lend(temporary, family, [part.name for part in family.components if part.name not in plan], cache)
        progress(total, total, "checking")
        configure.check(temporary, family)
        _prove(temporary, family, single.tensors, plan, verify)
        if verify == "forward":
            _prove_forward(temporary, family, single, plan, device)
        size = sum(path.stat().st_size for path in temporary.rglob("*") if path.is_file())
        files.sync_tree(temporary)
        files.publish(temporary, output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    pipeline = Pipeline(
        output, family.name, single.prediction, single.variant, configuration.resolution, single.zero_snr
    )
    count = sum(len(entries) for entries in plan.values())
    return Converted(output, pipeline, size, count, verify, time.monotonic() - began)


def _write_component(
    folder: Path, family: Family, name: str, entries: list[Entry], wrote: Callable[[int], None]
) -> None:
    component = next(part for part in family.components if part.name == name)
    stem = "model" if name.startswith("text_encoder") else "diffusion_pytorch_model"
    folder.mkdir(exist_ok=True)
    renamed = [replace(entry, name=component.written(entry.name)) for entry in entries]
    write_safetensors(folder / f"{stem}.safetensors", renamed, {"format": "pt"}, wrote)


def _prove(
    folder: Path, family: Family, tensors: Mapping[str, Located], plan: Mapping[str, list[Entry]], verify: Verify
) -> None:
    """Translate the written folder back and compare it with the file, but for what no component takes over."""
    own = [part for part in family.components if part.name in plan]
    back = to_single(own, {name: found for name, found in read_folder(folder, family).items() if name in plan}, "")
    taken = {}
    for key, located in tensors.items():
        for part in own:
            found = part.match_single(key)
            if found and not part.is_dropped(key) and not part.is_ignored(key):
                name = found.single if part.rules else part.prefix + part.current(found.parts[0])
                if name not in taken or name == found.single:
                    taken[name] = located
                break
    pairs = match({family.name: back}, {family.name: taken})
    if verify == "sample":
        compare_samples(pairs)
    elif verify in ("all", "forward"):
        compare_all(pairs)


def _prove_forward(folder: Path, family: Family, single: Single, plan: Mapping[str, list[Entry]], device: str) -> None:
    """Diffusers reads the file itself, where it can: whole, and with the weights that were taken."""
    with large_imports():
        import torch

        from handlers.convert.forward import compare_forward

    if single.weights == "ema" or len(plan) != len(family.components):
        raise Refusal(
            "verify",
            f"{single.path.name} is not whole, or its averages are taken: diffusers' reader is no measure for that.",
            "Use --verify all.",
        )
    kinds = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    compare_forward(single.path, folder, family, device, dtype=kinds.get(plan[family.drawing.name][0].dtype))
