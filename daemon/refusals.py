"""What is said against a person's file, and taken back: an error file beside it, and a record that stands for it."""

from __future__ import annotations

from typing import Any

from daemon.session import Session
from sessions.errors import error_path, remove_error, write_error
from sessions.refusal import Refusal


def refuse(session: Session, name: str, refusal: Refusal, **stamp: Any) -> None:
    """A file of a person's that cannot be used: told beside it, once.

    Args:
        session: where it lies.
        name: its path there.
        refusal: what is wrong with it.
        stamp: ``job``, and what else the manifest should keep of it.

    Raises:
        OSError: the folder cannot be written.
    """
    known = session.manifest.get("refused", name) or {}
    line = {"kind": "refused", "source": name, **stamp, **refusal.to_json()}
    if any(known.get(key) != value for key, value in line.items()):
        session.manifest.append([line])
    # The record comes first and goes last: whoever dies in between leaves no error file that nobody knows.
    write_error(session.folder / name, refusal)


def remove_refusal(session: Session, name: str, job: str) -> None:
    """What was said against a file no longer holds.

    Raises:
        OSError: the folder cannot be written.
    """
    known = session.manifest.get("refused", name)
    if known is not None and known.get("job") == job:
        remove_error(session.folder / name)
        session.manifest.append([{"kind": "refused", "source": name, "gone": True}])


def standing_errors(session: Session) -> list[tuple[str, str]]:
    """The files of a session that were refused and not mended yet: (file, what is wrong, with its line)."""
    return [
        (str(record["source"]), f"line {record['line']}: " * bool(record.get("line")) + str(record.get("what", "")))
        for record in session.manifest.of_kind("refused")
        if error_path(session.folder / str(record["source"])).exists()
    ]
