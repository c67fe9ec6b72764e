"""The caption job: pictures in batches in; a line, a sidecar and a preview each out."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handlers.caption.boxes import parse
from handlers.caption.clean import NEUTRAL, clean, place
from handlers.caption.draw import LONG_SIDE, preview
from handlers.caption.model import BRIEF, Captioner, Interrupted, Spoken
from handlers.context import JobContext, JobResult, Stopping
from handlers.crop.decode import PIXEL_LIMIT, Decoded, OpenPicture, SourceFile, read_source
from handlers.crop.render import write_picture
from handlers.models import registry
from sessions import captions, files
from sessions.layout import is_wishes_name


@dataclass(frozen=True)
class CaptionRequest:
    """A caption job's payload, checked.

    Attributes:
        source: the picture.
        text: captions/<stem>.txt; None where a person's text beside the picture is known to stand in its place.
        sidecar: captions/<stem>.json.
        preview: previews/<stem>.jpg.
        written: the sha256 of the last text that fastsd wrote to ``text``, None if it never did.
        captioner: the model's name.
        models: the tree's Models folder, None where there is none.
        pixel_limit: refuse pictures with more pixels.
    """

    source: Path
    text: Path | None
    sidecar: Path
    preview: Path
    written: str | None
    captioner: str
    models: Path | None
    pixel_limit: int

    @classmethod
    def of(cls, payload: Mapping[str, Any]) -> CaptionRequest:
        """Read a payload."""
        text, models = payload["text"], payload.get("models")
        return cls(
            source=Path(payload["source"]),
            text=Path(text) if text else None,
            sidecar=Path(payload["sidecar"]),
            preview=Path(payload["preview"]),
            written=payload.get("written"),
            captioner=payload["captioner"],
            models=Path(models) if models else None,
            pixel_limit=int(payload.get("pixel_limit") or PIXEL_LIMIT),
        )


@dataclass(frozen=True)
class _Prepared:
    """A job whose picture is decoded."""

    index: int
    context: JobContext
    request: CaptionRequest
    source: SourceFile
    decoded: Decoded


class CaptionHandler:
    """Captions pictures; keeps the model that it used last."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._captioner: Captioner | None = None

    def run(self, context: JobContext) -> JobResult:
        """Caption one picture.

        Raises:
            Refusal: as ``handlers.crop.decode``, or there is no captioner of that name.
            Waiting: the captioner is not on this machine, or cannot be used.
        """
        (outcome,) = self.run_batch([context])
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def run_batch(self, contexts: Sequence[JobContext]) -> Sequence[JobResult | BaseException]:
        """Caption several pictures at once; a bad one costs only itself."""
        outcomes: dict[int, JobResult | BaseException] = {}
        groups: defaultdict[tuple[str, Path | None], list[tuple[int, JobContext, CaptionRequest]]] = defaultdict(list)
        for index, context in enumerate(contexts):
            try:
                request = CaptionRequest.of(context.payload)
            except (KeyError, ValueError, TypeError) as error:
                outcomes[index] = error
            else:
                groups[request.captioner, request.models].append((index, context, request))
        for group in groups.values():
            outcomes.update(self._run_group(group))
        return [outcomes[index] for index in range(len(contexts))]

    def _run_group(
        self, group: Sequence[tuple[int, JobContext, CaptionRequest]]
    ) -> dict[int, JobResult | BaseException]:
        """The jobs that name one captioner."""
        outcomes: dict[int, JobResult | BaseException] = {}
        _, first, request = group[0]
        try:
            model = registry.find(request.captioner, "captioner", request.models, first.cache)
            captioner = self._loaded(model.path, first.device)
        except Exception as error:  # whatever it is, it is every job's
            return {index: error for index, _, _ in group}
        prepared: list[_Prepared] = []
        for index, context, request in group:
            try:
                context.check_cancelled()
                prepared.append(_prepare(index, context, request))
                context.report(0, 1, "captioning", {})
            except Exception as error:
                outcomes[index] = error
        if not prepared:
            return outcomes
        try:
            spoken = captioner.speak(
                [item.decoded.image for item in prepared],
                [BRIEF] * len(prepared),
                halted=lambda: any(item.context.is_stopping() for item in prepared),
            )
        except Interrupted:
            return outcomes | {item.index: Stopping() for item in prepared}
        except Exception as error:
            return outcomes | {item.index: error for item in prepared}
        for item, said in zip(prepared, spoken, strict=True):
            try:
                item.context.check_cancelled()
                outcomes[item.index] = _finish(item, said, model)
            except Exception as error:
                outcomes[item.index] = error
        return outcomes

    def _loaded(self, path: Path, device: str) -> Captioner:
        if self._captioner is None or self._path != path:
            self._captioner = None  # the old one goes before the new one comes
            self._captioner = Captioner.load(path, device)
            self._path = path
        return self._captioner


