"""Which words a picture is trained with in a step: ``caption_dropout`` leaves them out, ``caption_shuffle`` turns them.

All that can be said is known before the first step, so that its embeddings are computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from handlers.train import randomness

# So many orders of one caption: enough that no order is learned, few enough to keep their embeddings.
_ORDERS = 8


def orders_of(prompt: str, seed: int, picture: int) -> list[str]:
    """A prompt, and orders of its parts between commas; the first part, which names the subject, stays in front.

    Args:
        prompt: of one picture.
        seed: the run's.
        picture: its index.
    """
    first, *rest = [part.strip() for part in prompt.split(",")]
    found = [prompt]
    for number in range(1, _ORDERS):
        random = randomness.generator(seed, 0, number, f"order of caption {picture}")
        order = torch.randperm(len(rest), generator=random).tolist()
        found.append(", ".join([first, *(rest[index] for index in order)]))
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Wording:
    """What can be said, and what is said when.

    Attributes:
        texts: all prompts.
        of_picture: picture → indices of its prompts among ``texts``.
        empty: the index of the empty prompt.
        subjects, class_pictures: how many come first, and after them; what follows is held out and keeps its words.
        dropout: how often a picture of the subject is trained without words, from 0 to 1.
        class_dropout: the same of a class picture.
        seed: the run's.
    """

    texts: Sequence[str]
    of_picture: Sequence[Sequence[int]]
    empty: int
    subjects: int
    class_pictures: int
    dropout: float
    class_dropout: float
    seed: int

    def of(self, stage: int, step: int, pictures: Sequence[int]) -> list[int]:
        """Indices among ``texts`` of what pictures are told in a step.

        Args:
            stage: the stage's number.
            step: counted from 0 within the stage.
            pictures: their indices.
        """
        return [self._one(stage, step, picture) for picture in pictures]

    def _one(self, stage: int, step: int, picture: int) -> int:
        known = self.of_picture[picture]
        dropout = self._dropout_of(picture)
        if not dropout and len(known) == 1:
            return known[0]
        random = randomness.generator(self.seed, stage, step, f"words of {picture}")
        left_out, turn = torch.rand(2, generator=random).tolist()
        return self.empty if left_out < dropout else known[min(int(turn * len(known)), len(known) - 1)]

    def _dropout_of(self, picture: int) -> float:
        if picture < self.subjects:
            return self.dropout
        return self.class_dropout if picture < self.subjects + self.class_pictures else 0.0


def wording(
    prompts: Sequence[str],
    subjects: int,
    class_pictures: int,
    *,
    dropout: float,
    class_dropout: float,
    shuffle: bool,
    seed: int,
) -> Wording:
    """What the pictures of a run can be told.

    Args:
        prompts: one a picture.
        subjects: so many pictures come first.
        class_pictures: so many come after them; what follows is held out.
        dropout: how often a picture of the subject is trained without words, from 0 to 1.
        class_dropout: the same of a class picture.
        shuffle: whether the parts of the subject's prompts change places.
        seed: the run's.
    """
    said = [
        orders_of(prompt, seed, picture) if shuffle and picture < subjects else [prompt]
        for picture, prompt in enumerate(prompts)
    ]
    texts = list(dict.fromkeys(text for each in said for text in each))
    if dropout or class_dropout:
        texts = list(dict.fromkeys([*texts, ""]))
    places = {text: index for index, text in enumerate(texts)}
    of_picture = [[places[text] for text in each] for each in said]
    return Wording(texts, of_picture, places.get("", 0), subjects, class_pictures, dropout, class_dropout, seed)
