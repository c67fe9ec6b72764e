"""When a training has gone wrong although its loss is still a number. Pure.

Losses of single steps say little: with one picture a step they differ a hundredfold by noise level alone. So medians of
many steps are compared, with what was usual at the stage's beginning, and with what a model costs that predicts nothing
at all. What decides is a fold over the losses of ``metrics.jsonl``: a resumed run knows what an undisturbed one knows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from sessions.refusal import Refusal

USUAL = 64
"""So many steps at a stage's beginning say what is usual there."""
RECENT = 32
"""So many steps in a row are looked at."""
TIMES = 10.0
"""The recent median is above so many times the usual one, and above nearly all that was usual."""
WORTHLESS = 5.0
"""The recent median is so many times what a model costs that predicts nothing: never right, however early."""
COLLAPSED = 0.7
"""Three of four losses are above so much of what a model costs that predicts nothing, for twice as many steps: a model
that knows something is nearly always far below, since it is right where there is much noise, or little."""
_NEARLY_ALL = 0.95
_HINT = 8  # steps that make one suspicious


class Diverged(Refusal):
    """The training diverged.

    Attributes:
        good_until: steps of the run that were done while all was well.
    """

    def __init__(self, what: str, advice: str, good_until: int) -> None:
        super().__init__("diverged", what, advice)
        self.good_until = good_until


@dataclass(frozen=True)
class Verdict:
    """Why a training is stopped.

    Attributes:
        level: the median of the recent losses.
        usual: the median at the stage's beginning, where the level is far above; else None.
        good_until: steps of the run done before the losses rose.
    """

    level: float
    usual: float | None
    good_until: int


class Watch:
    """Watches the losses of one stage.

    Args:
        nothing: what a step costs a model that predicts nothing, the variance of its target: 1 for noise and velocity,
            2 for flow; times 1 + the weight of class pictures, where they train along.
        past: losses of this stage's earlier steps, (steps of the run done, loss).
    """

    def __init__(self, nothing: float = 1.0, past: Iterable[tuple[int, float]] = ()) -> None:
        self._nothing = nothing
        self._usual: list[float] = []
        self._recent: deque[float] = deque(maxlen=2 * RECENT)
        self._suspected: int | None = None
        self._bound: float | None = None  # known once enough is known of what is usual
        for total, loss in past:
            self.note(total, loss)

    @property
    def suspected(self) -> int | None:
        """Steps of the run done before the last few losses began to look wrong; None where they do not.

        While they do is no moment to write over a good checkpoint.
        """
        return self._suspected

    def note(self, total: int, loss: float) -> Verdict | None:
        """Take a loss.

        Args:
            total: steps of the run that are done with this one.
            loss: of this step.

        Returns:
            Why the training is to be stopped; None where it goes on.
        """
        if len(self._usual) < USUAL:
            self._usual.append(loss)
            if len(self._usual) == USUAL:
                self._bound = max(TIMES * median(self._usual), sorted(self._usual)[int(_NEARLY_ALL * USUAL)])
        self._recent.append(loss)
        losses = list(self._recent)
        if not (self._is_collapsed(losses) or self._looks_wrong(losses[-_HINT:])):
            self._suspected = None
            return None
        if self._suspected is None:
            self._suspected = max(0, total - _HINT)
        level = median(losses[-RECENT:])
        if len(losses) >= RECENT and self._is_wrong(level):
            is_more = self._bound is not None and level > self._bound
            return Verdict(level, median(self._usual) if is_more else None, self._suspected)
        return Verdict(level, None, self._suspected) if self._is_collapsed(losses) else None

    def _is_wrong(self, level: float) -> bool:
        return level > WORTHLESS * self._nothing or (self._bound is not None and level > self._bound)

    def _looks_wrong(self, last: Sequence[float]) -> bool:
        is_high = sorted(last)[len(last) // 4] > COLLAPSED * self._nothing
        return len(last) == _HINT and (is_high or self._is_wrong(median(last)))

    def _is_collapsed(self, losses: Sequence[float]) -> bool:
        return len(losses) == 2 * RECENT and sorted(losses)[RECENT // 2] > COLLAPSED * self._nothing


def refusal_of(verdict: Verdict, title: str, section: str, rate: float, total: int) -> Diverged:
    """What people are told.

    Args:
        verdict: why.
        title: the stage's.
        section: of train.yaml: ``unet`` or ``text_encoder``.
        rate: the stage's learning rate.
        total: steps done in the run.
    """
    than = (
        f"{verdict.level / verdict.usual:.0f} times what it was at the beginning"
        if verdict.usual
        else "as bad as that of a model that predicts nothing"
    )
    what = (
        f"The training diverged ({title}): at step {total} the median loss of {RECENT} steps is {verdict.level:.3g}, "
        f"{than}. It rose from about step {verdict.good_until + 1} on, at a learning rate of {rate:g}."
    )
    return Diverged(what, smaller_rate(section, rate), verdict.good_until)


def smaller_rate(section: str, rate: float) -> str:
    """What to write into train.yaml instead."""
    return (
        f"Write a smaller {section}.learning_rate than {rate:g} into train.yaml, say {rate / 5:.2g}, and save it: "
        "that starts a new run."
    )
