"""Measures captioning at Kosmos-2's real size, with random weights, and prints a table.

    python benchmarks/caption.py                                     int8 in batches against fp32 one by one
    python benchmarks/caption.py --tokens 16 --batches 4 8 --precisions int8 bf16

Random weights say nothing of sense, but as much of it as they are told to: all write the same number of tokens.
CPU-seconds, not wall time: other work on the machine takes turns with this one. The baseline is of the same run.
On a GPU (--device cuda:0): pictures a second and peak memory at batch 1 and the dynamic size.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import resource
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from PIL import Image
from transformers import Kosmos2Config, Kosmos2ForConditionalGeneration, Kosmos2Processor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from handlers.caption.load import quantized
from handlers.caption.model import Captioner
from handlers.caption.prompts import BRIEF
from handlers.models import miniature

_SIDE = 224


def processor() -> Kosmos2Processor:
    """The miniature's words, and pictures of the real size."""
    with tempfile.TemporaryDirectory() as cache:
        made = Kosmos2Processor.from_pretrained(miniature.ensure("miniature-captioner", Path(cache)))
    side = {"height": _SIDE, "width": _SIDE}
    made.image_processor = CLIPImageProcessorPil(size=side, crop_size=side, default_to_square=True)
    return made


def real_size(dtype: torch.dtype) -> Any:
    """1.66 B random weights; the default configuration is the published model's."""
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = Kosmos2ForConditionalGeneration(Kosmos2Config())
        model.to_empty(device="cpu")
        generator = torch.Generator().manual_seed(7)
        for weight in model.parameters():
            # A small block over and over: speed is no matter of the values, and a billion random numbers take minutes.
            block = torch.randn(1 << 16, generator=generator, dtype=torch.float32).mul_(0.02).to(dtype)
            flat = weight.data.view(-1)
            for start in range(0, flat.numel(), block.numel()):
                flat[start : start + block.numel()] = block[: flat.numel() - start]
        text = model.text_model.model
        # What lies in no checkpoint is made anew.
        text.embed_positions.make_weights(
            text.embed_positions.num_positions + 2, text.embed_positions.embedding_dim, text.embed_positions.padding_idx
        )
        embeddings = model.vision_model.model.embeddings
        embeddings.position_ids = torch.arange(embeddings.num_positions).expand((1, -1))
    finally:
        torch.set_default_dtype(torch.float32)
    model.tie_weights()
    return model.eval()


def written(captioner: Captioner, pictures: int, tokens: int) -> tuple[float, float]:
    """CPU-seconds and seconds a picture, for one batch of so many."""
    images = [Image.effect_noise((_SIDE, _SIDE), 40 + number).convert("RGB") for number in range(pictures)]
    ids = torch.tensor([captioner.tokens(BRIEF)] * pictures, device=captioner.device)
    mask = torch.tensor([captioner.picture_mask(BRIEF)] * pictures, device=captioner.device)
    cpu, wall = time.process_time(), time.perf_counter()
    with torch.inference_mode():
        latents = captioner.encode(images)
        captioner.model.generate(
            image_embeds=latents,
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            image_embeds_position_mask=mask,
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            eos_token_id=2,
            pad_token_id=1,
            bos_token_id=0,
        )
        if captioner.device.type == "cuda":
            torch.cuda.synchronize()
    return (time.process_time() - cpu) / pictures, (time.perf_counter() - wall) / pictures


def peak_gigabytes(device: str) -> float:
    """Of this process with all its models; on a GPU, of what was just measured with them."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return float(torch.cuda.max_memory_allocated()) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure captioning at Kosmos-2's real size, with random weights.")
    parser.add_argument("--tokens", type=int, default=32, help="to write about each picture")
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--precisions", nargs="+", default=["int8"], choices=("int8", "bf16", "fp16", "fp32"))
    parser.add_argument("--rounds", type=int, default=3, help="of all in turn; the medians are shown")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    tools = processor()
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    models = {"fp32": real_size(torch.float32).to(options.device)}
    for precision in options.precisions:
        if precision == "int8":
            models["int8"] = quantized(real_size(torch.float32))
        elif precision not in models:
            models[precision] = real_size(dtypes[precision]).to(options.device)
        gc.collect()
    plan = [("fp32", 1), *itertools.product(options.precisions, options.batches)]
    measured: dict[tuple[str, int], list[tuple[float, float]]] = {each: [] for each in plan}
    peaks: dict[tuple[str, int], float] = {}
    for turn in range(options.rounds):
        for precision, batch in plan:
            if options.device != "cpu":
                torch.cuda.reset_peak_memory_stats()
            took = written(Captioner(models[precision], tools, "fp32"), batch, options.tokens)
            measured[precision, batch].append(took)
            peaks[precision, batch] = peak_gigabytes(options.device)
            print(f"round {turn + 1}: {precision} × {batch}: {took[0]:.2f} CPU-s a picture", flush=True)
    rows: list[dict[str, Any]] = [
        {
            "precision": precision,
            "batch": batch,
            "cpu_seconds": median(cpu for cpu, _ in taken),
            "seconds": median(wall for _, wall in taken),
            "peak_gb": peaks[precision, batch],
        }
        for (precision, batch), taken in measured.items()
    ]
    base = rows[0]
    print(f"\n{'precision':<10}{'batch':>6}{'CPU-s/picture':>15}{'s/picture':>11}{'times':>8}{'peak GB':>9}")
    for row in rows:
        key = "cpu_seconds" if options.device == "cpu" else "seconds"
        times = base[key] / max(row[key], 1e-9)
        print(
            f"{row['precision']:<10}{row['batch']:>6}{row['cpu_seconds']:>15.2f}{row['seconds']:>11.2f}"
            f"{times:>8.1f}{row['peak_gb']:>9.2f}"
        )


if __name__ == "__main__":
    main()
