"""What a model file or folder is, told from headers, names and configurations: no torch, nothing is unpickled."""

from __future__ import annotations

import statistics
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from handlers.models import headers, pickles
from handlers.models.folders import FolderContents, folder_kind, read_folder
from handlers.models.headers import Header
from handlers.models.probe import Probe, probe
from sessions import files

__all__ = ["Inspection", "folder_kind", "inspect", "prediction_of", "with_hashes"]

# ComfyUI and Forge tell SD 2's v-prediction by the spread of this bias (checkpoints.md).
_V_BIAS = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
_V_SPREAD = 0.09
_PICTURE_HEAD = 24
_PREDICTIONS = {"epsilon": "epsilon", "v": "v", "v_prediction": "v", "v-prediction": "v", "flow": "flow"}


@dataclass(frozen=True)
class Inspection:
    """The row of ``fastsd inspect --json``.

    Attributes:
        file: the file or folder.
        kind, family, prediction: as in ``registry.Model``; None where they cannot be told.
        variant: base, inpainting, refiner, depth, dora …; None where there is none.
        format: safetensors, ckpt or diffusers; None for anything else.
        dtype: F16, BF16, F32 …, ``mixed`` for several; None where there are no weights.
        sha256: None until asked for (``with_hashes``), and for folders.
        autov2: its first ten digits, by which model managers know a file.
        safe: False if opening it the usual way could run code, or nobody can tell; None where it is no model.
        problems: sentences on what is wrong with it; whoever loads it will fail.
        parameters: how many numbers its tensors hold; None where only opening it would tell.
        layout: whose names a LoRA, a VAE or a part has: kohya, peft or diffusers; None where that is no question.
        metadata: what its header says of it; the preview picture in it as its size.
    """

    file: str
    kind: str | None = None
    family: str | None = None
    prediction: str | None = None
    variant: str | None = None
    format: str | None = None
    dtype: str | None = None
    sha256: str | None = None
    autov2: str | None = None
    safe: bool | None = None
    problems: list[str] = field(default_factory=list)
    parameters: int | None = None
    layout: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)


def inspect(path: Path) -> Inspection:
    """Look at a file or folder; what is wrong with it stands in ``problems``.

    Raises:
        OSError: it does not exist or cannot be read.
    """
    if path.is_dir():
        return _folder(path)
    with path.open("rb") as file:
        start = file.read(9)
    if not start:
        return Inspection(str(path), problems=["The file is empty."])
    suffix = path.suffix.lower()
    if suffix == ".safetensors" or (start[8:9] == b"{" and not start.startswith(b"PK")):
        return _safetensors(path)
    if start.startswith(b"PK") or suffix in {".ckpt", ".pt", ".pth", ".bin"}:
        return _checkpoint(path, zipped=start.startswith(b"PK"))
    return Inspection(
        str(path), problems=["It is neither a safetensors file, nor a checkpoint, nor a Diffusers folder."]
    )


def with_hashes(found: Inspection) -> Inspection:
    """The same with the file's SHA-256 and AutoV2; a folder has none."""
    path = Path(found.file)
    if not path.is_file():
        return found
    digest = files.sha256_of(path)
    return replace(found, sha256=digest, autov2=digest[:10])


def _safetensors(path: Path) -> Inspection:
    try:
        header = headers.read_header(path)
    except headers.HeaderError as error:
        return Inspection(str(path), format="safetensors", safe=True, problems=[f"The file is damaged: {error}."])
    found = probe({name: entry.shape for name, entry in header.tensors.items()})
    problems = _problems(found) if header.tensors else ["It holds no tensors."]
    return Inspection(
        str(path),
        kind=found.kind,
        family=found.family,
        prediction=prediction_of(path, header, found),
        variant=found.variant,
        format="safetensors",
        dtype=headers.dtype_of(header.tensors),
        safe=True,
        problems=problems,
        parameters=headers.parameters_of(header.tensors),
        layout=found.layout,
        metadata=_shown(header.metadata),
    )


