"""Where the model looked while it said each word: its attention, composed and laid over the picture.

Text is generated as always, then replayed once with plain ("eager") attention, which alone gives the weights away. The
row of the decoder's attention that predicts a token, over the 64 columns of the picture's latents, tells which latents
the token was read from; the resampler's attention tells which patches a latent was made of. Their product is a map:

    heat[t] = mean over layers and heads (text[l, h, t − 1, latents]) @ mean over heads (resampler[h, :, patches])

Rows are normalised to 1. What the vision model mixed among the patches before is not in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from handlers.caption.boxes import Utterance, parse
from handlers.caption.model import Captioner
from handlers.caption.speaking import Ask

_WORD_BEGINS = "▁"
_INSIDE_WORDS = ("'", "’", "-")


@dataclass(frozen=True)
class Word:
    """One word and the tokens that it was said with.

    Attributes:
        text: without white space.
        tokens: their places among the answer's tokens.
        phrase: which grounded phrase it belongs to; None for words between the phrases.
    """

    text: str
    tokens: tuple[int, ...]
    phrase: int | None


@dataclass(frozen=True)
class Attention:
    """What was said about a picture, and where the model looked. T tokens of the answer, N × N patches, W words.

    Attributes:
        raw: prompt and answer, tags and all.
        utterance: taken apart.
        words: in order.
        heat: [W, N, N] float32, each word's map sums to 1.
        tokens: [T] the answer's ids.
        token_heat: [T, N, N] float32.
        text: [layers, heads, T, 64] float32: the decoder's attention to the latents.
        resampler: [heads, 64, 1 + N · N + 64] float32: the latents' attention to CLS, patches and latents.
    """

    raw: str
    utterance: Utterance
    words: tuple[Word, ...]
    heat: np.ndarray
    tokens: np.ndarray
    token_heat: np.ndarray
    text: np.ndarray
    resampler: np.ndarray

    def phrase_heat(self, phrase: int) -> np.ndarray:
        """[N, N]: the mean map of a grounded phrase's words; of zeros where it has none."""
        own = [self.heat[index] for index, word in enumerate(self.words) if word.phrase == phrase]
        return np.mean(own, axis=0) if own else np.zeros(self.heat.shape[1:], np.float32)

    def arrays(self) -> dict[str, np.ndarray]:
        """What ``--npz`` keeps; strings as arrays of text."""
        grounded = self.utterance.grounded
        rows = [(index, *box) for index, item in enumerate(grounded) for box in item.boxes]
        return {
            "words": np.array([word.text for word in self.words]),
            "word_phrase": np.array([-1 if word.phrase is None else word.phrase for word in self.words], np.int64),
            "heat": self.heat,
            "tokens": self.tokens,
            "token_heat": self.token_heat,
            "text_attention": self.text,
            "resampler_attention": self.resampler,
            "phrases": np.array([item.phrase for item in grounded]),
            "boxes": np.array(rows, np.float32).reshape(-1, 5),
            "raw": np.array(self.raw),
        }


def attend(captioner: Captioner, picture: Image.Image, ask: Ask) -> Attention:
    """Say something about a picture and look where the model looked.

    Args:
        captioner: loaded.
        picture: upright, RGB.
        ask: what to say; its ``picture`` does not matter.
    """
    pixels = captioner.pixels([picture])
    with torch.inference_mode():
        tokens = captioner.write(captioner.look(pixels).latents, [ask])[0]
        with _eager(captioner.model):
            seen = captioner.look(pixels)
            outputs = captioner.model(
                image_embeds=seen.latents,
                input_ids=tokens[None],
                attention_mask=torch.ones_like(tokens[None]),
                image_embeds_position_mask=_mask(captioner, ask.prompt, len(tokens)),
                output_attentions=True,
                use_cache=False,
            )
    begin = len(captioner.tokens(ask.prompt))
    columns = _mask(captioner, ask.prompt, len(tokens))[0].bool()
    # The row that predicts a token stands one before it.
    text = (
        torch.stack([layer[0, :, begin - 1 : -1][..., columns] for layer in outputs.attentions]).float().cpu().numpy()
    )
    if seen.attention is None:
        raise RuntimeError("the resampler gave no attention away")
    resampler = seen.attention[0].float().cpu().numpy()
    token_heat = composed(text, resampler)
    raw, _ = captioner.decode(tokens[None], ask.prompt)[0]
    utterance = parse(raw)
    words = grounded_only(words_of(captioner.processor.tokenizer, tokens[begin:].tolist()), utterance)
    side = token_heat.shape[-1]
    heat = np.array([token_heat[list(word.tokens)].mean(axis=0) for word in words], np.float32)
    return Attention(
        raw=raw,
        utterance=utterance,
        words=words,
        heat=heat.reshape(-1, side, side),
        tokens=tokens[begin:].cpu().numpy(),
        token_heat=token_heat,
        text=text,
        resampler=resampler,
    )


