"""The handler: one file from a Diffusers folder or an adapter, or a folder from one file; proven before it is named."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from handlers.context import JobContext, JobResult, Waiting
from handlers.convert.adapter import convert_adapter, is_adapter, lora_facts, lora_sidecar, read_facts
from handlers.convert.ask import DTYPES, Converted, Verify, Weights, progress_of
from handlers.convert.folder import convert_single
from handlers.convert.preview import read_picture, thumbnail_of, write_preview
from handlers.convert.single import convert, is_converted
from handlers.convert.verify import Unproven
from sessions import files
from sessions.refusal import Refusal

if TYPE_CHECKING:
    from handlers.train.base import BaseModel


class ConvertHandler:
    """The daemon's conversions: file, sidecar with hashes, preview picture."""

    def run(self, context: JobContext) -> JobResult:
        """Convert ``source`` to ``output``.

        Payload: ``source`` (a Diffusers folder, an adapter's, or one file), ``output`` (one file, or the folder to
        make), ``dtype`` (null keeps), ``metadata``, and optionally ``verify`` (default ``forward``), ``preview`` (a
        picture to lie beside the model), ``run``, ``vae`` (another one to put in, or ``none``), ``known`` (``outputs``
        and ``facts`` of an earlier conversion, given back where they still hold every byte of the folder); of a file
        also ``like`` (a Diffusers folder of the same shape) and ``weights``; of an adapter also ``models`` (where its
        base may lie) and ``beside`` (where else, if not beside the output).

        Raises:
            Refusal, Waiting, Cancelled, Stopping: as every handler.
            Unproven: the proof failed.
        """
        payload = context.payload
        source, output = Path(payload["source"]), Path(payload["output"])
        if (known := payload.get("known")) and is_converted(source, Path(known["outputs"][0])):
            return JobResult(facts=dict(known["facts"]), outputs=[Path(output) for output in known["outputs"]])
        files.sweep_temporaries(output.parent)
        if source.is_file():
            made = _to_folder(context, source, output)
            return JobResult(facts=_facts(made, None, payload), outputs=[output])
        picture = read_picture(payload.get("preview"))
        metadata = dict(payload.get("metadata") or {})
        if picture is not None:
            metadata["thumbnail"] = thumbnail_of(picture)
        if is_adapter(source):
            made, of_lora = _adapter(context, source, output, metadata), lora_facts(read_facts(source), payload)
            more = lora_sidecar(output.stem, of_lora)
        else:
            made, of_lora, more = _to_file(context, source, output, metadata), {}, {}
        digest = files.sha256_of(output)
        outputs = [output, *made.beside]
        if picture is not None:
            outputs.append(write_preview(picture, output))
        sidecar = output.with_suffix(".json")
        files.write_json(sidecar, {**_summary(made, digest, payload), **more})
        return JobResult(facts={**_facts(made, digest, payload), **of_lora}, outputs=[*outputs, sidecar])


def _to_folder(context: JobContext, source: Path, output: Path) -> Converted:
    payload = context.payload
    like = payload.get("like")
    return convert_single(
        source,
        output,
        dtype=payload.get("dtype"),
        verify=_verify_of(payload.get("verify")),
        like=Path(like) if like else None,
        weights=_weights_of(payload.get("weights")),
        cache=context.cache,
        device=context.device,
        progress=progress_of(context),
    )


def _to_file(context: JobContext, source: Path, output: Path, metadata: Mapping[str, object]) -> Converted:
    payload = context.payload
    return convert(
        source,
        output,
        dtype=payload.get("dtype"),
        metadata=metadata,
        verify=_verify_of(payload.get("verify")),
        vae=_vae_of(payload.get("vae")),
        device=context.device,
        progress=progress_of(context),
    )


def _adapter(context: JobContext, source: Path, output: Path, metadata: Mapping[str, object]) -> Converted:
    payload = context.payload
    verify = _verify_of(payload.get("verify"))
    return convert_adapter(
        source,
        output,
        dtype=payload.get("dtype"),
        metadata=metadata,
        verify=verify,
        base=_base_of(context, source) if verify == "forward" else None,
        device=context.device,
        progress=progress_of(context),
    )


def _base_of(context: JobContext, source: Path) -> BaseModel | None:
    """What an adapter was trained on; None where it is not on this machine any more."""
    from handlers.train.base import find_base  # torch: only for this proof

    models, beside = context.payload.get("models"), context.payload.get("beside")
    # A run that went on from another one stands on that one's model, which lies beside its own.
    for folder in (Path(models) if models else None, Path(beside or Path(context.payload["output"]).parent)):
        with suppress(Waiting, Refusal):
            return find_base(read_facts(source).base, folder, context.cache)
    return None


def _facts(made: Converted, digest: str | None, payload: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "run": payload.get("run"),
        "sha256": digest,
        "bytes": made.bytes,
        "family": made.pipeline.spoken[0],
        "prediction": made.pipeline.prediction,
        "verified": made.verified,
        "seconds": round(made.seconds, 3),
    }


def _verify_of(value: object) -> Verify:
    for choice in get_args(Verify):
        if value == choice:
            found: Verify = choice
            return found
    if value is None:
        return "forward"
    raise Refusal("verify", f"There is no proof called {value}.", f"Use one of {', '.join(get_args(Verify))}.")


def _vae_of(value: object) -> Path | Literal["keep", "none"]:
    if value in (None, "keep"):
        return "keep"
    return "none" if value == "none" else Path(str(value))


def _weights_of(value: object) -> Weights:
    if value in (None, "trained"):
        return "trained"
    if value == "ema":
        return "ema"
    raise Refusal("weights", f"There are no weights called {value}.", "Use trained or ema.")


def _summary(made: Converted, digest: str, payload: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "file": made.output.name,
        "kind": "checkpoint",
        "family": made.pipeline.spoken[0],
        "variant": made.pipeline.spoken[1],
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


__all__ = ["DTYPES", "ConvertHandler", "Converted", "Unproven", "Verify", "convert", "convert_single"]
