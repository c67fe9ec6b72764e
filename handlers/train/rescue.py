"""What is saved of a training that diverged: the last good checkpoint, as a model if it is one.

A diverged run is over, and another begins from the base. What it had learned until then is kept as ``save_every`` keeps
intermediate models: people can look at it, promote it, or go on from it with ``continue``.
"""

from __future__ import annotations

from handlers.train import checkpoint
from handlers.train.checkpoint import Checkpoint
from handlers.train.divergence import Diverged
from handlers.train.intermediate import Keeper
from handlers.train.place import Place
from handlers.train.plan import Plan
from handlers.train.run import RunFolder
from handlers.train.stages import Trainer
from sessions.layout import RUNS, kept_name


def with_what_was_saved(
    diverged: Diverged, good: Checkpoint | None, run: RunFolder, plan: Plan, *, trainer: Trainer, keeper: Keeper
) -> Diverged:
    """Keep what the run had learned while all was well.

    Args:
        diverged: how the training ended.
        good: the last good checkpoint; None where there is none.
        run: the run.
        plan: the run's.
        trainer: was interrupted; its models become those of the checkpoint.
        keeper: writes the model.

    Returns:
        The same, whose advice says what is left.
    """
    if good is None:
        return _advising(diverged, "No checkpoint was written before that.")
    kept = f"The last good checkpoint is {good.folder.parent.name}/{good.folder.name}; it is kept."
    step = good.step - plan.stage_1_steps
    if step <= 0:
        return _advising(diverged, kept)  # a text encoder alone is no model
    name = kept_name(run.run, step)
    if keeper.lacks(step):
        try:
            trainer.recall(good)
            keeper.keep(step, good.step)
        except OSError as error:
            run.log(f"the model of step {step} could not be kept: {error.strerror}")
            return _advising(diverged, kept)
        run.log(f"kept the model of step {step}, the last good one")
    more = f"Its model comes to lie in {RUNS}/{run.run}. To begin with it, write `continue: {name}` and leave base out."
    return _advising(diverged, f"{kept} {more}")


def last_good(place: Place, run: RunFolder, good_until: int) -> Checkpoint | None:
    """The newest checkpoint of at most so many steps that is whole and finite."""
    at_most = good_until
    while found := checkpoint.newest(place.now(), run.run, lambda _folder, _why: None, at_most):
        if found.is_finite():
            return found
        at_most = found.step - 1
    return None


def _advising(diverged: Diverged, more: str) -> Diverged:
    return Diverged(diverged.what, f"{diverged.advice} {more}", diverged.good_until)
