"""The kinds of jobs: where their handler lives, which lane they take and how long they may be silent.

Nothing heavy is imported here: a handler is named by ``module:class`` and loaded inside its worker process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Lane = Literal["cpu", "gpu", "net"]


@dataclass(frozen=True)
class Kind:
    """One kind of job.

    Attributes:
        name: ``crop``, ``caption`` …
        handler: ``module:class`` of the handler, loaded in the worker.
        lane: ``cpu`` (many at once), ``gpu`` (one a GPU), ``net`` (waits for others most of the time).
        batch: how many ready jobs one worker may take at once.
        gather: seconds that the first of them may wait for company, where fewer are ready.
        attempts: how often a failing job is started before it is given up.
        silence: seconds without a progress message after which the worker counts as hung and is ended.
        priority: smaller goes first within a lane.
    """

    name: str
    handler: str
    lane: Lane
    batch: int = 1
    gather: float = 0.0
    attempts: int = 3
    silence: float = 300.0
    priority: int = 50


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("crop", "handlers.crop.job:CropHandler", "cpu", batch=8, silence=120.0, priority=10),
        Kind("caption", "handlers.caption.job:CaptionHandler", "gpu", 16, gather=2.0, silence=1800.0, priority=20),
        Kind("train", "handlers.train.job:TrainHandler", "gpu", attempts=5, silence=3600.0, priority=30),
        Kind("sheet", "handlers.crop.sheet:SheetHandler", "cpu", attempts=2, silence=600.0, priority=90),
        Kind("convert", "handlers.convert.job:ConvertHandler", "cpu", silence=1800.0, priority=20),
        Kind("publish", "handlers.publish.job:PublishHandler", "net", attempts=5, silence=1800.0, priority=20),
    )
}

# Only for the command line: the daemon never queues them.
ONE_OFF_KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("attention", "handlers.caption.look:AttentionHandler", "gpu", silence=1800.0),
        Kind("features", "handlers.caption.look:FeaturesHandler", "gpu", silence=1800.0),
        Kind("lora-convert", "handlers.convert.lora_job:LoraConvertHandler", "cpu", silence=1800.0),
        Kind("lora-extract", "handlers.convert.lora_job:LoraExtractHandler", "cpu", silence=7200.0),
        Kind("lora-merge", "handlers.convert.lora_job:LoraMergeHandler", "cpu", silence=1800.0),
        Kind("export", "handlers.caption.onnx_export:ExportHandler", "cpu", silence=7200.0),
    )
}
