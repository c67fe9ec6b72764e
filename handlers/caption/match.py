"""How well a text fits a picture: its likelihood with the picture, against its likelihood with none.

Kosmos-2 has no contrastive head, so nothing in it compares a picture with a text. But it can say how likely it would
have said the text: log P(text | picture) − log P(text | null picture), a token on average (Lin et al., "Revisiting the
Role of Language Priors in Vision-Language Models", arXiv 2306.01879). The second term takes out what is likely to be
said of any picture.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image

from handlers.caption.model import Captioner
from handlers.caption.prompts import BRIEF

# A text that the picture makes no likelier is about something else.
FITS_ABOVE = 0.0
# Small models score at once; on a CPU a real one takes about as long as for the caption itself.
_SMALL = 64_000_000


@dataclass(frozen=True)
class Match:
    """How well a text fits.

    Attributes:
        score: nats a token; above 0 the picture makes the text likelier.
        fits: whether it is above ``FITS_ABOVE``.
    """

    score: float

    @property
    def fits(self) -> bool:
        """Whether the text is about this picture."""
        return self.score > FITS_ABOVE

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {"score": round(self.score, 4), "fits": self.fits}


class Matcher:
    """Scores texts with a loaded captioner.

    Attributes:
        captioner: it.
    """

    def __init__(self, captioner: Captioner) -> None:
        self.captioner = captioner

    @cached_property
    def is_cheap(self) -> bool:
        """Whether ``check: auto`` scores: on a GPU, and where the model is small."""
        parameters = sum(weight.numel() for weight in self.captioner.model.parameters())
        return self.captioner.device.type == "cuda" or 0 < parameters <= _SMALL

    @cached_property
    def _nothing(self) -> torch.Tensor:
        """[64, width]: what the model sees in a grey square."""
        side = self.captioner.side
        return self.captioner.encode([Image.new("RGB", (side, side), (124, 116, 104))])[0]

    def scores(self, images: torch.Tensor, texts: Sequence[str], prompt: str = BRIEF) -> list[Match]:
        """Score a text a picture.

        Args:
            images: [texts, 64, width] from ``Captioner.encode``.
            texts: what follows the prompt: plain, or as the model said it, with tags, which do not count.
            prompt: what stands before them.
        """
        with_picture = self._likelihoods(images, texts, prompt)
        without = self._likelihoods(self._nothing.expand(len(texts), -1, -1), texts, prompt)
        return [Match(seen - blind) for seen, blind in zip(with_picture, without, strict=True)]

    @torch.inference_mode()
    def _likelihoods(self, images: torch.Tensor, texts: Sequence[str], prompt: str) -> list[float]:
        """Mean log-likelihood of the words of each text. Texts of one length share a batch: nothing is padded."""
        captioner = self.captioner
        begin = len(captioner.tokens(prompt))
        rows = [captioner.tokens(f"{prompt}{text}") for text in texts]
        groups: defaultdict[int, list[int]] = defaultdict(list)
        for index, row in enumerate(rows):
            groups[len(row)].append(index)
        found = [0.0] * len(texts)
        for indices in groups.values():
            for start in range(0, len(indices), captioner.pace.ceiling):
                chosen = indices[start : start + captioner.pace.ceiling]
                ids = torch.tensor([rows[index] for index in chosen], device=captioner.device)
                mask = captioner.picture_mask(f"{prompt}{texts[chosen[0]]}")
                logits = captioner.model(
                    image_embeds=images[chosen].contiguous(),
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    image_embeds_position_mask=torch.tensor([mask] * len(chosen), device=captioner.device),
                    use_cache=False,
                ).logits[:, begin - 1 : -1]
                said = ids[:, begin:]
                likely = logits.float().log_softmax(-1).gather(-1, said[..., None])[..., 0]
                words = self._are_words(said)
                means = (likely * words).sum(-1) / words.sum(-1).clamp_min(1)
                for index, mean in zip(chosen, means.tolist(), strict=True):
                    found[index] = mean
        return found

    def _are_words(self, ids: torch.Tensor) -> torch.Tensor:
        """1 for words, 0 for tags, patch indices and the end."""
        tokenizer = self.captioner.processor.tokenizer
        others = torch.tensor([*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids], device=ids.device)
        return (~torch.isin(ids, others)).float()
