"""What the end of a job leaves in the tree: a line in the manifest, an error file, a place in the trash.

Called before the queue forgets the job, so that a kill in between repeats the job and loses nothing.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

from daemon.cropping import UNMET
from daemon.routing import PICTURE_RECORDS
from daemon.session import Session
from sessions import layout
from sessions.errors import remove_error, write_error
from sessions.files import sweep_temporaries
from sessions.manifest import INTERMEDIATE, Record
from sessions.refusal import Refusal
from sessions.trash import move_to_trash
from sessions.wishes import CODE


def record_done(
    session: Session,
    kind: str,
    stored: Mapping[str, Any],
    facts: Mapping[str, Any],
    outputs: Sequence[str],
) -> None:
    """A job is done: remember what it made, and take back what was said against its file.

    Raises:
        OSError: the session's folder cannot be written.
    """
    record: Record = {"kind": record_kind(kind, stored)}
    for key in ("source", "size", "mtime_ns", "stem", "params", "run", "of", "step", "spec_record"):
        if key in stored:
            record[key] = stored[key]
    record |= facts
    record["outputs"] = [session.inside(Path(output)) for output in outputs]
    if any(output.startswith("../") for output in record["outputs"]):
        raise _moved_meanwhile(session, record["outputs"])
    for key in ("finished", "preview"):
        if record.get(key):
            record[key] = session.inside(Path(record[key]))
    records = [record]
    subject = subject_file(session, kind, stored)
    refusal = session.manifest.get("refused", subject) if subject else None
    if refusal is not None and refusal.get("job") == kind:
        records.append({"kind": "refused", "source": subject, "gone": True})
    session.manifest.append(records)
    if subject and (refusal is None or refusal.get("job") == kind):
        remove_error(session.folder / subject)


def record_kind(kind: str, stored: Mapping[str, Any]) -> str:
    """The kind of the record that a job leaves: an intermediate model is not (yet) one that the session has made."""
    return INTERMEDIATE if kind == "convert" and "of" in stored else kind


def _moved_meanwhile(session: Session, outputs: Sequence[str]) -> OSError:
    """The session's folder was renamed while the job wrote: what it left under the old name goes, and it runs again."""
    for output in outputs:
        stray = Path(os.path.normpath(session.folder / output))
        with suppress(OSError):
            stray.unlink()
            stray.parent.rmdir()
            stray.parent.parent.rmdir()
    return OSError(errno.ESTALE, f"{session.name} was renamed while it was worked on")


def is_there(file: Path) -> bool:
    """Whether something lies there; also true where the system cannot tell (a mount that does not answer)."""
    try:
        file.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def subject_file(session: Session, kind: str, stored: Mapping[str, Any]) -> str:
    """The file of the session that a job is about, beside which its errors are told; "" when there is none."""
    if kind == "train":
        return str(stored.get("spec_record", {}).get("path", ""))
    if kind == "convert" and "source" not in stored:
        # Its source is a folder of ours that nobody looks into: the train.yaml that asked for the run is looked at.
        run = stored if "of" in stored else session.manifest.get("train", str(stored.get("run", ""))) or {}
        return str((run.get("spec_record") or {}).get("path", ""))
    if kind == "publish":
        return str(stored.get("model", ""))
    return str(stored.get("source", ""))


def record_refused(session: Session, kind: str, stored: Mapping[str, Any], refusal: Refusal) -> None:
    """The input is at fault: say so beside it, and do not try it again until it changes.

    Raises:
        OSError: the folder cannot be written.
    """
    subject = subject_file(session, kind, stored)
    if not subject or not is_there(session.folder / subject):
        return
    if kind == "crop" and refusal.code == CODE:
        # Not the picture is at fault but the line of crop.txt, beside which it is told; the picture is cropped without.
        unmet = {"kind": UNMET, "wish": stored["params"].get("wish"), "what": refusal.what, "advice": refusal.advice}
        session.manifest.append([{**unmet, **{key: stored[key] for key in ("source", "size", "mtime_ns")}}])
        return
    write_error(session.folder / subject, refusal)
    record: Record = {"kind": "refused", "source": subject, "job": kind, **refusal.to_json()}
    stamp = stored.get("spec_record", stored if "source" in stored else {})
    record |= {key: stamp[key] for key in ("size", "mtime_ns", "sha256", "params") if key in stamp}
    session.manifest.append([record])


