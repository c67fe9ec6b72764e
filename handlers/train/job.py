"""A training from its payload to the finished folder: prepare or resume, stage 1, stage 2, finish."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from PIL import Image

from handlers.caption.rules import placed
from handlers.context import Cancelled, JobContext, JobResult, Stopping
from handlers.convert.quiet import quiet_libraries
from handlers.train import checkpoint, dataset, prior, sampler
from handlers.train.auto import Plan, Precision, make_plan
from handlers.train.base import BaseModel, find_base
from handlers.train.buckets import bucket_counts, told_of
from handlers.train.finish import finished_folder, write_adapters, write_finished
from handlers.train.further import as_before, base_of_run, plan_of_run
from handlers.train.loop import Material
from handlers.train.place import Place
from handlers.train.prompts import sample_prompts, subject_of, training_prompt
from handlers.train.recorder import Recorder, last_sample
from handlers.train.run import RunFolder
from handlers.train.stages import Trainer
from sessions.layout import PRIVATE
from sessions.refusal import Refusal
from sessions.spec import TrainSpec


class TrainHandler:
    """DreamBooth in two stages, resumable at any step."""

    def run(self, context: JobContext) -> JobResult:
        """Train one run, or go on with it.

        Payload: ``folder``, ``root``, ``session``, ``run``, ``name``, ``spec``, ``spec_record``, ``base``, ``models``,
        ``pictures``: ``source``, ``sha256``, ``box``, ``caption``, and where known ``caption_by`` (``person``),
        ``subject``, ``noun`` (the grounded phrase); ``disk_reserve``: bytes to leave free; ``continued``: ``run`` and
        ``model`` (a file in the session) to train on from. A run that has its
        ``run.json`` needs neither ``spec``, ``base`` nor ``pictures``.

        Raises:
            Refusal: too few pictures, too little disk, a wrong combination, or the training diverged.
            Waiting: the base is not on this machine.
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
            base = base_of_run(place.now(), continued, context.cache)
        else:
            base = find_base(name, Path(models) if models else None, context.cache, _gpu_bytes(context.device))
        try:
            with _threads_for(base, context.device):
                return _train(context, place, run, base, record)
        except Cancelled:
            with suppress(FileNotFoundError):
                _clean_up(place, run)
            raise
        except FileNotFoundError:
            if place.is_gone():
                raise Cancelled from None  # someone deleted the session: there is nothing left to train for
            raise
        except Refusal as refusal:
            if refusal.code == "diverged" and (written := run.read_record()):
                run.flush()
                run.write_record({**written, "state": "failed", "reason": str(refusal)})
                run.log(str(refusal))
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
    if record is None:
        record, frozen = _prepare(context, place, run, base, pipeline)
    else:
        frozen = _thaw(context, place, run, record, pipeline)
        if record.get("state") != "training":
            record = {**record, "state": "training"}
            run.write_record(record)
    plan = Plan.from_json(record["plan"])
    found = checkpoint.newest(
        place.now(), run.run, lambda folder, why: run.log(f"{folder.name} is damaged and was passed over: {why}")
    )
    done = found.step if found else 0
    run.forget_after(done)
    run.log(f"resumed from step {done}" if found else f"started: {plan.total_steps} steps on {device}")
    material = Material(
        plan,
        frozen,
        sum(not entry.get("prior") for entry in record["inputs"]),
        DDPMScheduler.from_config(pipeline.scheduler.config),
        pipeline.vae.config.scaling_factor,
        device,
    )
    inputs = record["inputs"]
    trainer = Trainer(base, pipeline, material, [entry["prompt"] for entry in inputs], dataset.sizes_told(inputs, plan))
    spent = float(found.state.get("seconds", 0.0)) if found else 0.0
    recorder = Recorder(
        context,
        place,
        run,
        plan,
        draw=lambda: trainer.draw(lambda: context.is_stopping() or context.is_cancelled()),
        spent=spent,
    )
    trainer.train(found, recorder)
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
        folder = write_finished(place, run.run, base.training, pipeline, unet=trainer.unet, dtype=dtype)
    record = {
        **record,
        "state": "finished",
        "steps": plan.total_steps,
        "seconds": round(recorder.seconds, 1),
        "finished": folder.relative_to(place.now()).as_posix(),
        "finished_at": _now(),
    }
    run.write_record(record)
    run.log(f"finished: {plan.total_steps} steps")
    shutil.rmtree(place.now() / PRIVATE / "frozen" / run.run, ignore_errors=True)
    return _result(place, {**record, "run": run.run})


