"""M2M100 (one model for a hundred languages) and opus-mt (one a pair), loaded once: English in, others out."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    M2M100ForConditionalGeneration,
    M2M100Tokenizer,
    MarianMTModel,
    MarianTokenizer,
    StoppingCriteriaList,
)
from transformers.utils import logging as transformers_logging

from handlers.caption.batches import Pace, batch_size, in_batches, picture_bytes
from handlers.caption.device import RESERVE, free_on, give_back, most_on
from handlers.caption.speaking import Halt, Interrupted
from handlers.context import Waiting
from handlers.translate.languages import ENGLISH

_BEAMS = 4
_MOST_TOKENS = 256
# The same for every batch: what a line becomes must not hang on its company.
_MOST_NEW = 128
# Some models of opus-mt speak several variants and want to be told which; this is the simplified script.
_VARIANTS = {"zh": "cmn_Hans"}
_RETRY = 300.0


class Translator:
    """A loaded translator on its device.

    Attributes:
        model: in eval mode.
        tokenizer: of the same folder.
        pace: how large its batches are.
    """

    def __init__(self, model: Any, tokenizer: Any, fitting: Callable[[], int] | None = None) -> None:
        """Wrap a model (in eval mode, on its device) and its tokenizer.

        Args:
            model: M2M100 or Marian.
            tokenizer: its tokenizer.
            fitting: () → how many lines fit into memory now; None asks the device.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.device: torch.device = model.device
        self.pace = Pace(most_on(self.device))
        self._fitting = fitting or self._fits

    @classmethod
    def load(cls, folder: Path, device: str) -> Translator:
        """Load a transformers folder, without the network.

        Raises:
            Waiting: the folder cannot be loaded.
        """
        transformers_logging.disable_progress_bar()
        try:
            kind = json.loads((folder / "config.json").read_bytes()).get("model_type")
            classes = (MarianMTModel, MarianTokenizer) if kind == "marian" else _M2M100
            with warnings.catch_warnings():
                # It sets odd quotes right; our captions have none.
                warnings.filterwarnings("ignore", message="Recommended: pip install sacremoses")
                tokenizer = classes[1].from_pretrained(folder, local_files_only=True)
            dtype = torch.float16 if torch.device(device).type == "cuda" else torch.float32
            model = classes[0].from_pretrained(folder, dtype=dtype, local_files_only=True).eval().to(device)
        except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
            reason = f"The translator in {folder} cannot be loaded ({error}). Fetch it again: fastsd models get NAME"
            raise Waiting(reason, retry_after=_RETRY) from error
        return cls(model, tokenizer)

    def translate(self, lines: Sequence[str], language: str, halted: Callable[[], bool] = lambda: False) -> list[str]:
        """The lines in another language; with beams, so the same line always gives the same words.

        Lines of like length share a batch. Where memory runs out the batch is halved.

        Args:
            lines: English.
            language: its code; for opus-mt, that of the model.
            halted: asked at every token; True ends the work.

        Raises:
            Interrupted: ``halted`` said so.
            MemoryError: one line alone is too much.
        """
        found = [""] * len(lines)
        order = sorted((index for index, line in enumerate(lines) if line), key=lambda index: len(lines[index]))

        def work(batch: Sequence[int]) -> list[str]:
            return self._written([lines[index] for index in batch], language, halted)

        for index, text in in_batches(order, work, self.pace, self._fitting, lambda: give_back(self.device)):
            if isinstance(text, BaseException):
                raise MemoryError(str(text)) from text  # noqa: TRY004 - one line alone is too much
            found[index] = text
        return found

    @torch.inference_mode()
    def _written(self, lines: Sequence[str], language: str, halted: Callable[[], bool]) -> list[str]:
        options: dict[str, Any] = {}
        if isinstance(self.tokenizer, M2M100Tokenizer):
            self.tokenizer.src_lang = ENGLISH
            options["forced_bos_token_id"] = self.tokenizer.get_lang_id(language)
        else:
            codes = [f">>{code}<<" for code in (_VARIANTS.get(language, language), language)]
            told = next((code for code in codes if code in self.tokenizer.supported_language_codes), "")
            lines = [f"{told} {line}".lstrip() for line in lines]
        given = self.tokenizer(
            list(lines), return_tensors="pt", padding=True, truncation=True, max_length=_MOST_TOKENS
        ).to(self.device)
        tokens = self.model.generate(
            **given,
            **options,
            max_new_tokens=_MOST_NEW,
            num_beams=_BEAMS,
            do_sample=False,
            early_stopping=True,
            stopping_criteria=StoppingCriteriaList([Halt(halted)]),
        )
        if halted():
            raise Interrupted
        # Whether a language's own token counts as special depends on the files that lie there: it never is a word.
        spoken = set(getattr(self.tokenizer, "id_to_lang_token", ()))
        rows = [[token for token in row if token not in spoken] for row in tokens.tolist()]
        decoded = self.tokenizer.batch_decode(rows, skip_special_tokens=True, **_target(self.tokenizer))
        return [str(text).replace(self.tokenizer.unk_token, " ") for text in decoded]

    def _fits(self) -> int:
        settings = self.model.config
        each = picture_bytes(
            layers=settings.decoder_layers,
            width=settings.d_model,
            feed_forward=settings.decoder_ffn_dim,
            vocabulary=settings.vocab_size,
            tokens=_BEAMS * _MOST_TOKENS,
            element=self.model.dtype.itemsize,
        )
        return batch_size(free_on(self.device), RESERVE, each, self.pace.most)


_M2M100 = (M2M100ForConditionalGeneration, M2M100Tokenizer)


def _target(tokenizer: Any) -> dict[str, Any]:
    """Marian's tokenizer joins pieces as its source language does unless told otherwise."""
    return {"use_source_tokenizer": False} if isinstance(tokenizer, MarianTokenizer) else {}
