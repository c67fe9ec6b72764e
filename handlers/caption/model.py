"""Kosmos-2, loaded once: pictures in, raw grounded text out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import StoppingCriteriaList

from handlers.caption.batches import Pace, batch_size, picture_bytes
from handlers.caption.device import RESERVE, free_on, give_back, most_on
from handlers.caption.load import KOSMOS_2, Loaded, kind_of, load, require_square
from handlers.caption.precision import Precision
from handlers.caption.prompts import MOST_TOKENS
from handlers.caption.speaking import LONGEST_RUN, Ask, Halt, Interrupted, Spoken, speak_in_batches, spellings
from sessions.refusal import Refusal


class Captioner:
    """A loaded captioner on its device.

    Attributes:
        model: in eval mode.
        processor: of the same folder.
        precision: how its weights are kept.
        pace: how large its batches are.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        precision: Precision = "fp32",
        fitting: Callable[[], int] | None = None,
    ) -> None:
        """Wrap a model (in eval mode, on its device) and its processor.

        Args:
            model: Kosmos-2.
            processor: its processor.
            precision: how the weights are kept.
            fitting: () → how many pictures fit into memory now; None asks the device.

        Raises:
            Waiting: the processor does not stretch whole pictures to the model's square, so boxes would be wrong.
        """
        self.model = model
        self.processor = processor
        self.precision = precision
        self.side: int = model.config.vision_config.image_size
        require_square(processor, self.side)
        self.device: torch.device = model.device
        self.pace = Pace(most_on(self.device))
        self.fitting = fitting or self._fits
        self._layout = lru_cache(maxsize=256)(self._laid_out)

    @classmethod
    def load(cls, folder: Path, device: str, precision: Precision | str = "auto") -> Captioner:
        """Load a transformers folder, without the network.

        Raises:
            Refusal: it is another captioner, whose inside this cannot use.
            Waiting: the folder cannot be loaded, or not in this precision on this machine.
        """
        if (kind := kind_of(folder)) is not KOSMOS_2:
            what = f"This needs Kosmos-2, and the captioner in {folder} is {kind.name}."
            raise Refusal("captioner", what, f"Name kosmos-2 instead, or fetch it: {KOSMOS_2.fetch}")
        loaded: Loaded = load(folder, device, precision)
        return cls(loaded.model, loaded.processor, loaded.precision)

    def speak(
        self,
        pictures: Sequence[Image.Image],
        asks: Sequence[Ask],
        halted: Callable[[], bool] = lambda: False,
    ) -> Iterator[tuple[int, Spoken | BaseException]]:
        """Answer all that is asked: greedy, so the same picture always gives the same words.

        Answers come out batch by batch, as (place in ``asks``, what was said). Prompts of one length share a batch:
        padding, left or right, would change what the model says, so there is none. A picture is looked at once, however
        much is asked about it. Where memory runs out the batch is halved; what is too much alone comes out as an error.

        Args:
            pictures: upright, RGB, any size.
            asks: about them.
            halted: asked at every token; True ends the work.

        Raises:
            Interrupted: ``halted`` said so.
        """
        return speak_in_batches(pictures, asks, self, lambda images, batch: self.generate(images, batch, halted))

    @torch.inference_mode()
    def encode(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """What the model sees.

        Args:
            pictures: upright, RGB.

        Returns:
            [pictures, 64, width]: the latents that stand in the text for each picture.
        """
        return self.look(self.pixels(pictures)).latents

    def pixels(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """[pictures, 3, side, side], whole pictures stretched to the square, normalised, on the device."""
        values = self.processor.image_processor(list(pictures), return_tensors="pt")["pixel_values"]
        return values.to(self.device, self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the numbers that the model computes with."""
        return self.model.vision_model.model.embeddings.patch_embedding.weight.dtype

    def look(self, pixels: torch.Tensor) -> Seen:
        """The vision model and the resampler, as ``Kosmos2ForConditionalGeneration.forward`` joins them."""
        vision = self.model.vision_model.model
        patches = vision.post_layernorm(self.model.vision_model(pixels)[0])
        latents, attention = self.model.image_to_text_projection(torch.nn.functional.normalize(patches, dim=-1))
        return Seen(patches, latents, attention)

    def tokens(self, prompt: str) -> list[int]:
        """The ids of picture and prompt: <s> <image> 64 places </image> prompt."""
        return self._layout(prompt)[0]

    def picture_mask(self, prompt: str) -> list[int]:
        """1 where the picture's latents stand in ``tokens``."""
        return self._layout(prompt)[1]

    def _laid_out(self, prompt: str) -> tuple[list[int], list[int]]:
        # The processor lays pictures and words out, here around any picture. It wants one a prompt.
        blank = Image.new("RGB", (self.side, self.side))
        found = self.processor(text=[prompt], images=[blank])
        return list(found["input_ids"][0]), list(found["image_embeds_position_mask"][0])

    @torch.inference_mode()
    def generate(
        self, images: torch.Tensor, asks: Sequence[Ask], halted: Callable[[], bool] = lambda: False
    ) -> list[tuple[str, str]]:
        """Write on behind prompts of one length: (prompt and answer, answer) each.

        Args and raises: as ``write``.
        """
        return self.decode(self.write(images, asks, halted), asks[0].prompt)

    def decode(self, tokens: torch.Tensor, prompt: str) -> list[tuple[str, str]]:
        """(prompt and answer, answer) of each row of ``write``; the prompt stands for all of its length."""
        mask = self.picture_mask(prompt)
        # Text begins behind the picture's tokens and their closing tag.
        begin = max(index for index, inside in enumerate(mask) if inside) + 2
        decode = self.processor.tokenizer.batch_decode
        raws = decode(tokens[:, begin:], skip_special_tokens=True)
        answers = decode(tokens[:, len(mask) :], skip_special_tokens=True)
        return [(str(raw), str(answer)) for raw, answer in zip(raws, answers, strict=True)]

    @torch.inference_mode()
    def write(
        self, images: torch.Tensor, asks: Sequence[Ask], halted: Callable[[], bool] = lambda: False
    ) -> torch.Tensor:
        """The tokens of prompts of one length and of what follows them.

        Args:
            images: [asks, 64, width] from ``encode``.
            asks: with as many tokens each, the same ``most_tokens`` and ``never``.
            halted: asked at every token.

        Returns:
            [asks, tokens]; what ended before the longest is filled up behind its end.

        Raises:
            Interrupted: ``halted`` said so.
            ValueError: the prompts are not of one length.
        """
        ids = [self.tokens(ask.prompt) for ask in asks]
        if len({len(row) for row in ids}) > 1:
            raise ValueError("prompts of several lengths cannot share a batch")
        mask = [self.picture_mask(ask.prompt) for ask in asks]
        tokenizer = self.processor.tokenizer
        given = torch.tensor(ids, device=self.device)
        # `generate` reads the inner text model's generation config, whatever the outer one says: nothing is left to it.
        tokens: torch.Tensor = self.model.generate(
            image_embeds=images,
            input_ids=given,
            attention_mask=torch.ones_like(given),
            image_embeds_position_mask=torch.tensor(mask, device=self.device),
            max_new_tokens=asks[0].most_tokens,
            do_sample=False,
            num_beams=1,
            no_repeat_ngram_size=LONGEST_RUN,
            repetition_penalty=1.0,
            bad_words_ids=spellings(self.processor.tokenizer, asks[0].never) or None,
            use_cache=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            stopping_criteria=StoppingCriteriaList([Halt(halted)]),
        )
        if halted():
            raise Interrupted
        return tokens

    # Memory

    def _fits(self) -> int:
        text = self.model.config.text_config
        each = picture_bytes(
            layers=text.layers,
            width=text.embed_dim,
            feed_forward=text.ffn_dim,
            vocabulary=text.vocab_size,
            tokens=2 * self.model.config.latent_query_num + max(MOST_TOKENS.values()),
            element=self.dtype.itemsize,
        )
        return batch_size(free_on(self.device), RESERVE, each, self.pace.most)

    def recover(self) -> None:
        """Give memory back after it ran out."""
        give_back(self.device)


@dataclass(frozen=True)
class Seen:
    """What the eyes of the model make of pictures.

    Attributes:
        patches: [pictures, 1 + patches, vision width]: CLS and the patches, behind the last norm.
        latents: [pictures, 64, text width].
        attention: [pictures, heads, 64, 1 + patches + 64] of the resampler; None where sdpa keeps none.
    """

    patches: torch.Tensor
    latents: torch.Tensor
    attention: torch.Tensor | None
