"""What a picture's crop depends on besides the picture: train.yaml, crop.txt, and what its caption found.

The first crop of a picture is made without its caption, which takes far longer. Where that found no face, the crop is
made again with the caption's grounded boxes. What is wanted is a function of the session's files and its manifest, so
that it is the same after any restart, and a caption that says the same again crops nothing again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from handlers.crop.grounded import PEOPLE, is_one_of, words_of
from sessions import layout
from sessions.captions import decoded
from sessions.manifest import Record
from sessions.refusal import Refusal
from sessions.spec import parse_spec
from sessions.wishes import CODE, SUBJECTS, Wishes, parse_wishes

UNMET = "unmet"
"""The kind of a record of a wish that a picture cannot fulfil."""
_FACELESS = frozenset({"segment", "saliency", "centre", "grounded"})
"""Findings that say that no face was found: the caption knows better, or may."""
_GROUNDING = ("entities", "words")
_NETWORK = "network"
_MOST_BYTES = 1 << 20
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class CropRules:
    """What a session's own files say about its crops.

    Attributes:
        mode: ``smart``, ``centre`` or ``off``; None where train.yaml cannot be used as it is: what was made stands.
        words: nouns for the subject that train.yaml gives.
        wishes: crop.txt's.
        wishes_name: how crop.txt is spelled here, "" where there is none.
        problem: what is wrong with crop.txt.
        base: the base that train.yaml names, or ``auto``.
        resolution: the resolution that it names, in pixels; 0 leaves it to the base.
    """

    mode: str | None = "smart"
    words: tuple[str, ...] = ()
    wishes: Wishes = field(default_factory=Wishes)
    wishes_name: str = ""
    problem: Refusal | None = None
    base: str = "auto"
    resolution: int = 0


def read_crop_rules(folder: Path) -> CropRules:
    """The rules of a session, from its files as they are now, settled or not: a change is told when it has settled."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(
                entry.name for entry in entries if layout.is_spec_name(entry.name) or layout.is_wishes_name(entry.name)
            )
    except FileNotFoundError:
        return CropRules()
    except OSError:
        return CropRules(mode=None)
    specs = [name for name in names if layout.is_spec_name(name)]
    wishes = next((name for name in names if layout.is_wishes_name(name)), "")
    spec = min(specs, key=lambda name: layout.SPEC_NAMES.index(name.lower()), default=None)
    rules = _read_spec(folder / spec) if spec else CropRules()
    said, problem = _read_wishes(folder / wishes) if wishes else (Wishes(), None)
    return replace(rules, wishes=said, wishes_name=wishes, problem=problem)


def _read_spec(file: Path) -> CropRules:
    try:
        spec = parse_spec(_content(file).decode("utf-8", errors="replace"))
    except (OSError, Refusal):
        return CropRules(mode=None)
    words = tuple(word for word in (spec.class_, spec.instance) if word not in ("auto", "filename"))
    resolution = spec.resolution if isinstance(spec.resolution, int) else 0
    return CropRules(spec.crop, words, base=spec.base, resolution=resolution)


def _read_wishes(file: Path) -> tuple[Wishes, Refusal | None]:
    try:
        content = _content(file)
    except OSError as error:
        advice = "Give the user that fastsd runs as the right to read it."
        return Wishes(), Refusal(CODE, f"{file.name} cannot be read: {error.strerror}.", advice)
    if len(content) > _MOST_BYTES:
        return Wishes(), Refusal(CODE, f"{file.name} is larger than 1 MiB.", "Write one wish a line, and few lines.")
    return parse_wishes(decoded(content))


def _content(file: Path) -> bytes:
    # Not blocking: what carries the name may be a pipe by now.
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as reader:
        return reader.read(_MOST_BYTES + 1) or b""


