"""Kosmos-2 as ONNX: eyes, and one decoder that serves both the prompt and each token after it.

``eyes.onnx``: ``pixels`` [B, 3, side, side] → ``latents`` [B, 64, width] (vision model and resampler).
``decoder.onnx``: ``embedded`` [B, L, width], ``positions`` [L], ``past`` [2 · layers, B, heads, P, head] →
``logits`` [B, pieces] of the last token, ``present`` [2 · layers, B, heads, P + L, head]. P is 0 for the prompt.
``embeddings.npy``: [pieces, width], unscaled: looked up outside, because the picture's latents stand among them.
Positions count from 2, behind the padding's index. ``settings.json`` holds what a runner must know besides.
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from handlers.caption.model import Captioner
from handlers.context import JobContext, JobResult
from handlers.models import registry
from sessions import files
from sessions.refusal import Refusal

_OPSET = 18
# A protobuf file ends at 2 GB; from here on the weights lie in a file of their own.
_EXTERNAL_BYTES = 1 << 30
ADVICE = "Install it with: pip install 'fastsd[onnx]'"


class _Eyes(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.vision, self.resampler = model.vision_model, model.image_to_text_projection

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = self.vision.model.post_layernorm(self.vision(pixels)[0])
        latents: torch.Tensor = self.resampler(torch.nn.functional.normalize(patches, dim=-1))[0]
        return latents


class _Decoder(torch.nn.Module):
    """The text model with its keys and values as plain tensors."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        text = model.text_model
        self.layers, self.norm, self.head = text.model.layers, text.model.layer_norm, text.lm_head
        self.scale: float = text.model.embed_scale
        self.register_buffer("table", text.model.embed_positions.weights)

    def forward(
        self, embedded: torch.Tensor, positions: torch.Tensor, past: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = embedded * self.scale + self.table[positions]
        # A token sees itself and what came before it: key j is for position j + 2.
        total = past.shape[3] + embedded.shape[1]
        seen = torch.arange(total, device=positions.device)[None] <= (positions - 2)[:, None]
        mask = torch.where(seen, 0.0, torch.finfo(embedded.dtype).min)
        present = []
        for number, layer in enumerate(self.layers):
            attended, keys, values = _attended(
                layer.self_attn, layer.self_attn_layer_norm(hidden), past[2 * number], past[2 * number + 1], mask
            )
            hidden = hidden + attended
            hidden = hidden + layer.ffn(layer.final_layer_norm(hidden))
            present += [keys, values]
        return self.head(self.norm(hidden[:, -1])), torch.stack(present)


def _attended(
    attention: Any, hidden: torch.Tensor, past_keys: torch.Tensor, past_values: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, length, width = hidden.shape

    def heads(projection: Any) -> torch.Tensor:
        split: torch.Tensor = projection(hidden).view(batch, length, attention.num_heads, attention.head_dim)
        return split.transpose(1, 2)

    keys = torch.cat([past_keys, heads(attention.k_proj)], dim=2)
    values = torch.cat([past_values, heads(attention.v_proj)], dim=2)
    scores = heads(attention.q_proj) @ keys.transpose(2, 3) * attention.scaling + mask
    mixed = (scores.softmax(-1) @ values).transpose(1, 2).reshape(batch, length, width)
    if attention.inner_attn_ln is not None:
        mixed = attention.inner_attn_ln(mixed)
    return attention.out_proj(mixed), keys, values


def export(captioner: Captioner, folder: Path) -> list[Path]:
    """Write a captioner as ONNX in float32, with its processor, into a folder that does not exist yet.

    Raises:
        Refusal: the packages are missing, or the folder exists.
    """
    _require_packages()
    if folder.exists():
        raise Refusal("exists", f"{folder} exists.", "Name a new folder.")
    temporary = files.temporary_name(folder)
    try:
        temporary.mkdir(parents=True)
        captioner.processor.save_pretrained(temporary)
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter, about itself
            _write(captioner, temporary)
        files.sync_tree(temporary)
        files.publish(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return sorted(folder.iterdir())


def _write(captioner: Captioner, folder: Path) -> None:
    model = captioner.model
    text = model.config.text_config
    head = text.embed_dim // text.attention_heads
    batch, length, before = (torch.export.Dim(name, min=1) for name in ("batch", "length", "before"))
    pixels = torch.zeros(2, 3, captioner.side, captioner.side)
    _save(_Eyes(model).eval(), (pixels,), ({0: batch},), (["pixels"], ["latents"]), folder / "eyes.onnx")
    example = (
        torch.zeros(2, 3, text.embed_dim),
        torch.arange(7, 10),
        torch.zeros(2 * text.layers, 2, text.attention_heads, 5, head),
    )
    shapes = ({0: batch, 1: length}, {0: length}, {1: batch, 3: before})
    names = (["embedded", "positions", "past"], ["logits", "present"])
    _save(_Decoder(model).eval(), example, shapes, names, folder / "decoder.onnx")
    np.save(folder / "embeddings.npy", model.text_model.model.embed_tokens.weight.detach().float().cpu().numpy())
    settings = {"layers": text.layers, "heads": text.attention_heads, "head": head, "side": captioner.side}
    files.write_json(folder / "settings.json", settings)


def _save(
    module: torch.nn.Module,
    example: tuple[torch.Tensor, ...],
    shapes: Any,
    names: tuple[list[str], list[str]],
    path: Path,
) -> None:
    program = torch.onnx.export(
        module,
        example,
        dynamo=True,
        input_names=names[0],
        output_names=names[1],
        dynamic_shapes=shapes,
        opset_version=_OPSET,
        verbose=False,
    )
    size = sum(weight.numel() * weight.element_size() for weight in module.parameters())
    program.save(path, external_data=size > _EXTERNAL_BYTES)


def shrink(folder: Path) -> None:
    """Replace the weights of an exported folder's graphs by int8 ones; activations are quantized as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    for name in ("eyes", "decoder"):
        path = folder / f"{name}.onnx"
        external = path.with_name(f"{name}.onnx.data").exists()
        small = folder / f"{name}-int8.onnx"
        quantize_dynamic(path, small, weight_type=QuantType.QInt8, use_external_data_format=external)
        for left in (path, folder / f"{name}.onnx.data"):
            left.unlink(missing_ok=True)
        small.rename(path)


def _require_packages() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise Refusal("package", f"The export needs a package that is not here ({error}).", f"{ADVICE}.") from None


class ExportHandler:
    """Exports a captioner and measures how far the export agrees with it."""

    def run(self, context: JobContext) -> JobResult:
        """One export: ``output`` (a folder), ``captioner``, ``int8``, ``pictures`` (to compare on; may be empty).

        Raises:
            Refusal: see ``export``.
            Waiting: the captioner is not on this machine.
        """
        from handlers.caption.onnx_run import agreement

        payload = context.payload
        model = registry.find(payload["captioner"], "captioner", None, context.cache)
        captioner = Captioner.load(model.path, "cpu", "fp32")
        folder = Path(payload["output"])
        context.progress(0, 2, "exporting")
        outputs = export(captioner, folder)
        if payload.get("int8"):
            context.progress(1, 2, "int8")
            shrink(folder)
            outputs = sorted(folder.iterdir())
        report = agreement(captioner, folder, [Path(source) for source in payload.get("pictures", ())])
        return JobResult({"captioner": model.name, "agreement": report}, outputs)
