"""What captioners other than Kosmos-2 share: batches, memory, forbidden words, and saying what they cannot do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from PIL import Image
from transformers import StoppingCriteriaList

from handlers.caption.batches import Pace, batch_size, picture_bytes
from handlers.caption.boxes import Utterance
from handlers.caption.clean import clean, place
from handlers.caption.device import RESERVE, free_on, give_back, most_on
from handlers.caption.load import Kind, load
from handlers.caption.match import Match
from handlers.caption.precision import Precision
from handlers.caption.prompts import MOST_TOKENS, Question
from handlers.caption.speaking import LONGEST_RUN, Ask, Halt, Spoken, speak_in_batches, spellings
from handlers.context import Waiting
from sessions.refusal import Refusal

_RETRY = 300.0


class OtherCaptioner(ABC):
    """A loaded captioner on its device.

    Attributes:
        kind: which one it is.
        abilities: what it can do, in words that end a sentence.
        model: in eval mode.
        processor: of the same folder.
        precision: how its weights are kept.
        pace: how large its batches are.
    """

    kind: ClassVar[Kind]
    abilities: ClassVar[str]
    # Nothing in these models says how well somebody else's words fit.
    is_scoring_cheap: ClassVar[bool] = False

    def __init__(
        self, model: Any, processor: Any, precision: Precision = "fp32", fitting: Callable[[], int] | None = None
    ) -> None:
        """Wrap a model (in eval mode, on its device) and its processor.

        Args:
            model: of ``kind``.
            processor: its processor.
            precision: how the weights are kept.
            fitting: () → how many pictures fit into memory now; None asks the device.
        """
        self.model = model
        self.processor = processor
        self.precision = precision
        self.device: torch.device = model.device
        self.pace = Pace(most_on(self.device))
        self.fitting = fitting or self._fits
        self._layout = lru_cache(maxsize=256)(self._laid_out)

    @classmethod
    def load(cls, folder: Path, device: str, precision: Precision | str = "auto") -> Self:
        """Load a transformers folder, without the network.

        Raises:
            Refusal: there is no such precision, or this machine cannot have it.
            Waiting: the folder cannot be loaded.
        """
        loaded = load(folder, device, precision, cls.kind)
        return cls(loaded.model, loaded.processor, loaded.precision)

    # What a captioner brings

    @abstractmethod
    def caption(self, picture: int, mode: str, own: str | None, never: tuple[str, ...]) -> Ask:
        """What to ask for a caption, as ``Voice.caption``."""

    @abstractmethod
    def question(self, picture: int, question: Question) -> Ask:
        """What to ask besides, as ``Voice.question``."""

    @abstractmethod
    def utterance(self, ask: Ask, said: Spoken) -> Utterance:
        """What was said, taken apart."""

    @abstractmethod
    def encode(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """What the model sees: [pictures, places in the text, width]."""

    @abstractmethod
    def answer(
        self, images: torch.Tensor, asks: Sequence[Ask], halted: Callable[[], bool]
    ) -> Sequence[tuple[str, str]]:
        """(raw, answer) for prompts of one length.

        Args:
            images: [asks, places, width] of ``encode``.
            asks: with as many tokens each, the same ``most_tokens`` and ``never``.
            halted: asked at every token.

        Raises:
            Interrupted: ``halted`` said so.
        """

    # What they share

    def speak(
        self, pictures: Sequence[Image.Image], asks: Sequence[Ask], halted: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[int, Spoken | BaseException]]:
        """Answer all that is asked, greedily, batch by batch, as (place in ``asks``, what was said).

        Prompts of one length share a batch. A picture is looked at once, however much is asked about it. Where memory
        runs out the batch is halved; what is too much alone comes out as an error.

        Args:
            pictures: upright, RGB, any size.
            asks: about them.
            halted: asked at every token; True ends the work.

        Raises:
            Interrupted: ``halted`` said so.
        """
        return speak_in_batches(pictures, asks, self, lambda images, batch: self.answer(images, batch, halted))

    def answered(self, question: Question, ask: Ask, said: Spoken) -> dict[str, Any]:
        """A question with its answer, as the sidecar has it."""
        utterance = self.utterance(ask, said)
        text = "" if question.kind == "ground" else clean(utterance.text) or ""
        return {
            **question.to_json(),
            "prompt": ask.prompt,
            "raw": said.raw,
            "answer": text,
            "entities": [entity.to_json() for entity in place(utterance.grounded, text)],
        }

    def require_scoring(self) -> None:
        """These captioners cannot tell how well a text fits.

        Raises:
            Waiting: always.
        """
        raise self.cannot("score how well a line fits its picture", "Leave caption.check at auto")

    def score(self, said: Spoken, text: str | None) -> Match:
        """As ``require_scoring``."""
        del said, text
        self.require_scoring()
        raise AssertionError("that raised")

    def cannot(self, wish: str, advice: str) -> Waiting:
        """What to raise where the settings ask for what this captioner lacks: the settings are at fault, no picture."""
        return Waiting(
            f"The captioner {self.kind.name} cannot {wish}: it can {self.abilities}. {advice}, "
            "or choose captioner: kosmos-2.",
            retry_after=_RETRY,
        )

    def refuse(self, wish: str) -> Refusal:
        """What to raise where a question asks for what this captioner lacks."""
        what = f"The captioner {self.kind.name} cannot {wish}."
        return Refusal("question", what, f"It can {self.abilities}. Ask kosmos-2 for the rest.")

    @property
    def dtype(self) -> torch.dtype:
        """The type of the numbers that the model computes with."""
        return self.model.get_input_embeddings().weight.dtype

    def pixels(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """[pictures, 3, height, width], whole pictures as the processor prepares them, on the device."""
        values = self.processor.image_processor(list(pictures), return_tensors="pt")["pixel_values"]
        return values.to(self.device, self.dtype)

    def options(self, ask: Ask, halted: Callable[[], bool]) -> dict[str, Any]:
        """How ``generate`` writes: greedily, every option given."""
        return {
            "max_new_tokens": ask.most_tokens,
            "min_length": 0,
            "do_sample": False,
            "num_beams": 1,
            "no_repeat_ngram_size": LONGEST_RUN,
            "repetition_penalty": 1.0,
            "bad_words_ids": spellings(self.processor.tokenizer, ask.never, before=("", " ")) or None,
            "use_cache": True,
            "stopping_criteria": StoppingCriteriaList([Halt(halted)]),
        }

    def embedded(self, images: torch.Tensor, ids: torch.Tensor, image_token: int) -> torch.Tensor:
        """[texts, tokens, width]: the tokens' embeddings, with what was seen in the picture's places.

        Raises:
            Waiting: the processor leaves another number of places than the model fills: they do not belong together.
        """
        embedded = self.model.get_input_embeddings()(ids)
        room = ids == image_token
        if (room.sum(-1) != images.shape[1]).any():
            reason = f"The captioner's processor leaves {int(room[0].sum())} places for a picture, and its model fills "
            reason += f"{images.shape[1]}. Fetch it again: {self.kind.fetch}"
            raise Waiting(reason, retry_after=_RETRY)
        places = room[..., None].expand_as(embedded)
        return embedded.masked_scatter(places, images.to(embedded.dtype))

    def tokens(self, prompt: str) -> list[int]:
        """The ids of picture and prompt."""
        return self._layout(prompt)

    def recover(self) -> None:
        """Give memory back after it ran out."""
        give_back(self.device)

    def _laid_out(self, prompt: str) -> list[int]:
        # The processor lays pictures and words out, here around any picture. It wants one a prompt.
        blank = Image.new("RGB", (8, 8))
        return list(self.processor(text=[prompt], images=[blank])["input_ids"][0])

    def _fits(self) -> int:
        text = self.model.config.text_config
        each = picture_bytes(
            layers=_first(text, "decoder_layers", "num_decoder_layers", "num_hidden_layers"),
            width=_first(text, "d_model", "hidden_size"),
            feed_forward=_first(text, "decoder_ffn_dim", "ffn_dim", "d_ff", "intermediate_size"),
            vocabulary=text.vocab_size,
            tokens=2 * len(self.tokens(self.caption(0, "brief", None, ()).prompt)) + max(MOST_TOKENS.values()),
            element=self.dtype.itemsize,
        )
        return batch_size(free_on(self.device), RESERVE, each, self.pace.most)


def _first(settings: Any, *names: str) -> int:
    return next(int(value) for name in names if (value := getattr(settings, name, None)))
