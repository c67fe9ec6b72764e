"""The caption job: pictures in batches in; a line, a sidecar and a preview each out."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from handlers.caption.boxes import Utterance
from handlers.caption.clean import NEUTRAL, Entity, clean, place
from handlers.caption.draw import LONG_SIDE, preview
from handlers.caption.prompts import Question
from handlers.caption.rules import Line, Rules, applied
from handlers.caption.speaking import Ask, Interrupted, Spoken
from handlers.caption.voice import Voice, open_voice
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
        precision: how the model computes; ``auto`` picks.
        mode: ``brief`` or ``detailed``.
        prompt: a person's own, in the mode's place.
        questions: what else is asked about the picture.
        check: whether to score how well the line fits; None where that is cheap.
        rules: what becomes of the line.
    """

    source: Path
    text: Path | None
    sidecar: Path
    preview: Path
    written: str | None
    captioner: str
    models: Path | None
    pixel_limit: int
    precision: str
    mode: str
    prompt: str | None
    questions: tuple[Question, ...]
    check: bool | None
    rules: Rules

    @classmethod
    def of(cls, payload: Mapping[str, Any]) -> CaptionRequest:
        """Read a payload. Raises ``KeyError``, ``ValueError`` or ``TypeError`` where it is none."""
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
            precision=payload.get("precision") or "auto",
            mode=payload.get("mode") or "brief",
            prompt=payload.get("prompt"),
            questions=tuple(Question.of(value) for value in payload.get("questions") or ()),
            check=None if (check := payload.get("check")) in (None, "auto") else bool(check),
            rules=Rules.of(payload),
        )

    def asks(self, picture: int, voice: Voice) -> list[Ask]:
        """The caption first, then the questions, all about one picture.

        Raises:
            Refusal: something cannot be asked.
            Waiting: the settings ask for what this captioner cannot do.
        """
        if self.check:
            voice.require_scoring()
        questions = [voice.question(picture, question) for question in self.questions]
        return [voice.caption(picture, self.mode, self.prompt, self.rules.never), *questions]


@dataclass(frozen=True)
class _Job:
    """A job and its place in the hand-out."""

    index: int
    context: JobContext
    request: CaptionRequest


@dataclass(frozen=True)
class _Prepared:
    """A job whose picture is decoded; ``number`` is its place among those."""

    job: _Job
    number: int
    asks: Sequence[Ask]
    source: SourceFile
    decoded: Decoded


class CaptionHandler:
    """Captions pictures; keeps the model that it used last."""

    def __init__(self) -> None:
        self._kept: tuple[Path, str] | None = None
        self._voice: Voice | None = None

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
        groups: defaultdict[tuple[str, Path | None, str], list[_Job]] = defaultdict(list)
        for index, context in enumerate(contexts):
            try:
                request = CaptionRequest.of(context.payload)
            except (KeyError, ValueError, TypeError) as error:
                outcomes[index] = error
            else:
                groups[request.captioner, request.models, request.precision].append(_Job(index, context, request))
        for group in groups.values():
            outcomes.update(self._run_group(group))
        return [outcomes[index] for index in range(len(contexts))]

    def _run_group(self, group: Sequence[_Job]) -> dict[int, JobResult | BaseException]:
        """The jobs that name one captioner and one precision."""
        outcomes: dict[int, JobResult | BaseException] = {}
        first = group[0]
        try:
            model = registry.find(first.request.captioner, "captioner", first.request.models, first.context.cache)
            voice = self._loaded(model.path, first.context.device, first.request.precision)
        except Exception as error:  # whatever it is, it is every job's
            return {job.index: error for job in group}
        prepared: list[_Prepared] = []
        for job in group:
            try:
                job.context.check_cancelled()
                prepared.append(_prepare(job, len(prepared), voice))
                job.context.report(0, 1, "captioning", {})
            except Exception as error:
                outcomes[job.index] = error
        return outcomes | _told(voice, prepared, model)

    def _loaded(self, path: Path, device: str, precision: str) -> Voice:
        if self._voice is None or self._kept != (path, precision):
            self._voice = None  # the old one goes before the new one comes
            self._voice = open_voice(path, device, precision)
            self._kept = (path, precision)
        return self._voice


def _told(voice: Voice, prepared: Sequence[_Prepared], model: registry.Model) -> dict[int, JobResult | BaseException]:
    """Ask all there is to ask, and write each picture's files as soon as its last answer is there."""
    outcomes: dict[int, JobResult | BaseException] = {}
    asks = [ask for item in prepared for ask in item.asks]
    said: defaultdict[int, dict[int, Spoken]] = defaultdict(dict)
    begins = list(accumulate((len(item.asks) for item in prepared), initial=0))
    try:
        for place_, answer in voice.speak(
            [item.decoded.image for item in prepared],
            asks,
            halted=lambda: any(item.job.context.is_stopping() for item in prepared),
        ):
            item = prepared[asks[place_].picture]
            if isinstance(answer, BaseException):
                outcomes.setdefault(item.job.index, answer)
                continue
            answers = said[item.number]
            answers[place_ - begins[item.number]] = answer
            if len(answers) == len(item.asks) and item.job.index not in outcomes:
                outcomes[item.job.index] = _finished(item, [answers[n] for n in range(len(item.asks))], voice, model)
    except Interrupted:
        ending: BaseException = Stopping()
    except Exception as error:
        ending = error
    else:
        return outcomes
    return {item.job.index: ending for item in prepared} | outcomes


