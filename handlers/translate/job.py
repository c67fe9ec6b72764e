"""The translate job: the captions of a session, in other languages, into their sidecars. English is what trains."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handlers.caption.speaking import Interrupted
from handlers.context import JobContext, JobResult, Stopping, Waiting
from handlers.models import registry
from handlers.translate.protect import translated
from sessions import captions, files

# So many captions are written before the next are begun: what is done stays done.
_CHUNK = 32


@dataclass(frozen=True)
class Caption:
    """One line to translate.

    Attributes:
        sidecar: captions/<stem>.json.
        line: the line that trains, a person's or ours.
        origin: ``person`` or ``fastsd``.
    """

    sidecar: Path
    line: str
    origin: str

    @property
    def sha256(self) -> str:
        """Of the line: which text a translation is of."""
        return captions.sha256_of(captions.file_bytes(self.line))


class TranslateHandler:
    """Translates captions; keeps the model that it used last."""

    def __init__(self) -> None:
        self._kept: Path | None = None
        self._translator: Any = None

    def run(self, context: JobContext) -> JobResult:
        """Translate what is not translated yet.

        Payload: ``languages`` {code: translator}; ``words`` that stay as they are; ``models``; ``pictures``
        [{``sidecar``, ``line``, ``by``}].

        Raises:
            Waiting: a translator is missing; the other languages are done by then.
            Stopping: the daemon stops; what was written stays.
            Cancelled: the job was cancelled.
        """
        payload = context.payload
        found = [Caption(Path(value["sidecar"]), value["line"], value["by"]) for value in payload["pictures"]]
        words = [str(word) for word in payload.get("words") or ()]
        missing: list[Waiting] = []
        counts: dict[str, int] = {}
        for language, name in sorted(payload["languages"].items()):
            wanted = [caption for caption in found if _is_wanted(caption, language, name, words)]
            try:
                counts[language] = self._translate(context, wanted, language, name, words)
            except Waiting as waiting:
                missing.append(waiting)
        if missing:
            raise missing[0]
        return JobResult({"translated": counts}, ())

    def _translate(
        self, context: JobContext, wanted: Sequence[Caption], language: str, name: str, words: Sequence[str]
    ) -> int:
        if not wanted:
            return 0
        translator, model = self._loaded(context, name)
        done = 0
        for start in range(0, len(wanted), _CHUNK):
            chunk = wanted[start : start + _CHUNK]
            context.progress(start, len(wanted), f"translating into {language}")
            try:
                results = translated(
                    [caption.line for caption in chunk],
                    words,
                    lambda lines: translator.translate(lines, language, context.is_stopping),
                )
            except Interrupted:
                raise Stopping from None
            for caption, result in zip(chunk, results, strict=True):
                entry: dict[str, Any] = {
                    "text": result.text or caption.line,
                    "of_sha256": caption.sha256,
                    "of": caption.origin,
                    "words": list(words),
                    "token": result.how or None,
                    "model": model.name,
                }
                if not result.text:
                    entry["note"] = "The translator said nothing: this is the English line."
                done += _add(caption.sidecar, language, entry)
        return done

    def _loaded(self, context: JobContext, name: str) -> tuple[Any, registry.Model]:
        from handlers.translate.model import Translator

        models = context.payload.get("models")
        model = registry.find(name, "translator", Path(models) if models else None, context.cache)
        if self._translator is None or self._kept != model.path:
            self._translator = None  # the old one goes before the new one comes
            self._translator = Translator.load(model.path, context.device)
            self._kept = model.path
        return self._translator, model


def _is_wanted(caption: Caption, language: str, name: str, words: Sequence[str]) -> bool:
    known = _sidecar(caption.sidecar)
    if known is None:
        return False  # it is on its way, and comes with its own job
    made = _entries(known).get(language)
    if not isinstance(made, dict):
        return True
    return (made.get("of_sha256"), made.get("words"), made.get("model")) != (caption.sha256, list(words), name)


def _add(sidecar: Path, language: str, entry: Mapping[str, Any]) -> int:
    """Read again, so that nothing is lost that came meanwhile. Returns how many were written."""
    known = _sidecar(sidecar)
    if known is None:
        return 0
    files.write_json(sidecar, {**known, "translations": {**_entries(known), language: entry}})
    return 1


def _entries(sidecar: Mapping[str, Any]) -> dict[str, Any]:
    entries = sidecar.get("translations")
    return entries if isinstance(entries, dict) else {}


def _sidecar(path: Path) -> dict[str, Any] | None:
    try:
        known = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return known if isinstance(known, dict) else None
