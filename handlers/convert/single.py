"""Diffusers folder → one file, ``.safetensors`` or ``.ckpt``, streamed and proven."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from handlers.convert import families
from handlers.convert.ask import Converted, Progress, Verify, check_room, counted, dtype_of, silent
from handlers.convert.checkpoint import write_checkpoint
from handlers.convert.exchange import read_vae
from handlers.convert.families import FAMILIES, Family
from handlers.convert.plan import Entry, Located, as_type, canonical, to_components, to_single, with_ties
from handlers.convert.source import Pipeline, locate, read_pipeline, tensors_of
from handlers.convert.verify import Unproven, compare_all, compare_samples, match
from handlers.convert.write import write_safetensors
from handlers.large_imports import large_imports
from sessions import files
from sessions.refusal import Refusal

Found = Mapping[str, Mapping[str, Located]]
_CONFIGS = Path(__file__).parent / "configs"
# A zip archive spends less than this on a member besides its bytes.
_MEMBER = 512


def convert(
    source: Path,
    output: Path,
    *,
    dtype: str | None = None,
    metadata: Mapping[str, object] | None = None,
    verify: Verify = "sample",
    vae: Path | Literal["keep", "none"] = "keep",
    device: str = "cpu",
    progress: Progress = silent,
) -> Converted:
    """Convert a Diffusers folder to one file; it appears whole and proven, or not at all.

    Args:
        source: the Diffusers folder.
        output: the file to make, ``.safetensors`` or ``.ckpt``.
        dtype: fp32, fp16 or bf16; None keeps each tensor's type.
        metadata: title, date, trigger_phrase … for the header.
        verify: how far to prove it: ``header``, ``sample`` (parts of every tensor), ``all`` (every byte), ``forward``
            (``all``, then loaded by diffusers and compared in weights and outputs; imports torch).
        vae: ``keep`` the model's own, ``none``: leave it out, or another one, a file or folder, to put in.
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
    if output.suffix not in (".safetensors", ".ckpt"):
        raise Refusal(
            "output",
            f"{output.name} is no .safetensors or .ckpt file.",
            "Give the output the ending .safetensors.",
        )
    pipeline = read_pipeline(source)
    family = FAMILIES[pipeline.family]
    found = read_folder(source, family)
    kept = [part.name for part in family.components]
    if vae != "keep":
        kept.remove("vae")
        own = found.pop("vae")
        if isinstance(vae, Path):
            found["vae"] = _fitting(vae, family, own)
    whole = with_ties(family.components, to_single(family.components, found, family.name))
    plan = [*as_type(whole, wanted), *_marks(pipeline)]
    total = sum(entry.length for entry in plan)
    check_room(output.parent, total + (_MEMBER * len(plan) if output.suffix == ".ckpt" else 0))
    wrote = counted(progress, total)
    with files.atomic_path(output) as temporary:
        if output.suffix == ".ckpt":
            write_checkpoint(temporary, plan, wrote)
        else:
            write_safetensors(temporary, plan, modelspec(pipeline, metadata or {}), wrote)
        progress(total, total, "checking")
        prove(temporary, family, found, verify)
        if verify == "forward":
            with large_imports():  # torch: only for this proof
                from handlers.convert.forward import compare_forward

            progress(total, total, "checking that it computes the same")
            compare_forward(temporary, source, family, device, names=kept)
        # Measured while it has no name yet: whoever sees the name may move the file at once.
        size = temporary.stat().st_size
        beside = _write_beside(pipeline, output)
    return Converted(output, pipeline, size, len(plan), verify, time.monotonic() - began, beside)


def _fitting(vae: Path, family: Family, own: Mapping[str, Located]) -> dict[str, Located]:
    """Another VAE, of the same shape as the model's own."""
    component = next(part for part in family.components if part.name == "vae")
    other = read_vae(vae, component)
    for name in sorted({*own, *other}):
        shapes = [tensors[name].tensor.shape if name in tensors else None for tensors in (own, other)]
        if shapes[0] != shapes[1]:
            raise Refusal(
                "source", f"{vae.name} differs from the model's own VAE in {name}.", "Name a VAE of its family."
            )
    return other


def read_folder(folder: Path, family: Family) -> dict[str, dict[str, Located]]:
    """Component → its tensors by canonical name.

    Raises:
        Refusal: weights are missing, torn or unsafe, or a tensor stands there twice.
    """
    return {part.name: canonical(part, locate(folder, part.name)) for part in family.components}


def prove(file: Path, family: Family, found: Found, verify: Verify) -> None:
    """Read a written file again, translate it back and compare it with its source.

    Raises:
        Unproven: it is another model.
        Refusal: code ``corrupt``: it is torn.
    """
    back, unknown = to_components(family.components, tensors_of(file))
    odd = [name for name in unknown if name not in (families.V_MARK, families.ZERO_SNR_MARK)]
    if odd:
        raise Unproven(f"{odd[0]} belongs to no component")
    pairs = match(back, found)
    if verify == "sample":
        compare_samples(pairs)
    elif verify in ("all", "forward"):
        compare_all(pairs)


def is_converted(source: Path, file: Path) -> bool:
    """Whether a file holds every byte of a Diffusers folder.

    Raises:
        Refusal: the folder cannot be converted.
        OSError: reading failed.
    """
    family = FAMILIES[read_pipeline(source).family]
    found = read_folder(source, family)
    try:
        prove(file, family, found, "all")
    except (Unproven, Refusal):
        return False
    return True


def _marks(pipeline: Pipeline) -> list[Entry]:
    """The empty tensors by whose names programs know an SDXL model that predicts the velocity (trap 5)."""
    if pipeline.family != "sdxl" or pipeline.prediction != "v":
        return []
    names = [families.V_MARK] + ([families.ZERO_SNR_MARK] if pipeline.zero_snr else [])
    return [Entry(name, "F32", (0,), ()) for name in names]


def _write_beside(pipeline: Pipeline, output: Path) -> tuple[Path, ...]:
    """The configuration of the same name by which A1111 and Forge know an SD 2 model that predicts the velocity."""
    if pipeline.family != "sd2" or pipeline.prediction != "v":
        return ()
    beside = output.with_suffix(".yaml")
    if beside.exists():
        return ()
    files.write_bytes(beside, (_CONFIGS / "sd2-v.yaml").read_bytes())
    return (beside,)


def modelspec(pipeline: Pipeline, extra: Mapping[str, object]) -> dict[str, str]:
    """The metadata of the file: ``format`` and the modelspec fields (version 1.0.0).

    Args:
        pipeline: what it is made of.
        extra: title, date, trigger_phrase …; names without a dot become ``modelspec.`` fields; null ones are left out.
    """
    family = FAMILIES[pipeline.family]
    side = "768-v" if pipeline.prediction == "v" else "512"
    architecture = f"{family.architecture}-{side}" if family.name == "sd2" else family.architecture
    if pipeline.variant != "base":
        architecture += f"/{pipeline.variant}"
    given = {key if "." in key else f"modelspec.{key}": str(value) for key, value in extra.items() if value is not None}
    prediction = {} if family.name == "flux" else {"modelspec.prediction_type": pipeline.prediction}
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.implementation": family.implementation,
        **prediction,
        "modelspec.resolution": f"{pipeline.resolution}x{pipeline.resolution}",
        **given,
    }