def crop_parameters(
    own: Mapping[str, Any],
    relative: str,
    rules: CropRules,
    made: Record | None,
    caption: Record | None,
    *,
    unmet: Record | None = None,
    network: Callable[[], Mapping[str, Any] | None] = lambda: None,
) -> dict[str, Any] | None:
    """The parameters of the crop that a picture wants now, or None where the one that was made stands.

    Args:
        own: the tree's parameters: ``mode``, ``resolution``.
        relative: the picture's path in its session.
        rules: the session's.
        made: the record of the crop of this very content, None where there is none.
        caption: the record of its caption, likewise.
        unmet: the record of a wish that this content cannot fulfil, likewise.
        network: () → the salient-object network that is here, for those who wish for one; None where there is none.
    """
    before = dict(made["params"]) if made is not None else {}
    wish = rules.wishes.of(relative)
    if unmet is not None and unmet.get("wish") == wish:
        wish = {}
    base = _base(own, wish, rules.mode or str(before.get("mode", own["mode"])))
    if base.get("wish", {}).get("subject") == "segment" and (chosen := _network_for(made, network())):
        base[_NETWORK] = dict(chosen)
    stands = made is not None and {key: value for key, value in before.items() if key not in _GROUNDING} == base
    wanted = base
    if caption is not None:
        grounding = _grounding(caption, rules.words if rules.mode is not None else before.get("words", ()))
        if _follows(base, grounding, str(made.get("subject")) if made and stands else None):
            wanted = base | grounding
        elif stands:
            return None
    elif stands:
        return None
    return None if stands and wanted == before else wanted


def _network_for(made: Record | None, here: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The network that a crop shall be made with, as its parameters tell it.

    What one has made stands, whichever is here now: the tree may be looked at by another machine.
    """
    if made is not None and (here is None or made.get("subject") == "segment"):
        before: Mapping[str, Any] | None = made["params"].get(_NETWORK)
        return before
    return here


def _base(own: Mapping[str, Any], wish: Mapping[str, Any], mode: str) -> dict[str, Any]:
    # A line of crop.txt is said of these pictures, `crop:` of all: the nearer word wins.
    if "box" in wish or "subject" in wish:
        mode = "smart"
    base = {**own, "mode": mode}
    return {**base, "wish": dict(wish)} if wish and mode == "smart" else base


def _follows(base: Mapping[str, Any], grounding: Mapping[str, Any], found: str | None) -> bool:
    """Whether the crop may be the better for its caption's boxes.

    Args:
        base: the parameters without them.
        grounding: the boxes.
        found: what the crop that was made without them shows, None where there is none.
    """
    wish = base.get("wish", {})
    subject = wish.get("subject", "")
    if base["mode"] != "smart" or "box" in wish or subject == "centre":
        return False
    if "exclude" in wish or subject not in ("", *SUBJECTS.values()):
        return True
    if subject == "segment":
        return False
    if found == "face":
        # The dog of the session is trusted more than the face of whom it sits with.
        return subject == "" and not all(_is_person(word) for word in grounding.get("words", ()))
    return found is None or found in _FACELESS


def _is_person(word: str) -> bool:
    """Whether the subject of a noun is a face, where there is one."""
    return any(is_one_of(part, PEOPLE) for part in words_of(word))


def _grounding(caption: Record, words: Sequence[str]) -> dict[str, Any]:
    entities = [{"phrase": str(e["phrase"]), "box": list(e["box"])} for e in caption.get("entities") or ()]
    if not entities:
        return {}
    return {"entities": entities, "words": spoken_words([str(e["phrase"]) for e in entities], words)}


def spoken_words(phrases: Sequence[str], words: Sequence[str]) -> list[str]:
    """The words that the phrases of a caption speak of: another class makes again only the crops that it concerns."""
    spoken = {stem for phrase in phrases for stem in _stems(phrase)}
    return [word for word in words if spoken & _stems(word)]


def _stems(text: str) -> set[str]:
    """The words of a text, each also without what may be the end of a plural."""
    words = _WORD.findall(text.casefold())
    return {word.removesuffix(end) for word in words for end in ("", "s", "es")}