def _prepare(
    context: JobContext, place: Place, run: RunFolder, base: BaseModel, pipeline: Any
) -> tuple[dict[str, Any], dataset.Frozen]:
    """Everything before the first step: read the pictures, decide, check the room, freeze, write ``run.json``."""
    payload = context.payload
    spec = TrainSpec.from_json(payload["spec"])
    if continued := payload.get("continued"):
        spec = as_before(spec, plan_of_run(place.now(), continued))
    pictures = sorted(payload["pictures"], key=lambda picture: str(picture["source"]))
    plan = make_plan(spec, base.facts, pictures, str(payload.get("session")), _precision(context.device))
    if plan.precision != "fp32" and context.device == "cpu":
        raise Refusal("spec", f"precision: {plan.precision} needs a GPU.", "Use auto or fp32.")
    count = len(pictures)

    def reading(number: int) -> None:
        _progress(context, number, count, "reading the pictures")

    if plan.buckets:
        pictures = dataset.with_buckets(pictures, plan.bucket_shapes, reading)
    rendered = dataset.render_pictures(pictures, plan.resolution, reading)
    dataset.require_enough(rendered)
    # Steps that count pictures count those that could be read.
    plan = make_plan(spec, base.facts, rendered.pictures, str(payload.get("session")), plan.precision)
    sources = [str(picture["source"]) for picture in rendered.pictures]
    if not plan.prompts:
        prompts = sample_prompts(plan.instance, plan.class_, plan.concept, sources, templates=plan.templates)
        plan = replace(plan, prompts=prompts)
    _check_room(place, base, plan, int(payload.get("disk_reserve") or 0))
    of_class = _class_pictures(context, place, plan, base, pipeline)
    images = [*rendered.images, *of_class.images]
    encoded = dataset.encode(
        images,
        pipeline.vae,
        context.device,
        lambda number: _progress(context, number, len(images), "encoding the pictures"),
    )
    digest = dataset.store(place, run.run, encoded)
    frozen = dataset.load(place, run.run, digest) or encoded
    folder = place.now()
    counts = bucket_counts(rendered.pictures)
    record = {
        "name": payload.get("name"),
        "session": payload.get("session"),
        "state": "training",
        "started_at": _now(),
        "spec": payload["spec"],
        "spec_record": payload.get("spec_record"),
        "plan": plan.to_json(),
        "continued": continued,
        "base": {"name": base.model.name, "family": base.training.name, "origin": base.model.origin},
        "inputs": [
            *(_input(picture, plan, folder) for picture in rendered.pictures),
            *({**entry, "source": _relative(str(entry["source"]), folder)} for entry in of_class.pictures),
        ],
        "left_out": [
            {**left, "source": _relative(left["source"], folder)} for left in (*rendered.left_out, *of_class.left_out)
        ],
        **({"buckets": counts} if plan.buckets else {}),
        "frozen": digest,
    }
    run.write_record(record)
    for line in told_of(counts, plan.batch_size):
        run.log(line)
    for left in record["left_out"]:
        run.log(f"left out {left['source']}: {left['reason']}")
    return record, frozen


def _class_pictures(context: JobContext, place: Place, plan: Plan, base: BaseModel, pipeline: Any) -> dataset.Rendered:
    """The class pictures; those that are missing are drawn by the base."""
    if not plan.prior_images:
        return dataset.Rendered([], [], [])
    unet: Any = None

    def draw(wanted: Sequence[tuple[str, int]]) -> list[Image.Image]:
        nonlocal unet
        unet = unet or base.load_unet().to(context.device)
        return sampler.draw(
            base.training,
            pipeline,
            unet,
            wanted=wanted,
            batch=prior.batch_of(plan),
            resolution=plan.resolution,
            guidance=plan.guidance,
            device=context.device,
            should_stop=lambda: context.is_stopping() or context.is_cancelled(),
        )

    return prior.class_pictures(
        place, plan, draw, lambda done, total: _progress(context, done, total, "drawing class pictures")
    )


