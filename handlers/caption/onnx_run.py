"""Captions with onnxruntime: the exported graphs in a greedy loop, no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from handlers.caption.prompts import BRIEF

if TYPE_CHECKING:
    from handlers.caption.model import Captioner

_FIRST_POSITION = 2
_LONGEST_RUN = 12


class OnnxCaptioner:
    """The graphs of an exported folder.

    Args:
        folder: as ``onnx_export.export`` wrote it.
        threads: of onnxruntime; 0 takes all cores.
    """

    def __init__(self, folder: Path, threads: int = 0) -> None:
        import onnxruntime
        from transformers import Kosmos2Processor

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        providers = ["CPUExecutionProvider"]
        self._eyes = onnxruntime.InferenceSession(folder / "eyes.onnx", options, providers=providers)
        self._decoder = onnxruntime.InferenceSession(folder / "decoder.onnx", options, providers=providers)
        self._embeddings = np.load(folder / "embeddings.npy", mmap_mode="r")
        self._settings = json.loads((folder / "settings.json").read_bytes())
        self._processor: Any = Kosmos2Processor.from_pretrained(folder, local_files_only=True)

    def speak(self, pictures: Sequence[Image.Image], prompt: str = BRIEF, most_tokens: int = 64) -> list[str]:
        """Prompt and answer about each picture, tags and all, as ``Captioner.speak`` gives them.

        Args:
            pictures: upright, RGB; all in one batch.
            prompt: with tags.
            most_tokens: where an answer ends at the latest.
        """
        found = self._processor(text=[prompt] * len(pictures), images=list(pictures))
        ids = np.array(found["input_ids"], np.int64)
        mask = np.array(found["image_embeds_position_mask"], bool)
        pixels = np.array(found["pixel_values"], np.float32)
        (latents,) = self._eyes.run(None, {"pixels": pixels})
        embedded = np.array(self._embeddings[ids], np.float32)
        embedded[mask] = latents.reshape(-1, latents.shape[-1])
        tokens = self._continued(ids, embedded, most_tokens)
        begin = int(np.nonzero(mask[0])[0].max()) + 2
        said = self._processor.tokenizer.batch_decode(tokens[:, begin:].tolist(), skip_special_tokens=True)
        return [str(text) for text in said]

    def _continued(self, ids: np.ndarray, embedded: np.ndarray, most_tokens: int) -> np.ndarray:
        tokenizer = self._processor.tokenizer
        batch, length = ids.shape
        layers, heads, head = (self._settings[key] for key in ("layers", "heads", "head"))
        past = np.zeros((2 * layers, batch, heads, 0, head), np.float32)
        ended = np.zeros(batch, bool)
        begin = 0
        for _ in range(most_tokens):
            positions = np.arange(begin, length, dtype=np.int64) + _FIRST_POSITION
            given = {"embedded": embedded, "positions": positions, "past": past}
            logits, past = self._decoder.run(None, given)
            for row, banned in enumerate(map(_repeating, ids.tolist())):
                logits[row, banned] = -np.inf
            chosen = np.where(ended, tokenizer.pad_token_id, logits.argmax(-1))
            ids = np.concatenate([ids, chosen[:, None]], axis=1)
            ended |= chosen == tokenizer.eos_token_id
            if ended.all():
                break
            embedded = np.array(self._embeddings[chosen], np.float32)[:, None]
            begin, length = length, length + 1
        return ids


def _repeating(ids: Sequence[int]) -> list[int]:
    """The tokens that would end a run which stood there before, as ``no_repeat_ngram_size`` forbids them."""
    behind = tuple(ids[len(ids) - _LONGEST_RUN + 1 :])
    run = _LONGEST_RUN
    return [ids[at + run - 1] for at in range(len(ids) - run + 1) if tuple(ids[at : at + run - 1]) == behind]


def agreement(captioner: Captioner, folder: Path, pictures: Sequence[Path]) -> dict[str, Any]:
    """How far an export says what torch says: ``pictures``, ``same`` (to the last tag), ``same_text``.

    Args:
        captioner: the model in torch.
        folder: its export.
        pictures: to compare on.
    """
    from handlers.caption.boxes import parse
    from handlers.caption.speaking import Ask, Spoken
    from handlers.crop.decode import OpenPicture, read_source

    images = [OpenPicture(read_source(path)).decode(1.0).image for path in pictures]
    if not images:
        return {"pictures": 0}
    said = dict(captioner.speak(images, [Ask(index, BRIEF) for index in range(len(images))]))
    runner = OnnxCaptioner(folder)
    same = same_text = 0
    for index, image in enumerate(images):
        (raw,) = runner.speak([image])
        exact = said[index]
        if isinstance(exact, Spoken):
            same += raw == exact.raw
            same_text += parse(raw).text == parse(exact.raw).text
    return {"pictures": len(images), "same": same, "same_text": same_text}
