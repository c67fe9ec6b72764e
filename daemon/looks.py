"""What people may want to look at in a session: lines about the set of pictures, and wishes that cannot be met."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from daemon.cropping import UNMET
from daemon.index import Fact
from daemon.routing import same_content
from daemon.session import Session
from sessions.health import review
from sessions.manifest import Record
from sessions.refusal import Refusal
from sessions.wishes import CODE, SUBJECTS

_NAMED = 4


def hints(
    session: Session, pictures: Collection[str], crops: Sequence[Record], resolution: int, *, complete: bool
) -> list[str]:
    """Lines about the pictures of a session.

    Args:
        session: the session.
        pictures: the paths of its pictures.
        crops: the records of the crops that are there.
        resolution: pixels of a side at which the session trains.
        complete: whether every picture has its crop: then the set as a whole can be judged.
    """
    lines = review(crops, resolution) if complete else []
    rules = session.crop_rules
    if unmatched := rules.wishes.unmatched(list(pictures)):
        lines.append(f"{rules.wishes_name} names what is no picture here: {_some(unmatched)}.")
    for subject, names in _missed(crops).items():
        what = "no face was found" if subject == "faces" else f"the caption shows no {subject}"
        lines.append(f"{rules.wishes_name} asks for {subject}, and {what} in {_some(names)}.")
    for problem, names in _unasked(crops).items():
        lines.append(f"{_some(names)}: {problem}")
    return lines


def _unasked(crops: Iterable[Record]) -> dict[str, list[str]]:
    """Why the salient-object network could not be asked → the pictures."""
    unasked: dict[str, list[str]] = {}
    for record in crops:
        if problem := record.get("network_problem"):
            unasked.setdefault(str(problem), []).append(str(record["source"]).rsplit("/", 1)[-1])
    return unasked


def _missed(crops: Iterable[Record]) -> dict[str, list[str]]:
    """Subjects that crop.txt asks for → the pictures in which they were not found."""
    missed: dict[str, list[str]] = {}
    for record in crops:
        parameters = record.get("params") or {}
        subject = str(parameters.get("wish", {}).get("subject", ""))
        is_noun = subject not in ("", *SUBJECTS.values())
        # A noun is known by the caption: before that is there, nothing is amiss.
        if (is_noun and "entities" in parameters and record.get("subject") != "grounded") or (
            subject == "faces" and record.get("subject") != "face"
        ):
            missed.setdefault(subject, []).append(str(record["source"]).rsplit("/", 1)[-1])
    return missed


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def unmet_wish(session: Session, pictures: Mapping[str, Fact]) -> Refusal | None:
    """What is wrong with crop.txt as a picture sees it: the first wish that a picture cannot fulfil."""
    wishes = session.crop_rules.wishes
    unmet = [
        (wishes.line_of(relative) or 0, relative, record)
        for relative, fact in pictures.items()
        if (record := session.manifest.get(UNMET, relative)) is not None
        and same_content(record, fact)
        and record.get("wish") == wishes.of(relative)
    ]
    if not unmet:
        return None
    line, relative, record = min(unmet, key=lambda found: found[:2])
    what = f"{relative.rsplit('/', 1)[-1]}: {record['what']}"
    more = f" (And so for {len(unmet) - 1} more.)" if len(unmet) > 1 else ""
    return Refusal(CODE, what, f"{record['advice']}{more}", line or None)