def composed(text: np.ndarray, resampler: np.ndarray) -> np.ndarray:
    """The maps of patches.

    Args:
        text: [layers, heads, T, latents].
        resampler: [heads, latents, 1 + N · N + latents].

    Returns:
        [T, N, N] float32, each sums to 1.
    """
    latents = text.shape[-1]
    patches = resampler.shape[-1] - 1 - latents
    side = round(patches**0.5)
    heat = text.mean(axis=(0, 1)) @ resampler.mean(axis=0)[:, 1 : 1 + patches]
    total = heat.sum(axis=-1, keepdims=True)
    return (heat / np.where(total > 0, total, 1)).reshape(-1, side, side).astype(np.float32)


def mass_inside(heat: np.ndarray, box: Sequence[float]) -> float:
    """How much of a map [N, N] lies in a box (x0, y0, x1, y1 in 0..1); patches that the box cuts count in part.

    An even map has the box's area in it: that is chance.
    """
    side = heat.shape[-1]
    edges = np.arange(side)
    across, down = (
        np.clip(np.minimum(edges + 1, high * side) - np.maximum(edges, low * side), 0, 1)
        for low, high in ((box[0], box[2]), (box[1], box[3]))
    )
    return float((heat * down[:, None] * across[None]).sum() / max(float(heat.sum()), 1e-12))


def words_of(tokenizer: Any, ids: Sequence[int]) -> tuple[Word, ...]:
    """The words of an answer's tokens: no tags, no patch indices, no punctuation; ``phrase`` counts all phrases."""
    pieces = tokenizer.convert_ids_to_tokens(list(ids))
    tags = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    words: list[Word] = []
    phrase: int | None = None
    phrases = -1
    open_ = False  # whether the next piece may belong to the last word
    for place, (token, piece) in enumerate(zip(ids, pieces, strict=True)):
        if token in tags:
            open_ = False
            if piece == "<phrase>":
                phrases += 1
                phrase = phrases
            elif piece == "</phrase>":
                phrase = None
            continue
        letters = piece.replace(_WORD_BEGINS, " ").strip()
        if not any(letter.isalnum() for letter in letters) and letters not in _INSIDE_WORDS:
            open_ = False
            continue
        if piece.startswith(_WORD_BEGINS) or not open_:
            words.append(Word(letters, (place,), phrase))
        else:
            last = words[-1]
            words[-1] = Word(last.text + letters, (*last.tokens, place), last.phrase)
        open_ = True
    return tuple(word for word in words if any(letter.isalnum() for letter in word.text))


def grounded_only(words: Sequence[Word], utterance: Utterance) -> tuple[Word, ...]:
    """The words with ``phrase`` as the place among the grounded phrases: those that have no valid box do not count."""
    said: dict[int, str] = {}
    for word in words:
        if word.phrase is not None:
            said[word.phrase] = said.get(word.phrase, "") + _letters(word.text)
    places: dict[int | None, int] = {}
    ahead = 0
    for phrase in sorted(said):
        if ahead < len(utterance.grounded) and _letters(utterance.grounded[ahead].phrase) == said[phrase]:
            places[phrase] = ahead
            ahead += 1
    return tuple(replace(word, phrase=places.get(word.phrase)) for word in words)


def _letters(text: str) -> str:
    return "".join(letter for letter in text if letter.isalnum())


def _mask(captioner: Captioner, prompt: str, length: int) -> torch.Tensor:
    """[1, length]: 1 where the picture's latents stand."""
    mask = captioner.picture_mask(prompt)
    return torch.tensor([mask + [0] * (length - len(mask))], device=captioner.device)


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    """Plain attention, which keeps its weights; afterwards what was there before."""
    configurations = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    before = {key: configuration._attn_implementation for key, configuration in configurations.items()}  # noqa: SLF001
    try:
        for configuration in configurations.values():
            configuration._attn_implementation = "eager"  # noqa: SLF001
        yield
    finally:
        for key, configuration in configurations.items():
            configuration._attn_implementation = before[key]  # noqa: SLF001
