"""What a run trains with: the base that its spec names, and the session's pictures with the lines that win."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import Any

from daemon.config import Settings
from daemon.index import Index
from daemon.session import Session
from sessions import layout
from sessions.captions import Chosen, first_line, is_ours, read_caption
from sessions.spec import TrainSpec


def base_name(spec: TrainSpec, settings: Settings) -> str:
    """The base that a spec trains: its own, else the tree's."""
    return spec.base if spec.base != "auto" else settings.base


def wants_generated(spec: TrainSpec) -> bool:
    """Whether a run surely trains with captions that fastsd made."""
    return spec.captions is True or (spec.captions == "auto" and spec.concept == "style")


def person_text(picture: Path) -> bytes | None:
    """The caption file that a person put beside a picture; None where there is none with a line in it."""
    beside = picture.with_suffix(".txt")
    content = _bytes_of(beside) if beside.is_file() else None
    return content if content is not None and first_line(content) else None


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
                # Where the phrases of our own line stand in it, so that training can put its token there.
                "entities": caption.get("entities", []) if chosen and chosen.origin == "generated" else [],
            },
        )
    return pictures


def noun_of(phrase: str) -> str:
    """What a grounded phrase is about, without its article: "a snowman" → "snowman"."""
    words = phrase.split()
    return " ".join(words[1:] if len(words) > 1 and words[0].lower() in ("a", "an", "the") else words)


def caption_of(session: Session, relative: str, stem: str) -> Chosen | None:
    """The line that may train with a picture: a person's, else the generated one."""
    captions = session.folder / layout.CAPTIONS
    beside = text_beside(session, relative)
    own = PurePosixPath(relative).stem
    if beside is None and layout.same_stem(f"{own}.") != layout.same_stem(f"{stem}."):
        # The second picture of a stem: what a person wrote for the first serves it, too.
        beside = _persons(session, captions / f"{own}.txt")
    record = session.manifest.get("caption", relative) or {}
    return read_caption(_bytes_of(captions / f"{stem}.txt"), beside, [record.get("text_sha256")])


def text_beside(session: Session, relative: str) -> bytes | None:
    """What a person wrote beside a picture; beside a picture called crop.jpg may lie the crop.txt of the session."""
    beside = layout.role_in_session(PurePosixPath(relative).with_suffix(".txt").as_posix())
    return person_text(session.folder / relative) if beside is layout.Role.CAPTION else None


def _persons(session: Session, text: Path) -> bytes | None:
    """The content of a file in captions/, unless it is what fastsd wrote."""
    source = session.source_of(text.name)
    record = (session.manifest.get("caption", source) if source else None) or {}
    content = _bytes_of(text)
    return None if content is None or is_ours(content, [record.get("text_sha256")]) else content


def _bytes_of(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except OSError:
        return None