def _finished(
    item: _Prepared, said: Sequence[Spoken], voice: Voice, model: registry.Model
) -> JobResult | BaseException:
    try:
        item.job.context.check_cancelled()
        return _finish(item, said, voice, model)
    except Exception as error:
        return error


def _prepare(job: _Job, number: int, voice: Voice) -> _Prepared:
    asks = job.request.asks(number, voice)
    source = read_source(job.request.source)
    opened = OpenPicture(source, job.request.pixel_limit)
    return _Prepared(job, number, asks, source, opened.decode(LONG_SIDE / opened.longer_side))


def _line(request: CaptionRequest, utterance: Utterance) -> tuple[Line, list[str]]:
    """The caption with its boxes, and notes for people."""
    notes = []
    line = None
    if (usable := clean(utterance.text)) is not None:
        line = applied(usable, place(utterance.grounded, usable), request.rules)
    if line is None:
        line = applied(NEUTRAL, place(utterance.grounded, NEUTRAL), replace(request.rules, drop=()))
        notes.append(f"The model said nothing usable, so the caption is {NEUTRAL!r}. Write a better one.")
    if utterance.dropped:
        notes.append(f"{utterance.dropped} boxes of the model were unusable and left out.")
    if line is None:
        raise AssertionError("nothing is dropped from the neutral line")
    return line, notes


def _finish(item: _Prepared, said: Sequence[Spoken], voice: Voice, model: registry.Model) -> JobResult:
    """Write what was said: the sidecar first, because it tells our text from a person's if we die in between."""
    request = item.job.request
    spoken, prompt = said[0], item.asks[0].prompt
    line, found = _line(request, voice.utterance(item.asks[0], spoken))
    caption, entities = line.text, line.entities
    notes = [*item.decoded.warnings, *found]
    content = captions.file_bytes(caption)
    standing = _standing(request)
    answers = [
        voice.answered(question, ask, answer)
        for question, ask, answer in zip(request.questions, item.asks[1:], said[1:], strict=True)
    ]
    match = _match(request, voice, spoken, standing.persons)
    if match and not match["fits"]:
        notes.append(f"The line does not seem to fit the picture (score {match['score']:+.2f}): have a look at it.")
    sidecar: dict[str, Any] = {
        "caption": caption,
        "raw": spoken.raw,
        "entities": [entity.to_json() for entity in entities],
        "answers": answers,
        "edits": list(line.edits),
        "match": match,
        "prompt": prompt,
        "model": model.name,
        "revision": _revision(model.path),
        "precision": voice.precision,
        "seconds": round(sum(answer.seconds for answer in said), 3),
        "source": request.source.name,
        "sha256": item.source.sha256,
        "text_sha256": captions.sha256_of(content),
        "replaces": standing.ours,
        "notes": notes,
    }
    files.write_json(request.sidecar, sidecar)
    write_picture(preview(item.decoded.image, _drawn(entities, answers), caption), request.preview)
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
        **({"answers": answers} if answers else {}),
        **({"match": match} if match else {}),
        "text_sha256": text_sha256,
        "captioner": model.name,
        "seconds": sidecar["seconds"],
    }
    return JobResult(facts, outputs)


def _match(request: CaptionRequest, voice: Voice, said: Spoken, persons: str | None) -> dict[str, Any] | None:
    """How well the line that counts fits the picture: a person's, else the model's own. None where nobody asks."""
    if not (voice.is_scoring_cheap if request.check is None else request.check):
        return None
    found = voice.score(said, persons)
    return {**found.to_json(), "by": "person" if persons else "fastsd"}


def _drawn(entities: Sequence[Entity], answers: Sequence[Mapping[str, Any]]) -> list[Entity]:
    """The boxes of the caption and of what was asked for."""
    asked = [
        Entity(found["phrase"], None, tuple(found["box"]))
        for answer in answers
        if answer["kind"] == "ground"
        for found in answer["entities"]
    ]
    return [*entities, *asked]


@dataclass(frozen=True)
class _Standing:
    """Whose text stands.

    Attributes:
        text: captions/<stem>.txt.
        ours: the sha256 of our own text there; None where nothing or a person's text lies there.
        writable: whether we may write: nothing lies there or ours does, and no person's text lies beside the picture.
        persons: the line that a person wrote, None where nobody did.
    """

    text: Path
    ours: str | None
    writable: bool
    persons: str | None = None


def _standing(request: CaptionRequest) -> _Standing:
    # An older text of ours may lie there even where a person's now wins: it stays known as ours.
    text = request.text or request.sidecar.with_suffix(".txt")
    if os.path.lexists(text) and not text.is_file():
        return _Standing(text, None, writable=False)  # a folder or a pipe of that name is no business of ours
    beside = request.source.with_suffix(".txt")
    # Beside a picture called crop.jpg may lie the crop.txt of its session, which is no caption.
    is_wishes = is_wishes_name(beside.name) and beside.parent == request.sidecar.parent.parent
    said_beside = captions.first_line(_content(beside) or b"") if beside != text and not is_wishes else None
    persons = request.text is None or said_beside is not None
    there = _content(text)
    if there is None:
        return _Standing(text, None, not persons, said_beside)
    if captions.is_ours(there, {request.written, *_recorded(request.sidecar)}):
        return _Standing(text, captions.sha256_of(there), not persons, said_beside)
    return _Standing(text, None, writable=False, persons=captions.first_line(there) or said_beside)


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
