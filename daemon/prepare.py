"""Handing a job out: what the queue keeps in the session's terms becomes a payload of absolute paths.

Also the last look before work begins: a picture that changed since the job was queued has a newer job on its way, and
one whose session is gone has nobody waiting for it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daemon.config import Settings
from daemon.index import Index
from daemon.routing import SpecRecord
from daemon.runs import read_json
from daemon.session import Session, Sessions
from sessions import layout
from sessions.captions import Chosen, read_caption
from sessions.spec import TrainSpec, parse_spec


class Gone(Exception):  # noqa: N818 - it says what is the case
    """What the job was about is not there any more, or has changed: drop it."""


@dataclass(frozen=True)
class Preparer:
    """Makes payloads.

    Attributes:
        root: the tree.
        settings: of the tree.
        sessions: to find a job's folder by its session's identity.
        index: to list the pictures of a session.
    """

    root: Path
    settings: Settings
    sessions: Sessions
    index: Index

    def payload(self, kind: str, session_id: str, stored: Mapping[str, Any]) -> dict[str, Any]:
        """The payload of a job, as docs/architecture.md lists it.

        Raises:
            Gone: the job has nothing to do any more.
            Refusal: a train.yaml was spoiled since the job was queued.
        """
        try:
            session = self.sessions.by_id(session_id)
        except (LookupError, OSError) as error:
            raise Gone(str(error)) from error
        match kind:
            case "crop":
                return self._crop(session, stored)
            case "caption":
                return self._caption(session, stored)
            case "train":
                return self._train(session, stored)
            case "convert":
                return self._convert(session, stored)
            case _:
                return self._publish(session, stored)

    @property
    def models(self) -> str | None:
        """The tree's Models folder, if there is one."""
        folder = self.root / layout.MODELS
        return os.fspath(folder) if folder.is_dir() else None

    def _source(self, session: Session, stored: Mapping[str, Any]) -> Path:
        source: Path = session.folder / stored["source"]
        try:
            found = source.lstat()
        except OSError as error:
            raise Gone(str(error)) from error
        if (found.st_size, found.st_mtime_ns) != (stored["size"], stored["mtime_ns"]):
            message = f"{source} has changed since"
            raise Gone(message)
        return source

    def _crop(self, session: Session, stored: Mapping[str, Any]) -> dict[str, Any]:
        source = self._source(session, stored)
        return {
            "source": os.fspath(source),
            "output": os.fspath(session.folder / layout.CROPS / f"{stored['stem']}.jpg"),
            **stored["params"],
            "pixel_limit": self.settings.limits.picture_pixels,
        }

    def _caption(self, session: Session, stored: Mapping[str, Any]) -> dict[str, Any]:
        source = self._source(session, stored)
        stem = stored["stem"]
        record = session.manifest.get("caption", stored["source"]) or {}
        captions = session.folder / layout.CAPTIONS
        return {
            "source": os.fspath(source),
            # A person's words beside the picture win: then no second text is written that would say otherwise.
            "text": None if person_text(source) else os.fspath(captions / f"{stem}.txt"),
            "sidecar": os.fspath(captions / f"{stem}.json"),
            "preview": os.fspath(session.folder / layout.PREVIEWS / f"{stem}.jpg"),
            "written": record.get("text_sha256"),
            **stored["params"],
            "models": self.models,
            "pixel_limit": self.settings.limits.picture_pixels,
        }

    def _train(self, session: Session, stored: Mapping[str, Any]) -> dict[str, Any]:
        spec_record = SpecRecord.from_json(stored["spec_record"])
        common = {
            "folder": os.fspath(session.folder),
            "root": os.fspath(self.root),
            "session": session.id,
            "run": stored["run"],
            "models": self.models,
            "disk_reserve": self.settings.limits.disk_reserve,
            "spec_record": spec_record.to_json(),
        }
        # A run that has begun goes by its own run.json, whatever became of the train.yaml (promise 1).
        begun = read_json(session.folder / layout.RUNS / stored["run"] / "run.json")
        if begun is not None:
            base = str((begun.get("base") or {}).get("name") or self.settings.base)
            return {**common, "name": begun.get("name"), "spec": begun.get("spec"), "base": base, "pictures": []}
        try:
            text = (session.folder / spec_record.path).read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise Gone(str(error)) from error
        spec = parse_spec(text)
        return {
            **common,
            "name": spec.name or session.name,
            "spec": spec.to_json(),
            "base": base_name(spec, self.settings),
            "pictures": training_pictures(session, self.index),
        }

    def _convert(self, session: Session, stored: Mapping[str, Any]) -> dict[str, Any]:
        metadata, preview = stored.get("metadata", {}), stored.get("preview")
        name = layout.model_stem(metadata.get("title") or session.name, stored["run"])
        return {
            "source": os.fspath(session.folder / stored["finished"]),
            "output": os.fspath(session.folder / f"{name}.safetensors"),
            "dtype": None,
            "metadata": metadata,
            "run": stored["run"],
            "verify": "forward",
            "preview": os.fspath(session.folder / preview) if preview else None,
        }

    def _publish(self, session: Session, stored: Mapping[str, Any]) -> dict[str, Any]:
        model = session.folder / stored["model"]
        if not model.exists():
            message = f"{model} is gone"
            raise Gone(message)
        webui = self.settings.webui.model_dump(mode="json")
        proof = session.folder / layout.RUNS / stored["run"] / "proof.png"
        return {
            "model": os.fspath(model),
            "name": stored["name"],
            "run": stored["run"],
            "sha256": stored.get("sha256"),
            "webui": webui,
            "proof_picture": os.fspath(proof),
        }


