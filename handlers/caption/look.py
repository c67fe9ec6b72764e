"""One-off work with a captioner that writes no captions: heat maps of its attention, and what it sees as numbers."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from handlers.caption.model import Captioner
from handlers.caption.prompts import caption_prompt
from handlers.caption.speaking import Ask
from handlers.context import JobContext, JobResult
from handlers.crop.decode import OpenPicture, read_source
from handlers.models import registry
from sessions import files
from sessions.refusal import Refusal

_LONG_SIDE = 1024


def _captioner(context: JobContext) -> tuple[Captioner, registry.Model]:
    payload = context.payload
    models = payload.get("models")
    model = registry.find(payload["captioner"], "captioner", Path(models) if models else None, context.cache)
    return Captioner.load(model.path, context.device, payload.get("precision") or "auto"), model


def _picture(source: Path) -> Any:
    opened = OpenPicture(read_source(source))
    return opened.decode(_LONG_SIDE / opened.longer_side).image


class AttentionHandler:
    """Draws where the model looked while it said each word."""

    def run(self, context: JobContext) -> JobResult:
        """One picture: ``source``, ``output`` (a picture), ``npz`` (or null), ``captioner``, ``mode``, ``prompt``.

        Raises:
            Refusal: the picture cannot be read, or the prompt is none.
            Waiting: the captioner is not on this machine.
        """
        from handlers.caption.attention import attend, mass_inside
        from handlers.caption.heat import sheet

        payload = context.payload
        prompt, most = caption_prompt(payload.get("mode") or "brief", payload.get("prompt"))
        picture = _picture(Path(payload["source"]))
        captioner, model = _captioner(context)
        if captioner.precision not in ("fp32", "bf16", "fp16"):
            captioner = Captioner.load(model.path, context.device, "bf16")
        found = attend(captioner, picture, Ask(0, prompt, most))
        output = Path(payload["output"])
        drawn = io.BytesIO()
        sheet(picture, found).save(drawn, "PNG")
        files.write_bytes(output, drawn.getvalue())
        outputs = [output]
        if payload.get("npz"):
            arrays = io.BytesIO()
            save: Any = np.savez_compressed  # its types take every name for the one of its flag
            save(arrays, **found.arrays())
            files.write_bytes(Path(payload["npz"]), arrays.getvalue())
            outputs.append(Path(payload["npz"]))
        phrases = [
            {"phrase": item.phrase, "box": list(box), "mass": round(mass_inside(found.phrase_heat(index), box), 4)}
            for index, item in enumerate(found.utterance.grounded)
            for box in item.boxes
        ]
        words = [word.text for word in found.words]
        return JobResult({"words": words, "phrases": phrases, "captioner": model.name}, outputs)


class FeaturesHandler:
    """Writes what the model sees in pictures, before any word."""

    def run(self, context: JobContext) -> JobResult:
        """All pictures into one file: ``sources``, ``output``, ``captioner``, ``precision``.

        The file is safetensors: ``patches`` [pictures, 1 + patches, vision width] (CLS first, behind the last norm),
        ``latents`` [pictures, 64, text width]; the metadata's ``sources`` is a JSON list in the same order. A picture
        that cannot be read is left out and named in the facts.

        Raises:
            Refusal: no picture can be read.
            Waiting: the captioner is not on this machine.
        """
        import torch
        from safetensors.torch import save

        captioner, model = _captioner(context)
        rows: list[tuple[str, Any, Any]] = []
        left_out: list[Mapping[str, str]] = []
        sources = [str(source) for source in context.payload["sources"]]
        for number, source in enumerate(sources):
            try:
                picture = _picture(Path(source))
            except (Refusal, OSError) as error:
                left_out.append({"source": source, "reason": str(error)})
                continue
            with torch.inference_mode():
                seen = captioner.look(captioner.pixels([picture]))
            rows.append((source, seen.patches[0].cpu(), seen.latents[0].cpu()))
            context.progress(number + 1, len(sources), "looking")
        if not rows:
            raise Refusal("pictures", "None of the pictures can be read.", "Name pictures, or folders of pictures.")
        tensors = {
            "patches": torch.stack([patches for _, patches, _ in rows]),
            "latents": torch.stack([latents for _, _, latents in rows]),
        }
        metadata = {"model": model.name, "sources": json.dumps([source for source, _, _ in rows])}
        output = Path(context.payload["output"])
        files.write_bytes(output, save(tensors, metadata))
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        return JobResult({"shapes": shapes, "left_out": left_out, "captioner": model.name}, [output])
