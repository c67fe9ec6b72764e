"""Diffusers folders that another trainer left in a session: which there are, whether they are whole, what they want.

A folder is known by its ``model_index.json``; its refusal is told beside that file. What was made of it is recorded
with a digest of its files, so that it is wanted once, and again when the trainer wrote anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from daemon.index import Fact, Index
from daemon.jobs import JobRequest, job_key
from daemon.refusals import refuse, remove_refusal
from daemon.routing import run_name
from daemon.session import Session
from handlers.models.folders import read_folder, read_parts
from sessions import layout
from sessions.refusal import Refusal

JOB = "convert"
_SUFFIXES = (".json", ".safetensors", ".bin", ".model", ".txt")


@dataclass(frozen=True)
class Pipeline:
    """A Diffusers folder in a session.

    Attributes:
        index: the fact of its model_index.json.
        source: the path of that file in the session.
        files: the settled facts of all files that make the model, the index among them.
    """

    index: Fact
    source: str
    files: tuple[Fact, ...]

    @property
    def folder(self) -> str:
        """Its path in the session; "" for the session's own folder."""
        return self.source.rpartition("/")[0]

    @property
    def digest(self) -> str:
        """What stands for its content: names, sizes and times, in the whole seconds that every mount keeps."""
        start = len(self.index.path) - len(layout.PIPELINE_INDEX)
        rows = sorted((fact.path[start:], fact.size, fact.mtime_ns // 10**9) for fact in self.files)
        text = "\n".join(f"{name}\0{size}\0{seconds}" for name, size, seconds in rows)
        return hashlib.sha256(text.encode("utf-8", errors="surrogateescape")).hexdigest()[:16]

    @property
    def written_at(self) -> int:
        """When the newest of its files was written, in nanoseconds since the epoch."""
        return max(fact.mtime_ns for fact in self.files)


def pipelines_in(session: Session, index: Index, shape: layout.Shape) -> Iterator[Pipeline]:
    """The Diffusers folders of a session, as far as they have settled."""
    for folder in index.folders(session.path):
        path = f"{folder}/{layout.PIPELINE_INDEX}" if folder else layout.PIPELINE_INDEX
        place = layout.place_of(path, shape)
        if place is None or place.session != session.path or place.role is not layout.Role.PIPELINE:
            continue
        if (found := pipeline_at(session, index, place.relative)) is not None:
            yield found


def pipeline_at(session: Session, index: Index, source: str) -> Pipeline | None:
    """The Diffusers folder with this model_index.json (a path in the session); None where that has not settled."""
    fact = index.lookup(session.tree_path(source))
    if fact is None:
        return None
    folder = fact.path.rpartition("/")[0]
    files = [fact]
    for part in read_parts((session.root / fact.path).parent):
        known = index.known(f"{folder}/{part}" if folder else part)
        files += [found for name, found in known.items() if name.lower().endswith(_SUFFIXES)]
    return Pipeline(fact, source, tuple(files))


def plan_pipelines(
    session: Session, index: Index, shape: layout.Shape, *, quiet: float, rest: float, needed: float
) -> tuple[list[JobRequest], list[str], float | None]:
    """What the Diffusers folders of a session want; what is wrong with one is told beside it.

    Args:
        session: the session.
        index: the settled facts.
        shape: of the tree.
        quiet: seconds since something moved in the session.
        rest: seconds of quiet after which a whole folder is taken.
        needed: seconds of quiet after which one that is not whole is refused.

    Returns:
        Jobs, reasons why something waits, and seconds after which it is worth looking again, or None.

    Raises:
        OSError: the session's folder cannot be written.
    """
    requests: list[JobRequest] = []
    waits: list[str] = []
    sleeps: list[float] = []
    for pipeline in pipelines_in(session, index, shape):
        request = convert_request(session, pipeline)
        if _is_settled(session, pipeline):
            continue
        if quiet < rest:
            sleeps.append(rest - quiet)
            continue
        problems = read_folder(session.folder / pipeline.folder).problems
        if not problems:
            remove_refusal(session, pipeline.source, JOB)
            requests.append(request)
        elif quiet < needed:
            waits.append(f"The model in {pipeline.folder or session.name} is not whole yet: {problems[0]}")
            sleeps.append(needed - quiet)
        else:
            refusal = Refusal("incomplete", " ".join(problems[:3]), "Copy the whole Diffusers folder here.")
            refuse(session, pipeline.source, refusal, job=JOB, params=request.payload["params"])
    return requests, waits, max(0.5, min(sleeps)) if sleeps else None


def _is_settled(session: Session, pipeline: Pipeline) -> bool:
    """Whether the model as it is now was converted, or refused."""
    parameters = {"digest": pipeline.digest}
    done = session.manifest.get(JOB, pipeline.source)
    if done is not None and done.get("params") == parameters:
        remove_refusal(session, pipeline.source, JOB)
        return True
    refused = session.manifest.get("refused", pipeline.source)
    return refused is not None and refused.get("params") == parameters


def convert_request(session: Session, pipeline: Pipeline) -> JobRequest:
    """The conversion of a folder as it is now."""
    parameters = {"digest": pipeline.digest}
    seconds = pipeline.written_at // 10**9
    mark = hashlib.sha256(f"{session.id}:{pipeline.source}:{pipeline.digest}".encode(errors="surrogateescape"))
    payload = {
        "source": pipeline.source,
        "size": pipeline.index.size,
        "mtime_ns": pipeline.index.mtime_ns,
        "run": run_name(seconds, mark.hexdigest()),
        "params": parameters,
        "metadata": {"title": title_of(session, pipeline.folder), "date": _date(seconds)},
    }
    key = job_key(JOB, f"{session.id}/{pipeline.source}", parameters)
    return JobRequest(key, JOB, session.id, pipeline.source, payload)


def title_of(session: Session, folder: str) -> str:
    """What the model is called: by its session, and its folder in it."""
    return "-".join(name for name in (session.name, folder.rpartition("/")[2]) if name)


def _date(seconds: int) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")
    except (OverflowError, OSError, ValueError):
        return "1970-01-01"
