"""The crop job: one picture in, its window and a crop to look at out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

import cv2

from handlers.context import JobContext, JobResult
from handlers.crop.colour import GROUND, Ground, ground_of
from handlers.crop.decode import PIXEL_LIMIT, Decoded, OpenPicture, SourceFile, read_source
from handlers.crop.grounded import Entity, entities_of
from handlers.crop.health import health
from handlers.crop.limits import DECODE_BYTES, DECODE_SECONDS, limited_memory
from handlers.crop.render import render, shrunk_to, write_picture
from handlers.crop.segment import NetworkFile
from handlers.crop.subject import Clues, Finders, Subject, find_subject
from handlers.crop.window import PixelBox, square_window, whole_picture
from handlers.crop.wish import Wish
from handlers.give_back import give_memory_back
from handlers.models import segments
from sessions.refusal import Refusal

Mode = Literal["smart", "centre", "off"]
_DEFAULT_RESOLUTION = 512
_LOOKED_AT = 640
"""Pixels of the longer side that the detectors and the figures of health want to see, where the picture has them."""


@dataclass(frozen=True)
class CropRequest:
    """A crop job's payload, checked.

    Attributes:
        source: the picture.
        output: the crop's file; its ending chooses the format (JPEG, but for .png and .webp).
        resolution: pixels of the crop's shorter side, at most.
        mode: ``smart`` looks for the subject, ``centre`` does not, ``off`` keeps the whole picture.
        pixel_limit: refuse pictures with more pixels.
        entities: what the picture's caption grounded, if there is one.
        words: class and instance nouns of the session, if it has some.
        wish: of a person, for this picture.
        ground: what shows through where the picture is transparent.
        seconds: how long decoding it may take.
        network: a salient-object network, if one is here.
    """

    source: Path
    output: Path
    resolution: int = _DEFAULT_RESOLUTION
    mode: Mode = "smart"
    pixel_limit: int = PIXEL_LIMIT
    entities: tuple[Entity, ...] = ()
    words: tuple[str, ...] = ()
    wish: Wish = field(default_factory=Wish)
    ground: Ground = GROUND
    seconds: float = DECODE_SECONDS
    network: NetworkFile | None = None

    @classmethod
    def of(cls, payload: Mapping[str, Any]) -> CropRequest:
        """Read a payload.

        Raises:
            ValueError: it has an unknown mode, a resolution that is no size, or a ground that is no colour.
            Refusal: ``wish``: a person's wish cannot be read.
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
            tuple(entities_of(payload.get("entities"))),
            tuple(str(word) for word in payload.get("words") or ()),
            Wish.of(payload.get("wish")),
            ground_of(payload.get("ground")),
            float(payload.get("seconds") or DECODE_SECONDS),
            _network_of(payload),
        )


def _network_of(payload: Mapping[str, Any]) -> NetworkFile | None:
    file = payload.get("segment")
    return NetworkFile(Path(file), int(payload.get("segment_memory") or segments.MEMORY)) if file else None


def _mode(value: object) -> Mode:
    for mode in get_args(Mode):
        if value == mode:
            return cast("Mode", mode)
    raise ValueError(f"the crop mode {value!r} is none of smart, centre, off")


class CropHandler:
    """Crops pictures; keeps the detectors loaded."""

    def __init__(self) -> None:
        # The lane runs a worker a core; a detector that takes them all for itself only slows the others.
        cv2.setNumThreads(1)
        # What OpenCV's new engine cannot do (choose a target) is nothing that anyone can mend.
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)
        self._finders = Finders()

    def run(self, context: JobContext) -> JobResult:
        """Crop one picture.

        Raises:
            Refusal: ``not-a-file``, ``unreadable``, ``empty``, ``not-a-picture``, ``corrupt``, ``too-large`` (bytes,
                pixels or memory), ``too-slow``, ``too-small``, ``wish``, ``overwrite`` (the output is the source).
            FileNotFoundError: the picture is gone.
        """
        context.check_cancelled()
        request = CropRequest.of(context.payload)
        source = read_source(request.source)
        _require_other_file(source, request.output)
        with context.within(request.seconds, _too_slow(source, request.seconds)):
            decoded = self._decoded(source, request)
        if request.network is not None:
            # Asking it for the first time may take as long as decoding; the daemon hears that this goes on.
            context.report(0, 1, "", {})
        facts = crop(source, decoded, request, self._finders)
        context.report(1, 1, facts["subject"], {})
        return JobResult(facts=facts, outputs=[request.output])

    def _decoded(self, source: SourceFile, request: CropRequest) -> Decoded:
        """The picture at the scale that the crop needs, within the memory that one picture may take."""
        try:
            with limited_memory(DECODE_BYTES):
                opened = OpenPicture(source, request.pixel_limit)
                if opened.takes_much_memory:
                    self._finders.give_buffers_up()
                    give_memory_back()
                # The window's side is the picture's shorter side but for a fixed box: the scale is known beforehand.
                side = request.wish.least_side(opened.size) or opened.shorter_side
                return opened.decode(max(request.resolution / side, _LOOKED_AT / opened.longer_side), request.ground)
        except MemoryError as error:
            raise Refusal(
                "too-large",
                f"{source.path.name} needs more than {DECODE_BYTES >> 20} MiB of memory to be decoded.",
                "Make the picture smaller, or save it as an ordinary (not progressive) JPEG.",
            ) from error


def _too_slow(source: SourceFile, seconds: float) -> Refusal:
    return Refusal(
        "too-slow",
        f"{source.path.name} could not be decoded within {seconds:g} s.",
        "Open it in a picture editor and save it again, as JPEG or PNG.",
    )


def crop(source: SourceFile, decoded: Decoded, request: CropRequest, finders: Finders) -> dict[str, Any]:
    """Crop one decoded picture, write the crop, and return the job's facts (docs/architecture.md).

    Raises:
        Refusal: ``wish``: a fixed box does not fit the picture.
    """
    subject, box = _window(decoded, request, finders)
    warnings = [*decoded.warnings, *filter(None, (subject.warning, subject.problem))]
    size = shrunk_to((box[2] - box[0], box[3] - box[1]), request.resolution)
    if min(size) < request.resolution:
        warnings.append(
            f"The picture gives a window of only {size[0]} × {size[1]} pixels where {request.resolution} are wanted: "
            "it is used as it is, and a larger version would train better."
        )
    write_picture(render(decoded, box, size), request.output)
    facts = {
        "sha256": source.sha256,
        "box": list(box),
        "picture": list(decoded.size),
        "subject": subject.finding,
        "written_size": list(size),
        "warnings": warnings,
        "health": health(decoded.image, decoded.size),
    }
    return facts | ({"network_problem": subject.problem} if subject.problem else {})


def _window(decoded: Decoded, request: CropRequest, finders: Finders) -> tuple[Subject, PixelBox]:
    """A person's fixed box, or what the mode says."""
    fixed = request.wish.window(decoded.size)
    if fixed is not None:
        return Subject("grounded", ()), fixed
    if request.mode == "off":
        return Subject("centre", ()), whole_picture(decoded.size)
    subject = Subject("centre", ())
    if request.mode == "smart":
        subject = find_subject(decoded.image, finders, _clues(request))
    return subject, square_window(decoded.size, subject.boxes)


def _clues(request: CropRequest) -> Clues:
    return Clues(request.entities, request.words, request.wish, request.network)


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