def _prepare(index: int, context: JobContext, request: CaptionRequest) -> _Prepared:
    source = read_source(request.source)
    opened = OpenPicture(source, request.pixel_limit)
    return _Prepared(index, context, request, source, opened.decode(LONG_SIDE / opened.longer_side))


def _finish(item: _Prepared, said: Spoken, model: registry.Model) -> JobResult:
    """Write what was said: the sidecar first, because it tells our text from a person's if we die in between."""
    request = item.request
    utterance = parse(said.raw)
    usable = clean(utterance.text)
    caption = usable or NEUTRAL
    entities = place(utterance.grounded, caption)
    notes = list(item.decoded.warnings)
    if usable is None:
        notes.append(f"The model said nothing usable, so the caption is {NEUTRAL!r}. Write a better one.")
    if utterance.dropped:
        notes.append(f"{utterance.dropped} boxes of the model were unusable and left out.")
    content = captions.file_bytes(caption)
    standing = _standing(request)
    sidecar: dict[str, Any] = {
        "caption": caption,
        "raw": said.raw,
        "entities": [entity.to_json() for entity in entities],
        "prompt": BRIEF,
        "model": model.name,
        "revision": _revision(model.path),
        "seconds": round(said.seconds, 3),
        "source": request.source.name,
        "sha256": item.source.sha256,
        "text_sha256": captions.sha256_of(content),
        "replaces": standing.ours,
        "notes": notes,
    }
    files.write_json(request.sidecar, sidecar)
    write_picture(preview(item.decoded.image, entities, caption), request.preview)
    outputs = [request.sidecar, request.preview]
    text_sha256 = standing.ours
    if standing.writable:
        files.write_bytes(standing.text, content)
        text_sha256 = captions.sha256_of(content)
    if text_sha256:
        outputs.append(standing.text)
    facts = {
        "sha256": item.source.sha256,
        "caption": caption,
        "entities": sidecar["entities"],
        "text_sha256": text_sha256,
        "captioner": model.name,
        "seconds": sidecar["seconds"],
    }
    return JobResult(facts, outputs)


@dataclass(frozen=True)
class _Standing:
    """Whose text stands.

    Attributes:
        text: captions/<stem>.txt.
        ours: the sha256 of our own text there; None where nothing or a person's text lies there.
        writable: whether we may write: nothing lies there or ours does, and no person's text lies beside the picture.
    """

    text: Path
    ours: str | None
    writable: bool


def _standing(request: CaptionRequest) -> _Standing:
    # An older text of ours may lie there even where a person's now wins: it stays known as ours.
    text = request.text or request.sidecar.with_suffix(".txt")
    if os.path.lexists(text) and not text.is_file():
        return _Standing(text, None, writable=False)  # a folder or a pipe of that name is no business of ours
    beside = request.source.with_suffix(".txt")
    # Beside a picture called crop.jpg may lie the crop.txt of its session, which is no caption.
    is_wishes = is_wishes_name(beside.name) and beside.parent == request.sidecar.parent.parent
    said_beside = beside != text and not is_wishes and captions.first_line(_content(beside) or b"") is not None
    persons = request.text is None or said_beside
    there = _content(text)
    if there is None:
        return _Standing(text, None, not persons)
    if captions.is_ours(there, {request.written, *_recorded(request.sidecar)}):
        return _Standing(text, captions.sha256_of(there), not persons)
    return _Standing(text, None, writable=False)


def _content(path: Path) -> bytes | None:
    """The content of a regular file; None for anything else, which is never opened: a pipe would block."""
    return path.read_bytes() if path.is_file() else None


def _recorded(sidecar: Path) -> set[str]:
    """The hashes that our own sidecar gives our text: what it was about to write, and what lay there before."""
    try:
        known = json.loads(sidecar.read_bytes())
    except (FileNotFoundError, ValueError):
        return set()
    if not isinstance(known, dict):
        return set()
    return {value for value in (known.get("text_sha256"), known.get("replaces")) if isinstance(value, str)}


def _revision(path: Path) -> str | None:
    """The commit of a model in the hub's cache, whose folders are called snapshots/<commit>."""
    return path.name if path.parent.name == "snapshots" else None
