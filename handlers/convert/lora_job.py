"""The handlers of ``fastsd lora``: another layout, merged into a model, taken out of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from handlers.context import JobContext, JobResult
from handlers.convert.ask import progress_of
from handlers.convert.lora_extract import extract_lora
from handlers.convert.lora_layout import LAYOUTS
from handlers.convert.lora_write import Written, convert_lora, merge_loras
from sessions import files
from sessions.refusal import Refusal


class LoraConvertHandler:
    """A LoRA in another layout."""

    def run(self, context: JobContext) -> JobResult:
        """Convert ``source`` to ``output`` in the layout ``to``; ``family`` where the file does not tell.

        Raises:
            Refusal, Unproven, OSError: as ``convert_lora``.
        """
        payload = context.payload
        layout = next((layout for layout in LAYOUTS if layout == payload["to"]), None)
        if layout is None:
            raise Refusal("layout", f"There is no layout {payload['to']}.", f"Use one of {', '.join(LAYOUTS)}.")
        output = Path(payload["output"])
        files.sweep_temporaries(output.parent)
        return _result(convert_lora(Path(payload["source"]), output, layout, payload.get("family")))


class LoraMergeHandler:
    """LoRAs merged into a model."""

    def run(self, context: JobContext) -> JobResult:
        """Merge ``loras`` ([path, weight] each) into ``source`` and write ``output``; ``dtype`` null keeps the types.

        Raises:
            Refusal, Waiting, Unproven, OSError: as ``merge_loras``.
            Cancelled, Stopping: as every handler.
        """
        payload = context.payload
        output = Path(payload["output"])
        files.sweep_temporaries(output.parent)
        loras = [(Path(path), float(weight)) for path, weight in payload["loras"]]
        source, dtype = Path(payload["source"]), payload.get("dtype")
        return _result(merge_loras(source, loras, output, dtype=dtype, progress=progress_of(context)))


class LoraExtractHandler:
    """What distinguishes a model from its base, as a LoRA."""

    def run(self, context: JobContext) -> JobResult:
        """Take a LoRA of ``rank`` in ``dtype`` out of ``source``, trained from ``base``, and write ``output``.

        Raises:
            Refusal, Waiting, Unproven, OSError: as ``extract_lora``.
            Cancelled, Stopping: as every handler.
        """
        payload = context.payload
        output = Path(payload["output"])
        files.sweep_temporaries(output.parent)
        source, base, rank = Path(payload["source"]), Path(payload["base"]), int(payload["rank"])
        dtype = payload.get("dtype") or "fp16"
        written, kept = extract_lora(source, base, output, rank, dtype=dtype, progress=progress_of(context))
        result = _result(written)
        return JobResult(facts={**result.facts, "kept": round(kept, 4)}, outputs=result.outputs)


def _result(written: Written) -> JobResult:
    facts: dict[str, Any] = {
        "family": written.family,
        "modules": written.modules,
        "bytes": written.bytes,
        "seconds": round(written.seconds, 3),
    }
    return JobResult(facts=facts, outputs=[written.output])