def record_failed(session: Session, kind: str, stored: Mapping[str, Any], message: str) -> None:
    """A job failed for good: say so beside its file. A picture is left out of training from now on.

    Raises:
        OSError: the folder cannot be written.
    """
    advice = "The log has more: fastsd logs. Once the cause is mended, try again with: fastsd retry."
    record_refused(session, kind, stored, Refusal("failed", f"{kind}: {message}", advice))


def record_ended_run(session: Session, stored: Mapping[str, Any], state: str, reason: str) -> None:
    """A run is over without a model: ``failed``, ``refused`` or ``cancelled``.

    Raises:
        OSError: the folder cannot be written.
    """
    record = {
        "kind": "train",
        "run": stored["run"],
        "state": state,
        "reason": reason,
        "spec_record": stored["spec_record"],
        "outputs": [],
    }
    session.manifest.append([record])


def revive_run(session: Session, run: str) -> None:
    """A run that ended without a model is wanted after all.

    Raises:
        OSError: the folder cannot be written.
    """
    record = session.manifest.get("train", run)
    if record is not None and record.get("state") != "finished":
        session.manifest.append([{"kind": "train", "run": run, "gone": True}])


def tidy_after_convert(session: Session, stored: Mapping[str, Any]) -> None:
    """The model's file is proven: what it was made from, and the checkpoints of its run, need no room any more.

    A folder that another trainer made is a person's, and stays.
    """
    if "finished" not in stored:
        return
    shutil.rmtree(session.folder / stored["finished"], ignore_errors=True)
    if "of" in stored:
        return  # an intermediate model: its run may go on
    shutil.rmtree(session.folder / layout.PRIVATE / "frozen" / stored["run"], ignore_errors=True)
    checkpoints = session.folder / layout.CHECKPOINTS
    for folder in checkpoints.glob("step-*"):
        if _run_of(folder) in (stored["run"], None):
            shutil.rmtree(folder, ignore_errors=True)
    sweep_temporaries(checkpoints)


def _run_of(checkpoint: Path) -> str | None:
    """The run that a checkpoint belongs to; None where it does not say."""
    try:
        value = json.loads((checkpoint / "state.json").read_bytes())
        return str(value["run"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def forget_picture(session: Session, relative: str, today: date) -> None:
    """A picture is gone; see ``forget_pictures``."""
    forget_pictures(session, [relative], today)


def forget_pictures(session: Session, sources: Iterable[str], today: date) -> None:
    """Pictures are gone: what was made of them goes to the trash; a person's caption stays where it is.

    Raises:
        OSError: the folder cannot be written.
    """
    gone = []
    for source in sources:
        thrown: list[str] = []
        for kind in PICTURE_RECORDS:
            record = session.manifest.get(kind, source)
            if record is not None:
                gone.append({"kind": kind, "source": source, "gone": True})
                thrown += [output for output in record.get("outputs", ()) if _is_ours(session, record, output)]
        move_to_trash(session.folder, thrown, today)
        session.release_stem(source)
        remove_error(session.folder / source)
    # One line a record, and one sync for all: whole folders of pictures go at once.
    session.manifest.append(gone)


def _is_ours(session: Session, record: Record, output: str) -> bool:
    """Whether an output is still what we wrote: a caption that a person edited is theirs."""
    if not output.endswith(".txt"):
        return True
    from hashlib import sha256

    try:
        return sha256((session.folder / output).read_bytes()).hexdigest() == record.get("text_sha256")
    except OSError:
        return False
