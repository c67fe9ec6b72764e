"""Intermediate models (``save_every``): the finished folder of a step of its own, written once.

Such a folder appears whole in ``.fastsd/finished/<run>-step-N/``; the daemon has it converted and takes it away.
Whether step N was kept is asked of the tree, so that a run that does its steps again after a kill writes none twice:
the folder, else the manifest, which knows of the file before the folder goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from handlers.train.base import BaseModel
from handlers.train.charts import last_sample
from handlers.train.finish import finished_folder, metadata_of, write_adapters, write_kept
from handlers.train.place import Place
from handlers.train.plan import Plan
from sessions.layout import kept_name
from sessions.manifest import INTERMEDIATE, Manifest

if TYPE_CHECKING:
    from handlers.train.stages import Trainer


class Keeper:
    """Writes the intermediate models of a run.

    Args:
        place: the session.
        record: of run.json, with ``run``.
        base: what is trained.
        pipeline: of the base.
        trainer: has the models as they are.
    """

    def __init__(
        self, place: Place, record: Mapping[str, Any], base: BaseModel, pipeline: Any, trainer: Trainer
    ) -> None:
        self._place = place
        self._run = str(record["run"])
        self._record = record
        self._plan = Plan.from_json(record["plan"])
        self._base = base
        self._pipeline = pipeline
        self._trainer = trainer

    def lacks(self, step: int) -> bool:
        """Whether the model of a step of stage 2 was never written."""
        session = self._place.now()
        name = kept_name(self._run, step)
        return not finished_folder(session, name).is_dir() and Manifest.load(session).get(INTERMEDIATE, name) is None

    def keep(self, step: int, total: int) -> None:
        """Write the model as it is after a step: what the run would end with if it ended now.

        Args:
            step: of stage 2.
            total: steps done over both stages.

        Raises:
            OSError: there is no room.
        """
        plan, name = self._plan, kept_name(self._run, step)
        session = self._place.now()
        preview = last_sample(session, total)
        facts = {
            "run": name,
            "of": self._run,
            "step": step,
            "metadata": {**metadata_of(self._record, plan, total), "fastsd.step": step},
            "spec_record": self._record.get("spec_record"),
            "preview": preview.relative_to(session).as_posix() if preview else None,
        }
        dtype = self._base.finished_dtype()
        with self._trainer.result():
            if plan.is_adapter:
                adapters = self._trainer.adapters
                write_adapters(self._place, name, self._pipeline, adapters, plan=plan, dtype=dtype, kept=facts)
                return
            write_kept(
                self._place,
                name,
                self._base.training,
                self._pipeline,
                denoiser=self._trainer.denoiser,
                dtype=dtype,
                facts=facts,
            )
