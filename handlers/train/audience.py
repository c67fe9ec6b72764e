"""Who looks at a run, and what they are told when a process of it begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from handlers.context import JobContext
from handlers.train.board import Board
from handlers.train.charts import sample_name
from handlers.train.place import Place
from handlers.train.plan import Plan
from handlers.train.run import RunFolder
from handlers.train.viewers import Viewer, Viewers
from handlers.train.wandb_run import WandbRun
from sessions.layout import PREVIEWS


def invited(context: JobContext, place: Place, run: RunFolder, plan: Plan, done: int) -> Viewers:
    """TensorBoard, and Weights & Biases where fastsd.yaml names a project; they know all steps up to ``done``."""
    makers: dict[str, Callable[[], Viewer]] = {"TensorBoard": lambda: Board(place, run.run)}
    if project := context.payload.get("wandb"):
        makers["Weights & Biases"] = lambda: _wandb_run(context, place, run, plan, str(project))
    viewers = Viewers(makers, run.log)
    viewers.begin(run.metrics(), samples_until(place.now(), plan, done))
    return viewers


def _wandb_run(context: JobContext, place: Place, run: RunFolder, plan: Plan, project: str) -> WandbRun:
    # The same run whichever machine goes on with it, and no other session's.
    identity = f"{context.payload.get('session') or 'session'}-{run.run}"
    about: Mapping[str, Any] = plan.to_json()
    name = f"{place.now().name} {run.run}"
    return WandbRun(project, identity, name, plan=about, folder=context.cache / "wandb")


def samples_until(session: Path, plan: Plan, done: int) -> dict[int, Path]:
    """Step → sample grid, of those that this run has drawn in its first ``done`` steps."""
    before = 0 if plan.is_one_stage else plan.text_encoder_steps
    steps = range(before + plan.sample_every, done + 1, plan.sample_every) if plan.sample_every else range(0)
    found = {step: session / PREVIEWS / sample_name(step) for step in steps}
    return {step: path for step, path in found.items() if path.is_file()}
