"""What happens between two steps: progress, metrics, checkpoints, samples, and the wish to stop."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from PIL import Image

from handlers.context import JobContext, Stopping
from handlers.out_of_memory import is_out_of_memory
from handlers.pipe import resident_bytes
from handlers.train import charts, checkpoint
from handlers.train.divergence import Watch, refusal_of
from handlers.train.intermediate import Keeper
from handlers.train.loop import Done, Stage
from handlers.train.place import Place, folder_in
from handlers.train.plan import Plan
from handlers.train.run import RunFolder
from handlers.train.validation import is_due
from handlers.train.viewers import Viewers
from sessions.layout import PREVIEWS

_FLUSH_SECONDS = 5.0
_CHART_SECONDS = 30.0


class Notes(Protocol):
    """What a training tells of its steps."""

    def after_step(self, done: Done, finished_parts: Mapping[str, checkpoint.Tensors]) -> None:
        """A step was done; tensors of earlier stages are what a checkpoint needs too."""

    def save(self, total: int, stage: int, parts: Mapping[str, checkpoint.Tensors]) -> None:
        """Keep a checkpoint."""

    def stop_if_wished(self) -> None:
        """Raise ``Stopping`` if the daemon stops."""


class Silence:
    """Notes of one who follows: the first of the crew takes them."""

    def after_step(self, done: Done, finished_parts: Mapping[str, checkpoint.Tensors]) -> None:
        """Nothing."""

    def save(self, total: int, stage: int, parts: Mapping[str, checkpoint.Tensors]) -> None:
        """Nothing."""

    def stop_if_wished(self) -> None:
        """Never: the first one's end is everybody's."""


class Recorder:
    """Keeps what a run shows and what it resumes from.

    Args:
        context: the job.
        place: the session.
        run: the run's folder.
        plan: the run's plan.
        draw: draws samples of the models as they are; an empty list where it was stopped.
        keeper: writes intermediate models.
        spent: seconds that earlier processes spent on this run.
        worthless: what a picture costs a model that predicts nothing.
        viewers: who else is told of every step.
        measure: gives the loss of held-out pictures; None where there are none.
        decided: what ``auto`` became, for the status.
    """

    def __init__(
        self,
        context: JobContext,
        place: Place,
        run: RunFolder,
        plan: Plan,
        *,
        draw: Callable[[], list[Image.Image]],
        keeper: Keeper,
        spent: float,
        worthless: float,
        viewers: Viewers,
        measure: Callable[[Stage], float] | None = None,
        decided: Sequence[str] = (),
    ) -> None:
        self._context = context
        self._place = place
        self._run = run
        self._plan = plan
        self._draw = draw
        self._decided = list(decided)
        self._keeper = keeper
        self._worthless = worthless
        self._viewers = viewers
        self._measure = measure
        self._watch: Watch | None = None
        self._watched = 0
        self._validation: dict[str, float] = {}
        for row in run.metrics():
            if row.get("validation_loss") is not None:
                self._validation = {"validation_loss": row["validation_loss"], "validation_step": row["step"]}
        self._began = time.monotonic() - spent
        self._saved = self._flushed = self._charted = time.monotonic()
        self._durations: deque[float] = deque(maxlen=50)
        self._losses: deque[float] = deque(maxlen=50)
        self._last = time.monotonic()
        self._kept = 0

    @property
    def seconds(self) -> float:
        """Seconds spent on this run, those of earlier processes included."""
        return time.monotonic() - self._began

    def good_until(self, steps: int) -> int:
        """Of so many steps of the run, those that were done while all looked well."""
        suspected = self._watch.suspected if self._watch else None
        return steps if suspected is None else min(steps, suspected)

    def after_step(self, done: Done, finished_parts: Mapping[str, checkpoint.Tensors]) -> None:
        """Take note of a step, and save, draw or stop if it is time.

        Args:
            done: the step.
            finished_parts: tensors of earlier stages that a checkpoint needs too.

        Raises:
            Cancelled, Stopping: as the daemon wishes; the state is saved before ``Stopping``.
            Diverged: the losses rose so much that nothing good will come of it.
        """
        now = time.monotonic()
        self._durations.append(now - self._last)
        self._losses.append(done.loss)
        watch = self._watch_of(done.stage)
        self._note(done)
        if verdict := watch.note(done.total, done.loss):
            raise refusal_of(verdict, done.stage.title, done.stage.section, done.stage.rate.value, done.total)
        # Before the checkpoint: a run that goes on from it does not come by here again.
        is_shown = self._keep(done)
        is_last = done.step == done.stage.steps
        stopping = self._context.is_stopping()
        # The end of stage 1 is saved by whoever knows what is kept of it; the end of the run is its result.
        ends_stage_1 = is_last and done.stage.number == 1
        if (stopping and not ends_stage_1) or (not is_last and self._is_due(done.total) and watch.suspected is None):
            self.save(done.total, done.stage.number, {**finished_parts, **_parts(done)})
        if not ends_stage_1:
            self.stop_if_wished()
        if now - self._flushed > _FLUSH_SECONDS:
            self._run.flush()
            self._viewers.flush()
            self._flushed = now
        every = self._plan.sample_every
        if done.stage.number == 2 and not is_last and not is_shown and every and done.step % every == 0:
            self.show(done.total)
        elif now - self._charted > _CHART_SECONDS:
            self.chart()
        self._last = time.monotonic()

    def _keep(self, done: Done) -> bool:
        """Keep the model of a step where it is due and not there yet. Returns whether samples of it were drawn."""
        if done.stage.number != 2 or done.step not in self._plan.kept_steps or not self._keeper.lacks(done.step):
            return False
        self._context.progress(done.total, self._plan.total_steps, f"keeping the model of step {done.step}")
        is_shown = bool(self._plan.sample_every)
        if is_shown:
            self.show(done.total)  # people choose by these, and the file carries them
        self._keeper.keep(done.step, done.total)
        self._kept += 1
        self._run.log(f"kept the model of step {done.step}")
        return is_shown

    def stop_if_wished(self) -> None:
        """Raise ``Stopping`` if the daemon stops; the caller has just saved."""
        if self._context.is_stopping():
            raise Stopping

    def _watch_of(self, stage: Stage) -> Watch:
        """Watches the stage; it knows the losses of its earlier steps, whichever process did them."""
        if self._watch is None or self._watched != stage.number:
            past = [(row["step"], float(row["loss"])) for row in self._run.metrics() if row["stage"] == stage.number]
            of_class = self._plan.prior_weight if self._plan.prior_images else 0.0
            self._watch, self._watched = Watch(self._worthless * (1.0 + of_class), past), stage.number
        return self._watch

    def _measured(self, done: Done) -> float | None:
        """The loss of the held-out pictures, where there are some and it is time."""
        is_last = done.step == done.stage.steps
        if self._measure is None or not (is_last or is_due(done.total, self._plan.total_steps)):
            return None
        try:
            return self._measure(done.stage)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._run.log(f"held-out pictures were not measured at step {done.total}: memory ran out")
            return None

    def _note(self, done: Done) -> None:
        total = self._plan.total_steps
        seconds = sum(self._durations) / len(self._durations)
        logged = ""
        if done.step in (1, done.stage.steps) or done.total % max(1, total // 100) == 0:
            logged = f"step {done.total}/{total} stage {done.stage.number} loss {done.loss:.5f}"
        memory = memory_used(self._context.device)
        row: dict[str, Any] = {
            "step": done.total,
            "stage": done.stage.number,
            "loss": done.loss,
            "learning_rate": done.rate,
            "seconds": round(self._durations[-1], 6),
            "memory": next(iter(memory.values())),
            "at": round(time.time(), 3),
        }
        if len(done.stage.rates) > 1:
            schedule = self._plan.schedule
            row["rates"] = {part: rate.at(done.step - 1, schedule) for part, rate in done.stage.rates.items()}
        measured = self._measured(done)
        if measured is not None:
            row["validation_loss"] = measured
            self._validation = {"validation_loss": measured, "validation_step": done.total}
            logged = f"step {done.total}/{total} stage {done.stage.number} loss {done.loss:.5f} held out {measured:.5f}"
        self._run.add_step(row, logged)
        self._viewers.note(row)
        self._context.progress(
            done.total,
            total,
            done.stage.title,
            loss=sum(self._losses) / len(self._losses),
            seconds_per_step=seconds,
            eta=seconds * (total - done.total),
            stage=done.stage.number,
            decided=self._decided,
            **memory,
            **self._validation,
            kept=self._kept,
        )

    def _is_due(self, total: int) -> bool:
        if self._plan.checkpoint_steps is not None:
            return total % self._plan.checkpoint_steps == 0
        return time.monotonic() - self._saved >= (self._plan.checkpoint_seconds or 600.0)

    def save(self, total: int, stage: int, parts: Mapping[str, checkpoint.Tensors]) -> None:
        """Write a checkpoint; the metrics up to it are on the disk before it is."""
        self._run.flush()
        state = {"run": self._run.run, "stage": stage, "seconds": self.seconds}
        folder = self._place.write(lambda session: checkpoint.save(session, total, parts, state))
        self._run.log(f"saved {folder.name}")
        self._saved = self._flushed = time.monotonic()

    def show(self, total: int) -> None:
        """Draw samples and the loss curve into previews/; where memory does not suffice, samples are left out."""
        try:
            pictures = self._draw()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._run.log(f"no samples at step {total}: memory ran out while they were drawn")
            pictures = []
        if pictures:
            prompts = self._plan.prompts
            shown = [prompts[index % len(prompts)] for index in range(len(pictures))]
            sheet = charts.grid(pictures, shown, columns=len(prompts))
            self._place.write(
                lambda session: charts.write_grid(folder_in(session, PREVIEWS) / charts.sample_name(total), sheet),
            )
            self._viewers.show(total, self._place.now() / PREVIEWS / charts.sample_name(total))
        self.chart()

    def chart(self) -> None:
        """Draw the loss curve into previews/loss.png."""
        rows = self._run.metrics()
        if rows:
            self._place.write(lambda session: charts.write_loss_curve(folder_in(session, PREVIEWS) / "loss.png", rows))
        self._charted = time.monotonic()


def memory_used(device: str) -> dict[str, int]:
    """``memory``: bytes that this process holds; on a GPU ``gpu_memory``, the most that torch held of it."""
    if device.startswith("cuda"):
        return {"gpu_memory": int(torch.cuda.max_memory_reserved(device))}
    return {"memory": resident_bytes()}


def _parts(done: Done) -> dict[str, dict[str, torch.Tensor]]:
    return {
        **{name: trained.tensors() for name, trained in done.stage.trained.items()},
        **done.state(),
    }
