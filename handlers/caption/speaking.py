"""What a captioner is asked and says, and how much is asked at once, whichever captioner it is."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from PIL import Image
from transformers import StoppingCriteria

from handlers.caption.batches import Pace, in_batches
from handlers.caption.prompts import MOST_TOKENS

# Two things may be alike in all words, so the runs that may not come twice must be longer than a phrase with its tags.
# At 3, as often advised, "a small green heart and a small green moon" cannot be said.
LONGEST_RUN = 12


class Interrupted(Exception):  # noqa: N818 - it is no error
    """Generation ended early because it was asked to; there is no text."""


@dataclass(frozen=True)
class Ask:
    """One thing to say about one picture.

    Attributes:
        picture: its place in the list of pictures.
        prompt: with tags, such as ``prompts.BRIEF``.
        most_tokens: where the answer ends at the latest.
        never: words that must not be said.
    """

    picture: int
    prompt: str
    most_tokens: int = MOST_TOKENS["brief"]
    never: tuple[str, ...] = ()


@dataclass(frozen=True)
class Spoken:
    """What the model said about one picture.

    Attributes:
        raw: the prompt and what follows it, tags and all.
        answer: what follows the prompt.
        seconds: this answer's share of the time.
        latents: [64, width]: what the model saw; None where nothing asks for it again.
    """

    raw: str
    answer: str
    seconds: float
    latents: torch.Tensor | None = field(default=None, compare=False, repr=False)


class Halt(StoppingCriteria):
    """Ends generation at the next token once ``halted`` says so."""

    def __init__(self, halted: Callable[[], bool]) -> None:
        self._halted = halted

    def __call__(self, input_ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        """[texts]: whether each has ended."""
        return torch.full((input_ids.shape[0],), self._halted(), dtype=torch.bool, device=input_ids.device)


class Speaker(Protocol):
    """What ``speak_in_batches`` needs of a captioner.

    Attributes:
        pace: how large its batches are.
    """

    pace: Pace

    def tokens(self, prompt: str) -> list[int]:
        """The ids of picture and prompt."""

    def encode(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """What the model sees, a row a picture."""

    def fitting(self) -> int:
        """How many pictures fit into memory now."""

    def recover(self) -> None:
        """Give memory back after it ran out."""


def speak_in_batches(
    pictures: Sequence[Image.Image],
    asks: Sequence[Ask],
    speaker: Speaker,
    answer: Callable[[torch.Tensor, Sequence[Ask]], Sequence[tuple[str, str]]],
) -> Iterator[tuple[int, Spoken | BaseException]]:
    """Answer all that is asked, batch by batch, as (place in ``asks``, what was said).

    Prompts of one length share a batch: padding, left or right, would change what a model says, so there is none. A
    picture is looked at once, however much is asked about it. Where memory runs out the batch is halved; what is too
    much alone comes out as an error.

    Args:
        pictures: upright, RGB, any size.
        asks: about them.
        speaker: the captioner.
        answer: (what is seen, asks of one length, the same ``most_tokens`` and ``never``) → (raw, answer) each.

    Raises:
        Interrupted: ``answer`` said so.
    """
    seen: dict[int, torch.Tensor] = {}
    left = defaultdict[int, int](int)
    groups: defaultdict[tuple[int, int, tuple[str, ...]], list[int]] = defaultdict(list)
    for index, ask in enumerate(asks):
        left[ask.picture] += 1
        groups[len(speaker.tokens(ask.prompt)), ask.most_tokens, ask.never].append(index)

    def work(batch: Sequence[int]) -> list[Spoken]:
        start = time.perf_counter()
        with torch.inference_mode():
            new = list(dict.fromkeys(asks[index].picture for index in batch if asks[index].picture not in seen))
            if new:
                seen.update(zip(new, speaker.encode([pictures[index] for index in new]), strict=True))
            images = torch.stack([seen[asks[index].picture] for index in batch])
            texts = answer(images, [asks[index] for index in batch])
        each = (time.perf_counter() - start) / len(batch)
        return [Spoken(raw, said, each, image) for (raw, said), image in zip(texts, images, strict=True)]

    for indices in groups.values():
        for index, said in in_batches(indices, work, speaker.pace, speaker.fitting, speaker.recover):
            left[asks[index].picture] -= 1
            if not left[asks[index].picture]:
                seen.pop(asks[index].picture, None)
            yield index, said


def spellings(tokenizer: Any, never: Sequence[str], *, before: Sequence[str] = ("",)) -> list[list[int]]:
    """The token sequences in which forbidden words could be said: as written, small, with a capital, all in capitals.

    Args:
        tokenizer: the captioner's.
        never: the words.
        before: what may stand in front of one; a space too where the tokenizer makes another token of that.
    """
    forms = {
        start + form
        for word in never
        for form in (word, word.lower(), word.capitalize(), word.upper())
        if form.strip()
        for start in before
    }
    found = [tokenizer(form, add_special_tokens=False).input_ids for form in sorted(forms)]
    return [ids for ids in found if ids and tokenizer.unk_token_id not in ids]
