"""Kosmos-2, loaded once: pictures in, raw grounded text out."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import Kosmos2ForConditionalGeneration, Kosmos2Processor, StoppingCriteria, StoppingCriteriaList
from transformers.utils import logging as transformers_logging

from handlers.context import Waiting

BRIEF = "<grounding>An image of"
"""The prompt that Kosmos-2 was taught short grounded captions with."""
_MOST_TOKENS = 64
FETCH = "fastsd models get kosmos-2"


class Interrupted(Exception):  # noqa: N818 - it is no error
    """Generation ended early because it was asked to; there is no text."""


@dataclass(frozen=True)
class Spoken:
    """What the model said about one picture.

    Attributes:
        raw: the prompt and what follows it, tags and all.
        seconds: this picture's share of the time.
    """

    raw: str
    seconds: float


class _Halt(StoppingCriteria):
    """Ends generation at the next token once ``halted`` says so."""

    def __init__(self, halted: Callable[[], bool]) -> None:
        self._halted = halted

    def __call__(self, input_ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._halted(), dtype=torch.bool, device=input_ids.device)


class Captioner:
    """A loaded captioner on its device."""

    def __init__(self, model: Any, processor: Any) -> None:
        """Wrap a model (in eval mode, on its device) and its processor.

        Raises:
            Waiting: the processor does not stretch whole pictures to the model's square, so boxes would be wrong.
        """
        self._model = model
        self._processor = processor
        require_square(processor, model.config.vision_config.image_size)

    @classmethod
    def load(cls, folder: Path, device: str) -> Captioner:
        """Load a transformers folder in float32, without the network.

        Raises:
            Waiting: the folder cannot be loaded.
        """
        transformers_logging.disable_progress_bar()
        try:
            processor = Kosmos2Processor.from_pretrained(folder, local_files_only=True)
            model = Kosmos2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise Waiting(
                f"The captioner in {folder} cannot be loaded ({error}). Fetch it again: {FETCH}",
                retry_after=300.0,
            ) from error
        return cls(model.eval().to(device), processor)

    def speak(
        self,
        pictures: Sequence[Image.Image],
        prompts: Sequence[str],
        halted: Callable[[], bool] = lambda: False,
    ) -> list[Spoken]:
        """Say something about each picture: greedy, so the same picture always gives the same words.

        Prompts of one length share a batch. Padding, left or right, would change what the model says, so there is none.

        Args:
            pictures: upright, RGB, any size.
            prompts: one a picture, such as ``BRIEF``.
            halted: asked at every token; True ends the work.

        Raises:
            Interrupted: ``halted`` said so.
        """
        spoken: dict[int, Spoken] = {}
        for indices in self._alike(prompts):
            start = time.perf_counter()
            texts = self._generate([pictures[i] for i in indices], [prompts[i] for i in indices], halted)
            each = (time.perf_counter() - start) / len(indices)
            spoken.update({index: Spoken(text, each) for index, text in zip(indices, texts, strict=True)})
        return [spoken[index] for index in range(len(pictures))]

    def _alike(self, prompts: Sequence[str]) -> list[list[int]]:
        """The indices of the prompts, those of one token count together."""
        groups: defaultdict[int, list[int]] = defaultdict(list)
        for index, prompt in enumerate(prompts):
            groups[len(self._processor.tokenizer(prompt).input_ids)].append(index)
        return list(groups.values())

    @torch.inference_mode()
    def _generate(
        self, pictures: Sequence[Image.Image], prompts: Sequence[str], halted: Callable[[], bool]
    ) -> list[str]:
        inputs = self._processor(text=list(prompts), images=list(pictures), return_tensors="pt").to(self._model.device)
        tokenizer = self._processor.tokenizer
        # `generate` reads the inner text model's generation config, whatever the outer one says: nothing is left to it.
        tokens = self._model.generate(
            pixel_values=inputs["pixel_values"],
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            image_embeds_position_mask=inputs["image_embeds_position_mask"],
            max_new_tokens=_MOST_TOKENS,
            do_sample=False,
            num_beams=1,
            no_repeat_ngram_size=3,
            repetition_penalty=1.0,
            use_cache=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            stopping_criteria=StoppingCriteriaList([_Halt(halted)]),
        )
        if halted():
            raise Interrupted
        # Text begins behind the picture's tokens and their closing tag.
        begin = int(inputs["image_embeds_position_mask"][0].nonzero().max()) + 2
        return [str(text) for text in tokenizer.batch_decode(tokens[:, begin:], skip_special_tokens=True)]


def require_square(processor: Any, side: int) -> None:
    """Check that the processor stretches the whole picture to side × side, so that boxes map as x · width, y · height.

    A plain CLIP processor keeps the aspect and cuts the ends off instead, and says nothing.

    Raises:
        Waiting: it does not.
    """
    tools = processor.image_processor
    size, crop = dict(tools.size), dict(tools.crop_size or {})
    square = {"height": side, "width": side}
    stretched = tools.do_resize and _lengths(size) == square
    uncut = not tools.do_center_crop or _lengths(crop) == square
    if not (stretched and uncut):
        raise Waiting(
            f"The captioner's processor does not stretch pictures to {side} × {side} (size {size}, crop {crop}): "
            f"its boxes would be wrong. Fetch it again: {FETCH}",
            retry_after=300.0,
        )


def _lengths(size: dict[str, int | None]) -> dict[str, int]:
    return {name: length for name, length in size.items() if length is not None}
