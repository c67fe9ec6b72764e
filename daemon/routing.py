"""From facts to wanted jobs. Pure: what is wanted is a function of the tree, so that it can be asked again at any time.

A picture wants a crop and a caption; a train.yaml that no run has recorded wants a run; a finished run wants its file;
a file wants its WebUI. What the manifest records about the same content and parameters is not wanted again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from daemon.cropping import UNMET, crop_parameters
from daemon.index import Fact
from daemon.jobs import JobRequest, job_key
from daemon.promotion import is_superseded, promoted
from daemon.session import Session
from sessions.layout import Shape, session_folder_of
from sessions.manifest import Record

PICTURE_KINDS = ("crop", "caption")
PICTURE_RECORDS = (*PICTURE_KINDS, "refused", UNMET)
"""Kinds of records about pictures."""
_LAST_SECOND = 253_402_300_799
"""The last second of the year 9999."""


@dataclass(frozen=True)
class PictureRules:
    """The parameters that decide what a picture's outputs look like; other parameters, other outputs.

    Attributes:
        crop_mode: ``smart``, ``centre`` or ``off``, where the session's own files say nothing.
        crop_resolution: side of the crop, in pixels.
        captioner: the captioner's name.
        caption: what else shapes captions, as far as it is no default.
        network: () → the salient-object network that is here, for crops that are wished for with one.
    """

    crop_mode: str = "smart"
    crop_resolution: int = 512
    captioner: str = "kosmos-2"
    caption: Mapping[str, Any] = field(default_factory=dict)
    network: Callable[[], Mapping[str, Any] | None] = lambda: None

    def parameters(self, kind: str) -> dict[str, Any]:
        """What the outputs of a kind depend on besides the picture."""
        if kind == "crop":
            return {"mode": self.crop_mode, "resolution": self.crop_resolution}
        return {"captioner": self.captioner, **self.caption}


def same_content(record: Mapping[str, Any], fact: Fact) -> bool:
    """Whether a record was made from the file as it is now: size and time of change stand for the content."""
    same_file = record.get("size") == fact.size and record.get("mtime_ns") == fact.mtime_ns
    return same_file and not record.get("stale")


def picture_requests(session: Session, relative: str, fact: Fact, rules: PictureRules) -> list[JobRequest]:
    """The jobs that a picture wants, less those whose result the manifest records.

    Args:
        session: the picture's session.
        relative: the picture's path in it.
        fact: the settled fact.
        rules: the parameters of this tree.
    """
    requests = []
    for kind, parameters in wanted_kinds(session, relative, fact, rules).items():
        content = f"{session.id}/{relative}:{fact.size}:{fact.mtime_ns}"
        payload = {
            "source": relative,
            "size": fact.size,
            "mtime_ns": fact.mtime_ns,
            "stem": session.stem_for(relative),
            "params": parameters,
        }
        requests.append(JobRequest(job_key(kind, content, parameters), kind, session.id, relative, payload))
    return requests


def wanted_kinds(session: Session, relative: str, fact: Fact, rules: PictureRules) -> dict[str, dict[str, Any]]:
    """What a picture wants now: kind → parameters."""
    if _same(session, "refused", relative, fact) is not None:
        return {}
    wanted = {kind: wanted_parameters(session, kind, relative, fact, rules) for kind in PICTURE_KINDS}
    return {kind: parameters for kind, parameters in wanted.items() if parameters is not None}


def wanted_parameters(
    session: Session, kind: str, relative: str, fact: Fact, rules: PictureRules
) -> dict[str, Any] | None:
    """The parameters of the output of a kind that a picture wants now; None where the one on record stands."""
    record = _same(session, kind, relative, fact)
    own = rules.parameters(kind)
    if kind == "crop":
        caption, unmet = (_same(session, other, relative, fact) for other in ("caption", UNMET))
        return crop_parameters(own, relative, session.crop_rules, record, caption, unmet=unmet, network=rules.network)
    return None if record is not None and record.get("params") == own else own


def _same(session: Session, kind: str, relative: str, fact: Fact) -> Record | None:
    """The record of a kind that was made from a picture as it is now."""
    record = session.manifest.get(kind, relative)
    return record if record is not None and same_content(record, fact) else None


def needs_stamp(session: Session, relative: str, fact: Fact) -> Record | None:
    """A record of the same size and another time: the content may be the same, only touched or copied. Worth a hash."""
    for kind in PICTURE_KINDS:
        record = session.manifest.get(kind, relative)
        if (
            record
            and record.get("size") == fact.size
            and record.get("mtime_ns") != fact.mtime_ns
            and "sha256" in record
            and not record.get("stale")
        ):
            return record
    return None


@dataclass(frozen=True)
class SpecRecord:
    """A train.yaml as a run remembers it.

    Attributes:
        path: its name in the session.
        sha256: of its bytes.
        mtime_ns: its time of change.
    """

    path: str
    sha256: str
    mtime_ns: int

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> SpecRecord:
        """Read what ``to_json`` wrote."""
        return cls(str(value.get("path", "")), str(value.get("sha256", "")), int(value.get("mtime_ns", 0)))

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {"path": self.path, "sha256": self.sha256, "mtime_ns": self.mtime_ns}

    def matches(self, other: SpecRecord) -> bool:
        """Whether the other is this very saving of the file. Whole seconds: some mounts keep no more."""
        return self.sha256 == other.sha256 and self.mtime_ns // 10**9 == other.mtime_ns // 10**9

    def run_id(self, session: str) -> str:
        """The id of the run that this saving asks for: its date and four hex digits; the same after any restart."""
        seconds = self.mtime_ns // 10**9
        return run_name(seconds, hashlib.sha256(f"{session}:{self.sha256}:{seconds}".encode()).hexdigest())


def run_name(seconds: int, digest: str) -> str:
    """The id of what was asked for at a time (seconds since the epoch): its date and four hex digits."""
    # Any number can stand as a file's time; a calendar has an end.
    date = datetime.fromtimestamp(min(max(seconds, 0), _LAST_SECOND), UTC).strftime("%y%m%d")
    return f"{date}-{digest[:4]}"


@dataclass(frozen=True)
class RecordedRun:
    """A run as its run.json and the manifest tell of it.

    Attributes:
        id: its id.
        spec: the train.yaml that asked for it.
        ended: "" while it is not over; else ``finished``, ``failed``, ``refused``, ``cancelled``, or ``elsewhere`` (it
            belongs to the session that this one was copied from).
    """

    id: str
    spec: SpecRecord
    ended: str = ""


def run_for(spec: SpecRecord, session: str, recorded: Sequence[RecordedRun]) -> str | None:
    """The run that a train.yaml wants to go on or to begin; None when its run is over.

    A saving whose content or time of change no run records asks for a new run; so adding pictures alone starts
    nothing, and saving the file again does.
    """
    for run in recorded:
        if run.spec.matches(spec):
            return None if run.ended else run.id
    return spec.run_id(session)


def train_request(session: Session, run: str, spec: SpecRecord) -> JobRequest:
    """The job that begins a run, or goes on with it."""
    payload = {"run": run, "spec_record": spec.to_json()}
    return JobRequest(job_key("train", f"{session.id}/{run}", {}), "train", session.id, f"run {run}", payload)


def convert_requests(session: Session) -> list[JobRequest]:
    """A conversion for each finished run that has no file yet."""
    return [
        JobRequest(
            job_key("convert", f"{session.id}/{record['run']}", {}),
            "convert",
            session.id,
            f"model of run {record['run']}",
            {key: record[key] for key in ("run", "finished", "metadata", "preview") if record.get(key)},
        )
        for record in session.manifest.of_kind("train")
        if record.get("state") == "finished" and session.manifest.get("convert", record["run"]) is None
    ]


ABOUT_LORAS = ("model_kind", "family", "trigger")
"""What publishing a LoRA needs to know of its conversion; a checkpoint has no ``model_kind``."""


def publish_requests(session: Session) -> list[JobRequest]:
    """A publication for each converted model that is meant for the WebUI and is not there yet."""
    chosen = promoted(session.manifest)
    # One that was promoted is published as such, whatever became of an earlier attempt.
    asked = {chosen["run"]: {"promotion": chosen["promotion"]}} if chosen else {}
    return [
        JobRequest(
            job_key("publish", f"{session.id}/{record['run']}", asked.get(record["run"], {})),
            "publish",
            session.id,
            record["outputs"][0],
            {
                "run": record["run"],
                "model": record["outputs"][0],
                "name": session.name,
                "sha256": record.get("sha256"),
                **{key: record[key] for key in ABOUT_LORAS if record.get("model_kind") and key in record},
            },
        )
        for record in session.manifest.of_kind("convert")
        if record.get("publish", True)
        and session.manifest.get("publish", record["run"]) is None
        and not is_superseded(session.manifest, record["run"])
    ]


def sessions_touched(paths: Iterable[str], shape: Shape) -> set[str]:
    """The session folders in which any of the paths lies."""
    folders = {path.rpartition("/")[0] for path in paths}
    sessions = (session_folder_of(f"{folder}/-" if folder else "-", shape) for folder in folders)
    return {session for session in sessions if session is not None}


def fingerprint(value: Any) -> str:
    """A short hash of JSON values, for keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
