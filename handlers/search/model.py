"""Embeddings by CLIP or SigLIP through transformers: a picture and a text become vectors that can be compared.

Kosmos-2 cannot do this: it has no contrastive head.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from safetensors import SafetensorError
from torch.nn import functional
from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.utils import logging as transformers_logging

from handlers.context import Waiting

FAMILIES = ("clip", "siglip")
_SIGLIP_POSITIONS = 64
"""SigLIP was trained on texts padded to so many tokens, in lower case (its model card); others mean less to it."""

Vectors = npt.NDArray[np.float32]


class Embedder:
    """A model in memory."""

    def __init__(self, model: Any, processor: Any, device: str) -> None:
        """A transformers model of ``FAMILIES`` in eval mode on its device, and its processor."""
        self._model = model
        self._processor = processor
        self._device = device
        self._family = str(model.config.model_type)

    @classmethod
    def load(cls, folder: Path, device: str) -> Embedder:
        """Load a transformers folder, without the network.

        Raises:
            Waiting: it cannot be loaded.
        """
        transformers_logging.disable_progress_bar()
        verbosity = transformers_logging.get_verbosity()
        # It says at every start that torchvision is not there, and works as well with Pillow.
        transformers_logging.set_verbosity_error()
        try:
            family = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
            _require_known(family)
            model = AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval().to(device)
            processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise Waiting(f"The search model in {folder} cannot be loaded ({error}). Fetch it again.", 300.0) from error
        finally:
            transformers_logging.set_verbosity(verbosity)
        return cls(model, processor, device)

    def pictures(self, images: Sequence[Image.Image]) -> Vectors:
        """Embeddings [pictures, width] of length 1."""
        pixels = self._processor.image_processor(images=list(images), return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            return self._normal(self._model.get_image_features(pixel_values=pixels.to(self._device)))

    def texts(self, texts: Sequence[str]) -> Vectors:
        """Embeddings [texts, width] of length 1."""
        if self._family == "siglip":
            given = self._processor.tokenizer(
                [text.lower() for text in texts],
                padding="max_length",
                max_length=self._positions(_SIGLIP_POSITIONS),
                truncation=True,
                return_tensors="pt",
            )
            # It was trained without a mask: the padding is part of what it reads.
            inputs = {"input_ids": given["input_ids"].to(self._device)}
        else:
            given = self._processor.tokenizer(
                list(texts), padding=True, truncation=True, max_length=self._positions(77), return_tensors="pt"
            )
            inputs = {key: given[key].to(self._device) for key in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            return self._normal(self._model.get_text_features(**inputs))

    def _positions(self, usual: int) -> int:
        return min(usual, int(self._model.config.text_config.max_position_embeddings))

    @staticmethod
    def _normal(found: Any) -> Vectors:
        pooled = found if isinstance(found, torch.Tensor) else found.pooler_output
        vectors: Vectors = functional.normalize(pooled.float(), dim=-1).cpu().numpy()
        return vectors


def _require_known(family: str) -> None:
    if family not in FAMILIES:
        message = f"it is a {family} model, and search needs one of: {', '.join(FAMILIES)}"
        raise ValueError(message)
