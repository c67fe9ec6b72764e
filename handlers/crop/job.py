"""The crop job: one picture in, its window and a crop to look at out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import cv2

from handlers.context import JobContext, JobResult
from handlers.crop.decode import PIXEL_LIMIT, OpenPicture, SourceFile, read_source
from handlers.crop.render import render, shrunk_to, write_picture
from handlers.crop.subject import FaceFinder, Subject, find_subject
from handlers.crop.window import square_window, whole_picture
from sessions.refusal import Refusal

Mode = Literal["smart", "centre", "off"]
_DEFAULT_RESOLUTION = 512


@dataclass(frozen=True)
class CropRequest:
    """A crop job's payload, checked.

    Attributes:
        source: the picture.
        output: the crop's file; its ending chooses the format (JPEG, but for .png and .webp).
        resolution: pixels of the crop's shorter side, at most.
        mode: ``smart`` looks for the subject, ``centre`` does not, ``off`` keeps the whole picture.
        pixel_limit: refuse pictures with more pixels.
    """

    source: Path
    output: Path
    resolution: int = _DEFAULT_RESOLUTION
    mode: Mode = "smart"
    pixel_limit: int = PIXEL_LIMIT

    @classmethod
    def of(cls, payload: Mapping[str, Any]) -> CropRequest:
        """Read a payload.

        Raises:
            ValueError: it has an unknown mode or a resolution that is no size.
        """
        mode = _mode(payload.get("mode") or "smart")
        resolution = int(payload.get("resolution") or _DEFAULT_RESOLUTION)
        if resolution < 1:
            raise ValueError(f"the resolution {resolution} is no size")
        return cls(
            Path(payload["source"]),
            Path(payload["output"]),
            resolution,
            mode,
            int(payload.get("pixel_limit") or PIXEL_LIMIT),
        )


def _mode(value: object) -> Mode:
    for mode in get_args(Mode):
        if value == mode:
            return cast("Mode", mode)
    raise ValueError(f"the crop mode {value!r} is none of smart, centre, off")


class CropHandler:
    """Crops pictures; keeps the face detector loaded."""

    def __init__(self) -> None:
        # The lane runs a worker a core; a detector that takes them all for itself only slows the others.
        cv2.setNumThreads(1)
        self._finder = FaceFinder()

    def run(self, context: JobContext) -> JobResult:
        """Crop one picture.

        Raises:
            Refusal: ``not-a-file``, ``unreadable``, ``empty``, ``not-a-picture``, ``corrupt``, ``too-large``,
                ``too-small``, ``overwrite`` (the output is the source).
            FileNotFoundError: the picture is gone.
        """
        context.check_cancelled()
        request = CropRequest.of(context.payload)
        facts = crop(request, self._finder)
        context.report(1, 1, facts["subject"], {})
        return JobResult(facts=facts, outputs=[request.output])


def crop(request: CropRequest, finder: FaceFinder) -> dict[str, Any]:
    """Crop one picture, write the crop, and return the job's facts (docs/architecture.md).

    Raises:
        Refusal: as ``CropHandler.run``.
    """
    source = read_source(request.source)
    _require_other_file(source, request.output)
    opened = OpenPicture(source, request.pixel_limit)
    # The window's side is the picture's shorter side in every mode, so the scale is known before any pixel is.
    decoded = opened.decode(request.resolution / opened.shorter_side)
    if request.mode == "off":
        subject, box = Subject("centre", ()), whole_picture(decoded.size)
    else:
        subject = find_subject(decoded.image, finder) if request.mode == "smart" else Subject("centre", ())
        box = square_window(decoded.size, subject.boxes)
    warnings = list(decoded.warnings)
    size = shrunk_to((box[2] - box[0], box[3] - box[1]), request.resolution)
    if min(size) < request.resolution:
        warnings.append(
            f"The picture gives a window of only {size[0]} × {size[1]} pixels where {request.resolution} are wanted: "
            "it is used as it is, and a larger version would train better."
        )
    write_picture(render(decoded, box, size), request.output)
    return {
        "sha256": source.sha256,
        "box": list(box),
        "picture": list(decoded.size),
        "subject": subject.finding,
        "written_size": list(size),
        "warnings": warnings,
    }


def _require_other_file(source: SourceFile, output: Path) -> None:
    try:
        same = output.samefile(source.path)
    except FileNotFoundError:
        return
    if same:
        raise Refusal(
            "overwrite",
            f"The crop of {source.path.name} would replace the picture itself.",
            "Choose another folder for the crops.",
        )