def base_name(spec: TrainSpec, settings: Settings) -> str:
    """The base that a spec trains: its own, else the tree's."""
    return spec.base if spec.base != "auto" else settings.base


def person_text(picture: Path) -> Path | None:
    """The caption that a person put beside a picture, or None."""
    beside = picture.with_suffix(".txt")
    return beside if beside.is_file() else None


def training_pictures(session: Session, index: Index) -> list[dict[str, Any]]:
    """The pictures of a session that a run begins with: those that have a crop, with their window and caption.

    Whether a caption is used is the run's affair: ``caption_by`` says whether a person wrote it.
    """
    pictures = []
    for record in sorted(session.manifest.of_kind("crop"), key=lambda record: str(record["source"])):
        relative = record["source"]
        if index.lookup(session.tree_path(relative)) is None:
            continue
        chosen = caption_of(session, relative, record["stem"])
        caption = session.manifest.get("caption", relative) or {}
        pictures.append(
            {
                "source": os.fspath(session.folder / relative),
                "sha256": record["sha256"],
                "box": record["box"],
                "subject": record.get("subject"),
                "noun": next((noun_of(entity["phrase"]) for entity in caption.get("entities", ())), None),
                "caption": chosen.line if chosen else None,
                "caption_by": None if chosen is None else "fastsd" if chosen.origin == "generated" else "person",
            },
        )
    return pictures


def noun_of(phrase: str) -> str:
    """What a grounded phrase is about, without its article: "a snowman" → "snowman"."""
    words = phrase.split()
    return " ".join(words[1:] if len(words) > 1 and words[0].lower() in ("a", "an", "the") else words)


def caption_of(session: Session, relative: str, stem: str) -> Chosen | None:
    """The line that may train with a picture: a person's, else the generated one."""
    record = session.manifest.get("caption", relative) or {}
    beside = person_text(session.folder / relative)
    return read_caption(
        _bytes_of(session.folder / layout.CAPTIONS / f"{stem}.txt"),
        _bytes_of(beside) if beside else None,
        [record.get("text_sha256")],
    )


def _bytes_of(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except OSError:
        return None
