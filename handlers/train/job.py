"""A training from its payload to the finished folder: prepare or resume, stage 1, stage 2, finish."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from handlers.context import Cancelled, JobContext, JobResult
from handlers.convert.quiet import quiet_libraries
from handlers.train import begin, checkpoint, dataset, room
from handlers.train.audience import invited
from handlers.train.base import BaseModel, find_base
from handlers.train.charts import last_sample
from handlers.train.crew import Crew, crew_of
from handlers.train.divergence import Diverged
from handlers.train.finish import finished_folder, metadata_of, trained_on, write_adapters, write_finished
from handlers.train.further import adapter_of_run, base_of_run
from handlers.train.intermediate import Keeper
from handlers.train.objective import Material
from handlers.train.place import Place
from handlers.train.plan import Plan
from handlers.train.recorder import Recorder, Silence
from handlers.train.rescue import last_good, with_what_was_saved
from handlers.train.run import RunFolder, now
from handlers.train.stages import Trainer
from handlers.train.vae import put_in, require_same
from handlers.train.validation import Validation
from handlers.train.wording import wording
from sessions.layout import PRIVATE
from sessions.refusal import Refusal


class TrainHandler:
    """DreamBooth in two stages, resumable at any step."""

    def run(self, context: JobContext) -> JobResult:
        """Train one run, or go on with it.

        Payload: ``folder``, ``root``, ``session``, ``run``, ``name``, ``spec``, ``spec_record``, ``base``, ``models``,
        ``pictures``: ``source``, ``sha256``, ``box``, ``caption``, and where known ``caption_by`` (``person``),
        ``subject``, ``noun`` (the grounded phrase); ``disk_reserve``: bytes to leave free; ``continued``: ``run`` and
        ``model`` (a file in the session) to train on from; ``devices`` that share the steps, the first of them this
        worker's. A run that has its
        ``run.json`` needs neither ``spec``, ``base`` nor ``pictures``.

        Raises:
            Refusal: too few pictures, too little disk or memory, a wrong combination, or the training diverged.
            Waiting: the base, or the VAE that is named, is not on this machine.
            Stopping, Cancelled: as the daemon wishes.
        """
        quiet_libraries()
        payload = context.payload
        session = payload.get("session")
        place = Place(Path(payload["folder"]), Path(payload["root"]), str(session) if session else None)
        run = RunFolder(place, str(payload["run"]))
        record = run.read_record()
        if record and record.get("state") == "finished" and finished_folder(place.now(), run.run).is_dir():
            return _result(place, record)
        models = payload.get("models")
        # A run that began goes by what it wrote down, whatever became of the train.yaml and the pictures.
        name = str(record["base"]["name"] if record else payload["base"])
        continued = record.get("continued") if record else payload.get("continued")
        if continued:
            base = base_of_run(place.now(), continued, Path(models) if models else None, context.cache)
        else:
            base = find_base(name, Path(models) if models else None, context.cache, room.gpu_bytes(context.device))
        try:
            with _threads_for(base, context.device):
                return _train(context, place, run, base, record)
        except Cancelled:
            with suppress(FileNotFoundError):
                _clean_up(place, run)
            raise
        except torch.OutOfMemoryError as error:
            # Loading a model, encoding a picture: it would be the same the next time, and the one after.
            said = str(error).partition(". ")[0]
            raise Refusal(
                "memory",
                f"The GPU's memory ran out where nothing can be given up: {said}.",
                "Close other programs that use the GPU, or write a smaller resolution or method: lora into train.yaml.",
            ) from error
        except FileNotFoundError:
            if place.is_gone():
                raise Cancelled from None  # someone deleted the session: there is nothing left to train for
            raise
        except Diverged as diverged:
            run.flush()
            run.write_record({**(run.read_record() or {}), "state": "failed", "reason": str(diverged)})
            run.log(str(diverged))
            raise


@contextmanager
def _threads_for(base: BaseModel, device: str) -> Iterator[None]:
    """One thread for a miniature on the CPU: its tensors are so small that two threads wait for each other.

    Measured on two cores: 780 steps in 389 s with two threads, 500 in 120 s with one.
    """
    before = torch.get_num_threads()
    if base.facts.miniature and device == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train(
    context: JobContext, place: Place, run: RunFolder, base: BaseModel, record: dict[str, Any] | None
) -> JobResult:
    device = context.device
    pipeline = base.load_pipeline()
    vae = _other_vae(context, base, pipeline, record)
    if record is None:
        record, frozen = begin.prepare(context, place, run, base, pipeline, vae=vae)
    else:
        frozen = begin.thaw(context, place, run, record, pipeline)
        if record.get("state") != "training":
            record = {**record, "state": "training"}
            run.write_record(record)
    plan = Plan.from_json(record["plan"])
    found = checkpoint.newest(
        place.now(), run.run, lambda folder, why: run.log(f"{folder.name} is damaged and was passed over: {why}")
    )
    done = found.step if found else 0
    run.forget_after(done)
    devices = begin.devices_of(context, plan)
    where = " and ".join(devices)
    run.log(f"resumed from step {done}" if found else f"started: {plan.total_steps} steps on {where}")
    material = _material(base, pipeline, record, frozen, device)
    start = _start(place, record, found)
    inputs = record["inputs"]
    held_out = range(len(inputs) - plan.validation, len(inputs))
    validation = Validation(material, held_out) if plan.validation else None
    with (
        crew_of(devices, "handlers.train.job:follow", _task(context, place, base), context.within) as crew,
        closing(invited(context, place, run, plan, done)) as viewers,
    ):
        trainer = _trainer(base, pipeline, record, material, start=start, crew=crew, told=run.log)
        keeper = Keeper(place, {**record, "run": run.run}, base, pipeline, trainer)
        recorder = Recorder(
            context,
            place,
            run,
            plan,
            draw=lambda: trainer.draw(lambda: context.is_stopping() or context.is_cancelled()),
            spent=float(found.state.get("seconds", 0.0)) if found else 0.0,
            keeper=keeper,
            worthless=material.objective.worthless,
            viewers=viewers,
            measure=validation.measure_of(trainer.result) if validation else None,
            decided=record.get("decided", ()),
        )
        context.progress(done, plan.total_steps, "starting", decided=list(record.get("decided", ())))
        try:
            trainer.train(found, recorder)
        except Diverged as diverged:
            good = last_good(place, run, recorder.good_until(diverged.good_until))
            raise with_what_was_saved(diverged, good, run, plan, trainer=trainer, keeper=keeper) from None
        context.progress(plan.total_steps, plan.total_steps, "writing the model")
        if plan.sample_every:
            recorder.show(plan.total_steps)
        else:
            recorder.chart()
        run.flush()
    dtype = base.finished_dtype()
    if plan.is_adapter:
        folder = write_adapters(place, run.run, pipeline, trainer.adapters, plan=plan, dtype=dtype)
    else:
        folder = write_finished(place, run.run, base.training, pipeline, denoiser=trainer.denoiser, dtype=dtype)
    record = {
        **record,
        "state": "finished",
        "steps": plan.total_steps,
        "seconds": round(recorder.seconds, 1),
        "finished": folder.relative_to(place.now()).as_posix(),
        "finished_at": now(),
    }
    run.write_record(record)
    run.log(f"finished: {plan.total_steps} steps")
    shutil.rmtree(place.now() / PRIVATE / "frozen" / run.run, ignore_errors=True)
    return _result(place, {**record, "run": run.run})


def _material(
    base: BaseModel, pipeline: Any, record: Mapping[str, Any], frozen: dataset.Frozen, device: str
) -> Material:
    """Everything that a run was given, with what is held out at the end."""
    return Material(
        Plan.from_json(record["plan"]), frozen, trained_on(record), base.training.objective(pipeline), device
    )


def _start(
    place: Place, record: Mapping[str, Any], found: checkpoint.Checkpoint | None
) -> dict[str, dict[str, torch.Tensor]]:
    """The adapter that more steps begin with; a checkpoint knows better."""
    continued = record.get("continued")
    return adapter_of_run(place.now(), continued) if continued and not found else {}


def _trainer(
    base: BaseModel,
    pipeline: Any,
    record: Mapping[str, Any],
    material: Material,
    *,
    start: Mapping[str, Mapping[str, torch.Tensor]],
    crew: Crew,
    told: Callable[[str], None],
) -> Trainer:
    """The trainer of a run, as its run.json says."""
    plan, inputs = material.plan, record["inputs"]
    seen = len(inputs) - plan.validation
    frozen = dataset.Frozen(material.frozen.mean[:seen], material.frozen.std[:seen])
    words = wording(
        [entry["prompt"] for entry in inputs],
        material.subjects,
        seen - material.subjects,
        dropout=plan.caption_dropout,
        class_dropout=plan.prior_caption_dropout,
        shuffle=plan.caption_shuffle,
        seed=plan.seed,
    )
    sizes = dataset.sizes_told(inputs, plan)
    return Trainer(base, pipeline, replace(material, frozen=frozen), words, sizes, start=start, crew=crew, told=told)


def _task(context: JobContext, place: Place, base: BaseModel) -> dict[str, Any]:
    """What those who follow need to know; can be pickled."""
    return {"payload": {**context.payload, "folder": str(place.now())}, "cache": context.cache, "base": base}


def follow(crew: Crew, device: str, task: Mapping[str, Any]) -> None:
    """Do the same steps as the first of the crew, and keep nothing."""
    quiet_libraries()
    payload, base = task["payload"], task["base"]
    context = JobContext(0, "train", payload, device, task["cache"], lambda *_: None, lambda: False, lambda: False)
    place = Place(Path(payload["folder"]), Path(payload["root"]), payload.get("session"))
    run = RunFolder(place, str(payload["run"]))
    record = run.read_record() or {}
    with _threads_for(base, device):
        pipeline = base.load_pipeline()
        _other_vae(context, base, pipeline, record)
        frozen = begin.thaw(context, place, run, record, pipeline)
        found = checkpoint.newest(place.now(), run.run, lambda *_: None)
        material = _material(base, pipeline, record, frozen, device)
        start = _start(place, record, found)
        trainer = _trainer(base, pipeline, record, material, start=start, crew=crew, told=lambda _line: None)
        trainer.train(found, Silence())


def _other_vae(
    context: JobContext, base: BaseModel, pipeline: Any, record: Mapping[str, Any] | None
) -> dict[str, str] | None:
    """Put the VAE that the run names into the pipeline; None where it uses the base's."""
    payload = context.payload
    name = str((record["plan"] if record else payload["spec"]).get("vae", "auto"))
    if name == "auto":
        return None
    models = payload.get("models")
    found = put_in(pipeline, base, name, Path(models) if models else None, context.cache)
    if record:
        require_same(record.get("vae"), found)
    return found


def _clean_up(place: Place, run: RunFolder) -> None:
    folder = place.now()
    checkpoint.prune(folder, run.run, 0)
    shutil.rmtree(folder / PRIVATE / "frozen" / run.run, ignore_errors=True)
    if record := run.read_record():
        run.flush()
        run.write_record({**record, "state": "cancelled"})
        run.log("cancelled")


def _result(place: Place, record: Mapping[str, Any]) -> JobResult:
    folder = place.now()
    plan = Plan.from_json(record["plan"])
    finished = finished_folder(folder, str(record["run"]))
    preview = last_sample(folder, plan.total_steps)
    facts = {
        "run": record["run"],
        "state": "finished",
        "steps": record["steps"],
        "finished": str(finished),
        "seconds": record["seconds"],
        "pictures": trained_on(record),
        "left_out": record["left_out"],
        **({"buckets": record["buckets"]} if plan.buckets else {}),
        "preview": str(preview) if preview else None,
        "metadata": metadata_of(record, plan, int(record["steps"])),
    }
    return JobResult(facts=facts, outputs=[finished, *([preview] if preview else [])])