def _thaw(
    context: JobContext, place: Place, run: RunFolder, record: Mapping[str, Any], pipeline: Any
) -> dataset.Frozen:
    """The latents of a run that began before; made again from its pictures where they were lost."""
    frozen = dataset.load(place, run.run, str(record["frozen"]))
    if frozen is not None:
        return frozen
    folder = place.now()
    entries = [{**entry, "source": str(folder / entry["source"])} for entry in record["inputs"]]
    resolution = int(record["plan"]["resolution"])
    rendered = dataset.render_pictures(entries, resolution, lambda _: context.check_cancelled())
    if rendered.left_out:
        names = ", ".join(Path(left["source"]).name for left in rendered.left_out)
        raise Refusal(
            "pictures", f"Pictures of the run {run.run} are gone: {names}.", "Save train.yaml again to start a new run."
        )
    run.log("encoded the pictures again: .fastsd/frozen was lost")
    encoded = dataset.encode(rendered.images, pipeline.vae, context.device, lambda _: context.check_cancelled())
    dataset.store(place, run.run, encoded)
    return encoded


def _input(picture: Mapping[str, Any], plan: Plan, folder: Path) -> dict[str, Any]:
    written = plan.captions == "all" or (plan.captions == "person" and picture.get("caption_by") == "person")
    source = str(picture["source"])
    caption = picture.get("caption") if written else None
    if caption and picture.get("entities"):
        subject = subject_of(plan.instance, plan.class_, source)
        caption = placed(caption, picture["entities"], subject, plan.class_, plan.concept)
    return {
        "source": _relative(source, folder),
        "sha256": picture.get("sha256"),
        "box": picture["box"],
        **{key: picture[key] for key in ("picture", "bucket", "window") if key in picture},
        "prompt": training_prompt(plan.instance, plan.class_, plan.concept, source, caption, templates=plan.templates),
    }


def _relative(source: str, folder: Path) -> str:
    path = Path(source)
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else source


def _progress(context: JobContext, done: int, total: int, note: str) -> None:
    context.progress(done, total, note)
    if context.is_stopping():
        raise Stopping


def _gpu_bytes(device: str) -> int:
    """All memory of the GPU, 0 for a CPU."""
    return int(torch.cuda.mem_get_info(device)[1]) if device.startswith("cuda") else 0


def _precision(device: str) -> Precision:
    """What ``precision: auto`` is: bf16 where the GPU has it, fp16 on older ones, fp32 on a CPU."""
    if not device.startswith("cuda"):
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def _check_room(place: Place, base: BaseModel, plan: Plan, reserve: int) -> None:
    """Refuse before the start what would fill the disk hours later: checkpoints, the result, and its single file."""
    counts = base.parameters()
    encoders = sum(counts.get(name, 0) for name in base.training.encoders)
    trained = counts["unet"] + (encoders if plan.text_encoder_steps else 0)
    # float32 weights and AdamW's two moments, in the newest two and the one being written.
    checkpoints = 12 * trained * (checkpoint.KEPT + 1)
    result = 2 * sum(counts.values()) * base.finished_dtype().itemsize
    free = shutil.disk_usage(place.now()).free
    if free < checkpoints + result + reserve:
        raise Refusal(
            "disk",
            f"Training {plan.base} needs {(checkpoints + result) / 1e9:.2f} GB of disk "
            f"({checkpoints / 1e9:.2f} for checkpoints, {result / 1e9:.2f} for the model); "
            f"{free / 1e9:.2f} GB are free"
            + (f", of which {reserve / 1e9:.2f} must stay free (limits.disk_reserve)." if reserve else "."),
            "Make room and save train.yaml again.",
        )


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
    first = record["inputs"][0]["source"]
    facts = {
        "run": record["run"],
        "state": "finished",
        "steps": record["steps"],
        "finished": str(finished),
        "seconds": record["seconds"],
        "pictures": sum(not entry.get("prior") for entry in record["inputs"]),
        "left_out": record["left_out"],
        **({"buckets": record["buckets"]} if plan.buckets else {}),
        "preview": str(preview) if preview else None,
        "metadata": {
            "title": record.get("name"),
            "date": record["started_at"],
            "trigger_phrase": subject_of(plan.instance, plan.class_, first),
            "resolution": f"{plan.resolution}x{plan.resolution}",
            "fastsd.run": record["run"],
            "fastsd.base": plan.base,
            "fastsd.steps": record["steps"],
            "fastsd.pictures": sum(not entry.get("prior") for entry in record["inputs"]),
        },
    }
    return JobResult(facts=facts, outputs=[finished, *([preview] if preview else [])])


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
