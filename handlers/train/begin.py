"""Before the first step of a run: pictures are read and encoded, all is decided, the room on the disk is looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from handlers.caption.rules import placed
from handlers.context import JobContext, Stopping
from handlers.train import dataset, holdout, prior, room, sampler
from handlers.train.auto import make_plan
from handlers.train.base import BaseModel
from handlers.train.buckets import bucket_counts, told_of
from handlers.train.decided import decided
from handlers.train.families import Embedded
from handlers.train.fresh import fresh_denoiser
from handlers.train.further import as_before, plan_of_run
from handlers.train.place import Place
from handlers.train.plan import Plan, Precision
from handlers.train.prompts import sample_prompts, subject_of, training_prompt
from handlers.train.run import RunFolder, now
from handlers.train.speaking import speak
from sessions.refusal import Refusal
from sessions.spec import TrainSpec


def prepare(
    context: JobContext,
    place: Place,
    run: RunFolder,
    base: BaseModel,
    pipeline: Any,
    *,
    vae: Mapping[str, str] | None,
) -> tuple[dict[str, Any], dataset.Frozen]:
    """Everything before the first step: read the pictures, decide, check the room, freeze, write ``run.json``.

    ``vae`` is what ``vae.put_in`` says of the one in the pipeline; None where that is the base's.
    """
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
    trained, held_out = holdout.split(rendered.pictures, plan.validation, plan.seed)
    sources = [str(picture["source"]) for picture in trained]
    if not plan.prompts:
        prompts = sample_prompts(plan.instance, plan.class_, plan.concept, sources, templates=plan.templates)
        plan = replace(plan, prompts=prompts)
    plan = room.fitted(plan, spec, base, devices_of(context, plan))
    room.check_memory(base, plan)
    room.check_disk(place, base, plan, int(payload.get("disk_reserve") or 0))
    of_class = _class_pictures(context, place, run, plan, base=base, pipeline=pipeline)
    image_of = dict(zip((str(picture["source"]) for picture in rendered.pictures), rendered.images, strict=True))
    shown = [image_of[str(picture["source"])] for picture in (*trained, *held_out)]
    images = [*shown[: len(trained)], *of_class.images, *shown[len(trained) :]]
    encoded = dataset.encode(
        images,
        pipeline.vae,
        context.device,
        lambda number: _progress(context, number, len(images), "encoding the pictures"),
    )
    digest = dataset.store(place, run.run, encoded)
    frozen = dataset.load(place, run.run, digest) or encoded
    folder = place.now()
    counts = bucket_counts(trained)
    record = {
        "name": payload.get("name"),
        "session": payload.get("session"),
        "state": "training",
        "started_at": now(),
        "spec": payload["spec"],
        "spec_record": payload.get("spec_record"),
        "plan": plan.to_json(),
        "continued": continued,
        "base": {"name": base.model.name, "family": base.training.name, "origin": base.model.origin},
        **({"vae": dict(vae)} if vae else {}),
        "inputs": [
            *(_input(picture, plan, folder) for picture in trained),
            *({**entry, "source": _relative(str(entry["source"]), folder)} for entry in of_class.pictures),
            *({**_input(picture, plan, folder), "held_out": True} for picture in held_out),
        ],
        "left_out": [
            {**left, "source": _relative(left["source"], folder)} for left in (*rendered.left_out, *of_class.left_out)
        ],
        **({"buckets": counts} if plan.buckets else {}),
        "frozen": digest,
        "decided": decided(payload["spec"], plan, len(trained)),
    }
    run.write_record(record)
    for line in record["decided"]:
        run.log(f"auto: {line}")
    run.log(f"memory: {plan.means.told()}")
    for line in told_of(counts, plan.batch_size):
        run.log(line)
    if held_out:
        names = ", ".join(entry["source"] for entry in record["inputs"] if entry.get("held_out"))
        run.log(f"held out, not trained on: {names}")
    for left in record["left_out"]:
        run.log(f"left out {left['source']}: {left['reason']}")
    return record, frozen


def devices_of(context: JobContext, plan: Plan) -> list[str]:
    """The devices that share a run: this worker's, and others where ``gpus: all`` is set, one a picture of a step."""
    given = [str(device) for device in context.payload.get("devices") or ()]
    return given[: plan.pictures_a_step] if len(given) > 1 else [context.device]


def _class_pictures(
    context: JobContext, place: Place, run: RunFolder, plan: Plan, *, base: BaseModel, pipeline: Any
) -> dataset.Rendered:
    """The class pictures; those that are missing are drawn by the base."""
    if not plan.prior_images:
        return dataset.Rendered([], [], [])
    denoiser: Any = None
    embedded: dict[str, Embedded] = {}

    def draw(wanted: Sequence[tuple[str, int]]) -> list[Image.Image]:
        nonlocal denoiser
        new = list(dict.fromkeys(prompt for prompt, _seed in wanted if prompt not in embedded))
        if new and base.training.draws_from_embeddings:
            embedded.update(zip(new, speak(base.training, pipeline, new, context.device, run.log), strict=True))
        denoiser = denoiser or fresh_denoiser(base, plan, context.device).to(context.device)
        return sampler.draw(
            base.training,
            pipeline,
            denoiser,
            wanted=wanted,
            embedded=embedded,
            batch=prior.batch_of(plan),
            resolution=plan.resolution,
            guidance=plan.guidance,
            device=context.device,
            should_stop=lambda: context.is_stopping() or context.is_cancelled(),
        )

    return prior.class_pictures(
        place, plan, draw, lambda done, total: _progress(context, done, total, "drawing class pictures")
    )


def thaw(context: JobContext, place: Place, run: RunFolder, record: Mapping[str, Any], pipeline: Any) -> dataset.Frozen:
    """The latents of a run that began before; made again from its pictures where they were lost."""
    frozen = dataset.load(place, run.run, str(record["frozen"]))
    if frozen is not None:
        return frozen
    folder = place.now()
    entries = [{**entry, "source": str(folder / entry["source"])} for entry in record["inputs"]]
    resolution = int(record["plan"]["resolution"])
    count = len(entries)
    rendered = dataset.render_pictures(
        entries, resolution, lambda number: _progress(context, number, count, "reading the pictures")
    )
    if rendered.left_out:
        names = ", ".join(Path(left["source"]).name for left in rendered.left_out)
        raise Refusal(
            "pictures", f"Pictures of the run {run.run} are gone: {names}.", "Save train.yaml again to start a new run."
        )
    run.log("encoded the pictures again: .fastsd/frozen was lost")
    encoded = dataset.encode(
        rendered.images,
        pipeline.vae,
        context.device,
        lambda number: _progress(context, number, count, "encoding the pictures"),
    )
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


def _precision(device: str) -> Precision:
    """What ``precision: auto`` is: bf16 where the GPU has it, fp16 on older ones, fp32 on a CPU."""
    if not device.startswith("cuda"):
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