def _shown(metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata without the kilobytes of pictures in them."""
    return {
        key: f"{value[:_PICTURE_HEAD]}… ({len(value):,} characters)" if value.startswith("data:") else value
        for key, value in metadata.items()
    }


def _checkpoint(path: Path, zipped: bool) -> Inspection:
    if not zipped:
        advice = "Open it once with a current torch in a place you trust, and save it as safetensors."
        old = f"It is a pickle of the old form, or damaged; what it would run cannot be told. {advice}"
        return Inspection(str(path), format="ckpt", safe=False, problems=[old])
    try:
        contents = pickles.read_contents(path)
    except pickles.ArchiveError as error:
        return Inspection(str(path), format="ckpt", safe=False, problems=[f"The file is damaged: {error}."])
    found = probe(dict.fromkeys(sorted(contents.strings)))
    problems = _problems(found)
    if contents.harmful:
        problems.append(f"It would run code when it is opened: {', '.join(contents.harmful[:8])}.")
    dtypes = {dtype for dtype in contents.dtypes if "F" in dtype}
    return Inspection(
        str(path),
        kind=found.kind,
        family=found.family,
        prediction=_said_beside(path) or _usual(found),
        variant=found.variant,
        format="ckpt",
        dtype=None if not dtypes else dtypes.pop() if len(dtypes) == 1 else "mixed",
        safe=not contents.harmful,
        problems=problems,
        layout=found.layout,
    )


def _folder(path: Path) -> Inspection:
    contents: FolderContents = read_folder(path)
    return Inspection(
        str(path),
        kind=contents.kind,
        family=contents.family,
        prediction=contents.prediction,
        variant=contents.variant,
        format="diffusers" if contents.kind == "diffusers" else None,
        dtype=contents.dtype,
        safe=contents.safe,
        problems=contents.problems,
        parameters=contents.parameters,
        layout=contents.layout,
    )


def _problems(found: Probe) -> list[str]:
    problems = [f"It has no {part}." for part in found.missing]
    return problems if found.kind else [*problems, "Its tensors are those of no model that fastsd knows."]


def prediction_of(path: Path, header: Header, found: Probe) -> str | None:
    """What the file says, else its marks, else what lies beside it says, else what its family usually is.

    Args:
        path: the file.
        header: its tensors; of a pickle too, once it is known where they lie.
        found: what it is.
    """
    if found.kind not in {"checkpoint", "lora", "diffusers"}:
        return None
    said = _PREDICTIONS.get(header.metadata.get("modelspec.prediction_type", "").lower())
    if said:
        return said
    if "v_pred" in header.tensors:
        return "v"
    return _said_beside(path) or _by_bias(path, header, found) or _usual(found)


def _usual(found: Probe) -> str | None:
    """SD 1 and SDXL predict noise, Flux flow; SD 2 comes in two forms, of which its variants have the first."""
    if found.kind not in {"checkpoint", "lora"}:
        return None
    if (found.family, found.variant) in (("sd2", "depth"), ("sd2", "inpainting")):
        return "epsilon"
    return {"sd1": "epsilon", "sdxl": "epsilon", "flux": "flow"}.get(found.family or "")


def _said_beside(path: Path) -> str | None:
    """The ``parameterization`` of a configuration of the same name, A1111's way."""
    try:
        text = path.with_suffix(".yaml").read_text(encoding="utf-8")[:100_000]
    except (OSError, UnicodeDecodeError):
        return None
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "parameterization":
            return "v" if value.strip().strip("\"'") == "v" else "epsilon"
    return None


def _by_bias(path: Path, header: Header, found: Probe) -> str | None:
    entry = header.tensors.get(_V_BIAS)
    if found.family != "sd2" or entry is None:
        return None
    with path.open("rb") as file:
        file.seek(entry.begin)
        raw = file.read(entry.end - entry.begin)
    values = _floats(raw, entry.dtype)
    return None if len(values) < 2 else "v" if statistics.pstdev(values) > _V_SPREAD else "epsilon"


def _floats(raw: bytes, dtype: str) -> list[float]:
    """Little-endian floats without numpy; a bfloat16 is the upper half of a float32."""
    if dtype == "BF16":
        raw = b"".join(b"\0\0" + raw[index : index + 2] for index in range(0, len(raw), 2))
    letter, width = {"F16": ("e", 2), "BF16": ("f", 4), "F32": ("f", 4)}.get(dtype, ("", 0))
    return list(struct.unpack(f"<{len(raw) // width}{letter}", raw)) if width else []
