"""Captions in other languages: wanted once the captions stand, and again where a line or a language is another."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from daemon.config import Settings
from daemon.index import Fact
from daemon.jobs import JobRequest, job_key
from daemon.routing import fingerprint, same_content
from daemon.session import Session
from handlers.context import Waiting
from handlers.models import registry
from handlers.translate.languages import ENGLISH, known_language, translator_of
from sessions import layout
from sessions.manifest import Record
from sessions.refusal import Refusal
from sessions.spec import parse_spec

KIND = "translate"
FactOf = Callable[[str], Fact | None]


def translators(settings: Settings) -> dict[str, str]:
    """Language → the model that is to translate into it. English needs none."""
    return {
        language: translator_of(language, settings.translator) for language in settings.languages if language != ENGLISH
    }


def translators_here(
    settings: Settings, models: Path | None, cache: Path
) -> tuple[dict[str, str], list[str], float | None]:
    """The translators of the settings' languages that are on this machine.

    Args:
        settings: of the tree.
        models: its Models folder, None where there is none.
        cache: the folder of downloads.

    Returns:
        Language → translator; sentences about those that are missing; seconds after which it is worth looking again.
    """
    here: dict[str, str] = {}
    missing: dict[str, list[str]] = {}
    sleeps: list[float] = []
    for language, name in translators(settings).items():
        try:
            known_language(language, settings.translator)
            registry.check(name, "translator", models, cache)
        except Refusal as refusal:
            missing.setdefault(str(refusal), []).append(language)
        except Waiting as waiting:
            missing.setdefault(waiting.reason, []).append(language)
            sleeps.append(waiting.retry_after)
        else:
            here[language] = name
    waits = [f"Captions stay English without {', '.join(codes)}: {reason}" for reason, codes in missing.items()]
    return here, waits, min(sleeps, default=None)


def protected(session: Session, settings: Settings, spec: str | None) -> list[str]:
    """The words that stand for the subject: those of fastsd.yaml, and of the session's train.yaml.

    Args:
        session: the session.
        settings: of the tree.
        spec: the name of its train.yaml; None where there is none.
    """
    words = {settings.caption.instance or ""}
    if spec is not None:
        with suppress(OSError, Refusal):
            instance = parse_spec((session.folder / spec).read_bytes().decode("utf-8", errors="replace")).instance
            words |= {instance} - {"auto", "filename"}
    return sorted(word for word in words if word)


def captioned(session: Session, fact_of: FactOf) -> list[Record]:
    """The captions of the pictures that are there as they are now."""
    return [
        record
        for record in session.manifest.of_kind("caption")
        if (fact := fact_of(str(record["source"]))) is not None and same_content(record, fact)
    ]


def translate_request(
    session: Session, records: Iterable[Record], languages: Mapping[str, str], words: list[str], fact_of: FactOf
) -> JobRequest | None:
    """The job that translates, None where all that is there has been translated.

    A line is told by its record and by the facts of the files in which a person may have written: none is read here.

    Args:
        session: the session.
        records: of its captions.
        languages: language → translator, those that are on this machine.
        words: what must stay as it is.
        fact_of: (path in the session) → the settled fact, None where nothing lies there.
    """
    told = [
        [record["source"], record.get("text_sha256"), record.get("at"), *_stamps(record, fact_of)]
        for record in sorted(records, key=lambda record: str(record["source"]))
    ]
    if not told or not languages:
        return None
    parameters = {"languages": dict(languages), "words": words, "digest": fingerprint(told)}
    made = session.manifest.get(KIND, "")
    if made is not None and made.get("params") == parameters:
        return None
    key = job_key(KIND, session.id, parameters)
    return JobRequest(key, KIND, session.id, "captions", {"params": parameters})


def _stamps(record: Record, fact_of: FactOf) -> list[Any]:
    source = PurePosixPath(str(record["source"]))
    texts = {f"{layout.CAPTIONS}/{record['stem']}.txt", f"{layout.CAPTIONS}/{source.stem}.txt"}
    texts.add(source.with_suffix(".txt").as_posix())
    facts = (fact_of(text) for text in sorted(texts))
    return [[fact.size, fact.mtime_ns] if fact else None for fact in facts]


def translate_payload(
    session: Session,
    records: Iterable[Record],
    stored: Mapping[str, Any],
    line_of: Callable[[Record], tuple[str, str] | None],
    models: str | None,
) -> dict[str, Any]:
    """The payload of the job, with absolute paths.

    Args:
        session: the session.
        records: of its captions.
        stored: what the queue keeps.
        line_of: (record) → (the line that trains, ``person`` or ``fastsd``); None where there is none.
        models: the tree's Models folder.
    """
    pictures = [
        {
            "sidecar": os.fspath(session.folder / layout.CAPTIONS / f"{record['stem']}.json"),
            "line": chosen[0],
            "by": chosen[1],
        }
        for record in records
        if (chosen := line_of(record)) is not None
    ]
    parameters = stored["params"]
    return {
        "languages": parameters["languages"],
        "words": parameters["words"],
        "models": models,
        "pictures": pictures,
    }
