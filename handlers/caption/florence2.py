"""Florence-2: captions, then where their phrases are; pointing at things and being pointed at them.

Xiao et al., "Florence-2: Advancing a Unified Representation for a Variety of Vision Tasks" (arXiv 2311.06242). It was
taught tasks, not prompts: what a task's word stands for is the processor's business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from handlers.caption.boxes import Utterance, without_tags
from handlers.caption.load import FLORENCE_2, require_square
from handlers.caption.locations import grounded, without_locations, written
from handlers.caption.others import OtherCaptioner
from handlers.caption.prompts import MOST_TOKENS, QUESTION_TOKENS, Question, caption_prompt
from handlers.caption.speaking import Ask, Interrupted, Spoken
from sessions.captions import one_line

_TASKS = {"brief": "<CAPTION>", "detailed": "<MORE_DETAILED_CAPTION>"}
_GROUND = "<CAPTION_TO_PHRASE_GROUNDING>"
_REFER = "<REGION_TO_DESCRIPTION>"
# A phrase takes about eight tokens with its box.
_GROUND_TOKENS = 256


class Florence2(OtherCaptioner):
    """Florence-2."""

    kind = FLORENCE_2
    abilities = "write brief and detailed captions with boxes, find a phrase, and describe a box"

    def __init__(self, model: Any, processor: Any, *rest: Any, **more: Any) -> None:
        """Wrap a model and its processor, as ``OtherCaptioner``.

        Raises:
            Waiting: the processor does not stretch whole pictures to a square, so boxes would be wrong.
        """
        side = dict(processor.image_processor.size).get("height") or 0
        require_square(processor, side, self.kind)
        super().__init__(model, processor, *rest, **more)

    def caption(self, picture: int, mode: str, own: str | None, never: tuple[str, ...]) -> Ask:
        """What to ask for a caption.

        Raises:
            Refusal: there is no such mode.
            Waiting: it takes no prompts of one's own.
        """
        caption_prompt(mode, own)  # what cannot be asked of anything
        if own and own.strip():
            raise self.cannot("go on from a prompt of one's own", "Leave caption.prompt out")
        return Ask(picture, _TASKS[mode], MOST_TOKENS[mode], never)

    def question(self, picture: int, question: Question) -> Ask:
        """What to ask besides.

        Raises:
            Refusal: it asks nothing, asks in words, or its box is none.
        """
        if question.kind == "ask":
            raise self.refuse("answer questions in words")
        question.prompt()  # an empty phrase and a box that is none are refused
        if question.kind == "refer":
            return Ask(picture, f"{_REFER}{written(question.box or (0, 0, 1, 1))}", QUESTION_TOKENS)
        return Ask(picture, f"{_GROUND}{_plain(question.text)}", QUESTION_TOKENS)

    def utterance(self, ask: Ask, said: Spoken) -> Utterance:
        """What was said, and where the phrases are."""
        if ask.prompt.startswith(_REFER):
            return Utterance(without_locations(said.answer), (), 0)
        is_pointing = ask.prompt.startswith(_GROUND)
        found, dropped = grounded(said.raw if is_pointing else said.raw[len(said.answer) :], self._banned())
        return Utterance("" if is_pointing else without_locations(said.answer), found, dropped)

    def encode(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """[pictures, places, width]."""
        return self.model.get_image_features(self.pixels(pictures)).pooler_output

    def answer(
        self, images: torch.Tensor, asks: Sequence[Ask], halted: Callable[[], bool]
    ) -> Sequence[tuple[str, str]]:
        """(answer and where its phrases are, answer) each; where nothing but a place was asked for, that twice."""
        said = self._written(images, asks, halted)
        answers = [
            text if ask.prompt.startswith(_GROUND) else _plain(text) for ask, text in zip(asks, said, strict=True)
        ]
        captions = [
            index
            for index, (ask, text) in enumerate(zip(asks, answers, strict=True))
            if ask.prompt in _TASKS.values() and text
        ]
        places = dict.fromkeys(range(len(asks)), "")
        if captions:
            second = [Ask(asks[index].picture, f"{_GROUND}{answers[index]}", _GROUND_TOKENS) for index in captions]
            places |= dict(zip(captions, self._written(images[captions], second, halted), strict=True))
        return [(text + places[index], text) for index, text in enumerate(answers)]

    def _written(self, images: torch.Tensor, asks: Sequence[Ask], halted: Callable[[], bool]) -> list[str]:
        """What follows each prompt. Shorter ones are filled up behind their end, which the encoder does not look at."""
        rows = [torch.tensor(self.tokens(ask.prompt)) for ask in asks]
        fill = self.processor.tokenizer.pad_token_id
        ids = pad_sequence(rows, batch_first=True, padding_value=fill).to(self.device)
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        mask = (torch.arange(ids.shape[1], device=self.device)[None] < lengths[:, None]).long()
        encoder = self.model.get_encoder()
        embedded = self.embedded(images, ids, self.model.config.image_token_id)
        tokens = self.model.generate(
            encoder_outputs=encoder(inputs_embeds=embedded, attention_mask=mask),
            attention_mask=mask,
            **self.options(asks[0], halted),
        )
        if halted():
            raise Interrupted
        # Places are no special tokens everywhere; what is special besides goes when the text is taken apart.
        decoded = self.processor.tokenizer.batch_decode(tokens, skip_special_tokens=False)
        return [_without_ends(str(text)) for text in decoded]

    def _banned(self) -> frozenset[str]:
        settings = self.processor.post_processor_config or {}
        return frozenset(settings.get("phrase_grounding", {}).get("banned_grounding_tokens", ()))


def _plain(text: str) -> str:
    """Words without tags. A caption that holds a task's word would be taken for that task."""
    return one_line(without_tags(without_locations(text)).replace("<", " ").replace(">", " "))


def _without_ends(text: str) -> str:
    for tag in ("<s>", "</s>", "<pad>"):
        text = text.replace(tag, "")
    return text.strip()
