"""BLIP-2: captions without boxes, own prompts, and questions.

Li et al., "BLIP-2: Bootstrapping Language-Image Pre-training with Frozen Image Encoders and Large Language Models"
(arXiv 2301.12597); the wording of questions is that of the paper's section 4.1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from PIL import Image

from handlers.caption.boxes import Utterance, without_tags
from handlers.caption.load import BLIP_2
from handlers.caption.others import OtherCaptioner
from handlers.caption.prompts import MODES, MOST_TOKENS, QUESTION_TOKENS, Question, caption_prompt, is_instruction
from handlers.caption.speaking import Ask, Interrupted, Spoken
from sessions.captions import one_line


class Blip2(OtherCaptioner):
    """BLIP-2 with either kind of language model (OPT, T5)."""

    kind = BLIP_2
    abilities = "write brief captions, go on from an own prompt, and answer questions, all without boxes"

    def caption(self, picture: int, mode: str, own: str | None, never: tuple[str, ...]) -> Ask:
        """What to ask for a caption: nothing, or a person's prompt.

        Raises:
            Refusal: there is no such mode, or the prompt holds a picture.
            Waiting: it was taught no detailed captions.
        """
        caption_prompt(mode, own)  # what cannot be asked of anything
        words = one_line(without_tags(own or ""))
        if mode == "detailed" and not words:
            raise self.cannot("write detailed captions", "Set mode: brief")
        return Ask(picture, words, MOST_TOKENS[mode if mode in MODES else "brief"], never)

    def question(self, picture: int, question: Question) -> Ask:
        """What to ask besides.

        Raises:
            Refusal: it asks nothing, or it asks for a place.
        """
        if question.kind != "ask":
            raise self.refuse("point at things, or be pointed at them")
        question.prompt()  # an empty one is refused
        return Ask(picture, f"Question: {one_line(without_tags(question.text))} Answer:", QUESTION_TOKENS)

    def utterance(self, ask: Ask, said: Spoken) -> Utterance:
        """What was said; it has no boxes."""
        is_part = bool(ask.prompt) and not is_instruction(ask.prompt)
        return Utterance(said.raw if is_part else said.answer, (), 0)

    def encode(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """[pictures, queries, width of the text]."""
        model = self.model
        patches = model.vision_model(self.pixels(pictures)).last_hidden_state
        queries = model.query_tokens.expand(len(pictures), -1, -1)
        # In half precision the library keeps these in fp32: each part gets the numbers that it computes with.
        seen = model.qformer(query_embeds=queries, encoder_hidden_states=patches.to(queries.dtype)).last_hidden_state
        return model.language_projection(seen.to(patches.dtype))

    def answer(
        self, images: torch.Tensor, asks: Sequence[Ask], halted: Callable[[], bool]
    ) -> Sequence[tuple[str, str]]:
        """(prompt and answer, answer) each."""
        ids = torch.tensor([self.tokens(ask.prompt) for ask in asks], device=self.device)
        embedded = self.embedded(images, ids, self.model.config.image_token_id)
        # As the library's own generate joins them: a decoder alone gives the prompt's tokens back, too.
        writer = self.model.language_model
        prompt = {} if writer.config.is_encoder_decoder else {"input_ids": ids}
        tokens = writer.generate(
            inputs_embeds=embedded,
            attention_mask=torch.ones_like(ids),
            **prompt,
            **self.options(asks[0], halted),
        )[:, ids.shape[1] if prompt else 0 :]
        if halted():
            raise Interrupted
        answers = self.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        pairs = zip(asks, map(str, answers), strict=True)
        return [(f"{ask.prompt} {answer.lstrip()}" if ask.prompt else answer, answer) for ask, answer in pairs]
