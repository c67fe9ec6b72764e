"""One file from a Diffusers folder, proven before it gets its name."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from handlers.context import JobContext, JobResult, Stopping, Waiting
from handlers.convert import sd1
from handlers.convert.plan import make_plan, modelspec
from handlers.convert.source import Pipeline, locate, read_pipeline
from handlers.convert.verify import Unproven, compare_all, compare_samples, match_headers
from handlers.convert.write import write_single
from sessions import files
from sessions.refusal import Refusal

Verify = Literal["header", "sample", "all", "forward"]
DTYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
_FAMILIES = {"sd1": sd1.COMPONENTS}


@dataclass(frozen=True)
class Converted:
    """What was made: the numbers that ``fastsd convert --json`` and the manifest show."""

    output: Path
    pipeline: Pipeline
    bytes: int
    tensors: int
    verified: Verify
    seconds: float


def convert(
    source: Path,
    output: Path,
    *,
    dtype: str | None = None,
    metadata: Mapping[str, object] | None = None,
    verify: Verify = "sample",
    device: str = "cpu",
    progress: Callable[[int, int, str], None] = lambda _done, _total, _note: None,
) -> Converted:
    """Convert a Diffusers folder to one ``.safetensors`` file; it appears whole and proven, or not at all.

    Args:
        source: the Diffusers folder.
        output: the file to make.
        dtype: fp32, fp16 or bf16; None keeps each tensor's type.
        metadata: title, date, trigger_phrase … for the header.
        verify: how far to prove it: ``header``, ``sample`` (parts of every tensor), ``all`` (every byte), ``forward``
            (``all``, then loaded by diffusers and compared in weights and outputs; imports torch).
        device: for ``forward``.
        progress: called with (bytes done, bytes in all, what is done); may raise to stop.

    Raises:
        Refusal: the source cannot be converted.
        Waiting: there is too little room on the disk.
        Unproven: the written file is not the source; it was removed.
        OSError: reading or writing failed.
    """
    began = time.monotonic()
    if dtype is not None and dtype not in DTYPES:
        raise Refusal("dtype", f"There is no number type {dtype}.", f"Use one of {', '.join(DTYPES)}.")
    if output.suffix != ".safetensors":
        raise Refusal("output", f"{output.name} is no .safetensors file.", "Give the output the ending .safetensors.")
    pipeline = read_pipeline(source)
    components = _FAMILIES[pipeline.family]
    found = {component.name: locate(source, component.name) for component in components}
    plan = make_plan(components, found, DTYPES[dtype] if dtype else None)
    total = sum(entry.length for entry in plan)
    _check_room(output.parent, total)
    done = 0

    def wrote(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total, "writing")

    with files.atomic_path(output) as temporary:
        write_single(temporary, plan, modelspec(pipeline, metadata or {}), wrote)
        progress(total, total, "checking")
        pairs = match_headers(temporary, components, found)
        if verify == "sample":
            compare_samples(temporary, pairs)
        elif verify in ("all", "forward"):
            compare_all(temporary, pairs)
        if verify == "forward":
            from handlers.convert.forward import compare_forward  # torch: only for this proof

            progress(total, total, "checking that it computes the same")
            compare_forward(temporary, source, device)
        # Measured while it has no name yet: whoever sees the name may move the file at once.
        size = temporary.stat().st_size
    return Converted(output, pipeline, size, len(plan), verify, time.monotonic() - began)


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise Waiting(
            f"The model needs {needed / 1e9:.2f} GB in {folder.name}; {free / 1e9:.2f} GB are free. Make room there.",
            retry_after=300.0,
        )


class ConvertHandler:
    """The daemon's conversions: file, sidecar with hashes, preview picture."""

    def run(self, context: JobContext) -> JobResult:
        """Convert ``source`` to ``output``.

        Payload: ``source``, ``output``, ``dtype`` (null keeps), ``metadata``, and optionally ``verify`` (default
        ``forward``), ``preview`` (a picture to lie beside the model), ``run``.

        Raises:
            Refusal, Waiting, Cancelled, Stopping: as every handler.
            Unproven: the proof failed.
        """
        payload = context.payload
        output = Path(payload["output"])
        files.sweep_temporaries(output.parent)

        def progress(done: int, total: int, note: str) -> None:
            context.progress(done, total, note)
            if context.is_stopping():
                raise Stopping

        made = convert(
            Path(payload["source"]),
            output,
            dtype=payload.get("dtype"),
            metadata=payload.get("metadata") or {},
            verify=_verify_of(payload.get("verify")),
            device=context.device,
            progress=progress,
        )
        digest = files.sha256_of(output)
        facts: dict[str, Any] = {
            "run": payload.get("run"),
            "sha256": digest,
            "bytes": made.bytes,
            "family": made.pipeline.family,
            "prediction": made.pipeline.prediction,
            "verified": made.verified,
        }
        outputs = [output, *_write_preview(payload.get("preview"), output)]
        sidecar = output.with_suffix(".json")
        files.write_json(sidecar, _summary(made, digest, payload))
        return JobResult(facts=facts, outputs=[*outputs, sidecar])


def _verify_of(value: object) -> Verify:
    for choice in get_args(Verify):
        if value == choice:
            found: Verify = choice
            return found
    if value is None:
        return "forward"
    raise Refusal("verify", f"There is no proof called {value}.", f"Use one of {', '.join(get_args(Verify))}.")


def _summary(made: Converted, digest: str, payload: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "file": made.output.name,
        "kind": "checkpoint",
        "family": made.pipeline.family,
        "variant": made.pipeline.variant,
        "prediction": made.pipeline.prediction,
        "resolution": made.pipeline.resolution,
        "bytes": made.bytes,
        "tensors": made.tensors,
        "sha256": digest,
        "autov2": digest[:10],
        "verified": made.verified,
        "run": payload.get("run"),
        "metadata": dict(payload.get("metadata") or {}),
    }


def _write_preview(picture: str | None, output: Path) -> list[Path]:
    """The preview beside the model, as PNG; a picture that cannot be read is no reason to lose the model."""
    if not picture:
        return []
    from io import BytesIO

    from PIL import Image

    preview = output.with_name(f"{output.stem}.preview.png")
    try:
        with Image.open(picture) as image:
            image.thumbnail((1024, 1024))
            content = BytesIO()
            image.convert("RGB").save(content, "PNG")
    except (OSError, ValueError):
        return []
    files.write_bytes(preview, content.getvalue())
    return [preview]


__all__ = ["ConvertHandler", "Converted", "Unproven", "Verify", "convert"]
