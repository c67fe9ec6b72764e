"""What the caption job needs of a captioner, whichever it is; and which one lies in a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from handlers.caption.answers import answered
from handlers.caption.boxes import Utterance, parse
from handlers.caption.load import BLIP_2, FLORENCE_2, kind_of
from handlers.caption.match import Match, Matcher
from handlers.caption.model import Captioner
from handlers.caption.precision import Precision
from handlers.caption.prompts import QUESTION_TOKENS, Question, caption_prompt, is_instruction
from handlers.caption.speaking import Ask, Spoken


class Voice(Protocol):
    """A captioner as the job sees it: what it can be asked, what it says, what that means."""

    @property
    def precision(self) -> Precision:
        """How its weights are kept."""

    @property
    def is_scoring_cheap(self) -> bool:
        """Whether ``check: auto`` scores."""

    def caption(self, picture: int, mode: str, own: str | None, never: tuple[str, ...]) -> Ask:
        """What to ask for a caption.

        Args:
            picture: its place among the pictures.
            mode: ``brief`` or ``detailed``.
            own: a person's prompt in the mode's place.
            never: words that must not be said.

        Raises:
            Refusal: that cannot be asked at all.
            Waiting: this captioner cannot do it; the reason says what it can.
        """

    def question(self, picture: int, question: Question) -> Ask:
        """What to ask besides the caption.

        Raises:
            Refusal: that cannot be asked, or not of this captioner.
        """

    def speak(
        self, pictures: Sequence[Image.Image], asks: Sequence[Ask], halted: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[int, Spoken | BaseException]]:
        """Answer all that is asked, as ``Captioner.speak``."""

    def utterance(self, ask: Ask, said: Spoken) -> Utterance:
        """What was said for a caption, taken apart."""

    def answered(self, question: Question, ask: Ask, said: Spoken) -> dict[str, Any]:
        """A question with its answer, as the sidecar has it."""

    def require_scoring(self) -> None:
        """Check that it can say how well a text fits.

        Raises:
            Waiting: it cannot.
        """

    def score(self, said: Spoken, text: str | None) -> Match:
        """How well a person's text, or what was said, fits the picture.

        Raises:
            Waiting: this captioner cannot tell.
        """


class KosmosVoice:
    """Kosmos-2.

    Attributes:
        captioner: it.
    """

    def __init__(self, captioner: Captioner) -> None:
        self.captioner = captioner
        self._matcher = Matcher(captioner)

    @property
    def precision(self) -> Precision:
        """How its weights are kept."""
        return self.captioner.precision

    @property
    def is_scoring_cheap(self) -> bool:
        """Whether ``check: auto`` scores."""
        return self._matcher.is_cheap

    def caption(self, picture: int, mode: str, own: str | None, never: tuple[str, ...]) -> Ask:
        """What to ask for a caption. Raises ``Refusal`` where it cannot be asked."""
        prompt, most = caption_prompt(mode, own)
        return Ask(picture, prompt, most, never)

    def question(self, picture: int, question: Question) -> Ask:
        """What to ask besides. Raises ``Refusal`` where it cannot be asked."""
        return Ask(picture, question.prompt(), QUESTION_TOKENS)

    def speak(
        self, pictures: Sequence[Image.Image], asks: Sequence[Ask], halted: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[int, Spoken | BaseException]]:
        """Answer all that is asked, as ``Captioner.speak``."""
        return self.captioner.speak(pictures, asks, halted)

    def utterance(self, ask: Ask, said: Spoken) -> Utterance:
        """What was said for a caption, taken apart."""
        return parse(said.answer if is_instruction(ask.prompt) else said.raw)

    def answered(self, question: Question, ask: Ask, said: Spoken) -> dict[str, Any]:
        """A question with its answer, as the sidecar has it."""
        return answered(question, ask.prompt, said)

    def require_scoring(self) -> None:
        """It can."""

    def score(self, said: Spoken, text: str | None) -> Match:
        """How well a person's text, or what was said, fits the picture."""
        if said.latents is None:
            raise AssertionError("Kosmos-2 keeps what it saw")
        (found,) = self._matcher.scores(said.latents[None], [said.answer if text is None else f" {text}"])
        return found


def open_voice(folder: Path, device: str, precision: str = "auto") -> Voice:
    """The captioner in a transformers folder, loaded without the network.

    Raises:
        Refusal: there is no such precision, or this machine cannot have it.
        Waiting: the folder cannot be loaded.
    """
    kind = kind_of(folder)
    if kind is BLIP_2:
        from handlers.caption.blip2 import Blip2

        return Blip2.load(folder, device, precision)
    if kind is FLORENCE_2:
        from handlers.caption.florence2 import Florence2

        return Florence2.load(folder, device, precision)
    return KosmosVoice(Captioner.load(folder, device, precision))
