"""The contact sheet of a session: wanted once its crops have settled, and again when what it shows has changed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from daemon.index import Fact
from daemon.jobs import JobRequest, job_key
from daemon.routing import fingerprint, same_content
from daemon.session import Session
from sessions import layout
from sessions.manifest import Record, outputs_present

KIND = "sheet"
MOST = 200
"""Pictures on a sheet: of a larger session, the newest."""


@dataclass(frozen=True)
class Sheet:
    """What a sheet shows.

    Attributes:
        records: the crops on it, in the order of their names.
        more: how many there are besides.
    """

    records: list[Record]
    more: int

    @property
    def digest(self) -> str:
        """Another one for other pictures, windows or findings."""
        keys = ("source", "sha256", "box", "subject")
        shown = [[*(record.get(key) for key in keys), is_wished(record)] for record in self.records]
        return fingerprint([shown, self.more])


def is_wished(crop: Record) -> bool:
    """Whether a person said what a crop shall show."""
    wish = (crop.get("params") or {}).get("wish", {})
    return "box" in wish or "subject" in wish


def crops_of(session: Session, fact_of: Callable[[str], Fact | None]) -> list[Record]:
    """The crops of the pictures that are there as they are now.

    Args:
        session: the session.
        fact_of: (path in the session) → the settled fact, None where nothing lies there.
    """
    return [
        record
        for record in session.manifest.of_kind("crop")
        if (fact := fact_of(str(record["source"]))) is not None and same_content(record, fact)
    ]


def sheet_of(crops: Iterable[Record]) -> Sheet:
    """The sheet of a session's crops."""
    newest = sorted(crops, key=lambda record: (-record["mtime_ns"], str(record["source"])))
    return Sheet(sorted(newest[:MOST], key=lambda record: str(record["source"])), max(0, len(newest) - MOST))


def sheet_request(session: Session, crops: Iterable[Record]) -> JobRequest | None:
    """The job that draws the sheet, None where the one that lies there shows what is there."""
    sheet = sheet_of(crops)
    parameters = {"digest": sheet.digest}
    made = session.manifest.get(KIND, "")
    stands = made is not None and made.get("params") == parameters and outputs_present(session.folder, made)
    # Older versions gave the preview of a picture called crops.jpg the name of the sheet.
    if stands or not sheet.records or session.source_of("crops.jpg"):
        return None
    key = job_key(KIND, session.id, parameters)
    return JobRequest(key, KIND, session.id, "contact sheet", {"params": parameters})


def remove_sheet(session: Session) -> None:
    """No picture is left for a sheet to show.

    Raises:
        OSError: the folder cannot be written.
    """
    if session.manifest.get(KIND, "") is not None:
        with suppress(FileNotFoundError):
            (session.folder / layout.SHEET).unlink()
        session.manifest.append([{"kind": KIND, "gone": True}])


def sheet_payload(session: Session, sheet: Sheet, pixel_limit: int) -> dict[str, Any]:
    """The payload of the job, with absolute paths."""
    pictures = [
        {
            "source": os.fspath(session.folder / record["source"]),
            "box": record["box"],
            "subject": "fixed" if "box" in (record.get("params") or {}).get("wish", {}) else record.get("subject"),
            "wished": is_wished(record),
        }
        for record in sheet.records
    ]
    output = os.fspath(session.folder / layout.SHEET)
    return {"output": output, "pictures": pictures, "more": sheet.more, "pixel_limit": pixel_limit}
