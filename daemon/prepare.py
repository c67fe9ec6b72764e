"""Handing a job out: what the queue keeps in the session's terms becomes a payload of absolute paths.

Also the last look before work begins: a picture that changed since the job was queued has a newer job on its way, and
one whose session is gone has nobody waiting for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daemon.config import Settings
from daemon.index import Fact, Index
from daemon.intermediates import output_of
from daemon.material import base_name, caption_of, text_beside, training_pictures
from daemon.outcomes import record_kind
from daemon.pipelines import pipeline_at
from daemon.promotion import is_superseded
from daemon.routing import ABOUT_LORAS, PictureRules, SpecRecord, wanted_parameters
from daemon.runs import former_run, read_json, read_spec_record
from daemon.searching import Searching
from daemon.session import Session, Sessions
from daemon.sheet import crops_of, sheet_of, sheet_payload
from daemon.translating import captioned, translate_payload
from handlers.context import Waiting
from handlers.models.segments import SegmentNetwork
from sessions import layout
from sessions.manifest import Record, outputs_present
from sessions.spec import parse_spec

_CONVERTED = ("run", "sha256", "bytes", "family", "prediction", "verified", "seconds")


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
        rules: parameters of the pictures' outputs.
        network: () → the salient-object network that is here.
        searching: the index of the search, where it is switched on.
        crew: the devices that share a training; none where each GPU works for itself.
    """

    root: Path
    settings: Settings
    sessions: Sessions
    index: Index
    rules: PictureRules
    network: Callable[[], SegmentNetwork | None] = lambda: None
    searching: Searching | None = None
    crew: Sequence[str] = ()

    def payload(self, kind: str, session_id: str, stored: Mapping[str, Any]) -> dict[str, Any]:
        """The payload of a job, as docs/architecture.md lists it.

        Raises:
            Gone: the job has nothing to do any more.
            Waiting: the tree is out of reach, or the file cannot be looked at now.
        """
        try:
            session = self.sessions.by_id(session_id)
        except (LookupError, OSError) as error:
            self._require_tree()
            raise Gone(str(error)) from error
        match kind:
            case "crop":
                return self._crop(session, stored)
            case "caption":
                return self._caption(session, stored)
            case "train":
                return self._train(session, stored)
            case "sheet":
                return self._sheet(session, stored)
            case "embed":
                return self._embed(session, stored)
            case "translate":
                return self._translate(session, stored)
            case "convert":
                return self._convert(session, stored)
            case _:
                return self._publish(session, stored)

    @property
    def models(self) -> str | None:
        """The tree's Models folder, if there is one."""
        folder = self.root / layout.MODELS
        return os.fspath(folder) if folder.is_dir() else None

    def _require_tree(self) -> None:
        """An unmounted tree is an empty folder or an error: then nothing is gone, only out of reach."""
        try:
            with os.scandir(self.root) as entries:
                if next(entries, None) is not None:
                    return
            reason = f"{self.root} is empty. Is it mounted?"
        except OSError as error:
            reason = f"{self.root} cannot be reached: {error.strerror}. Is it mounted?"
        raise Waiting(reason)

    def _require_wanted(self, session: Session, kind: str, stored: Mapping[str, Any]) -> None:
        """A job may have nothing to do by now.

        A kill between the record of a result and the end of its job leaves one that is done; and a crop that a caption
        or a person asks for in another way has a newer job on its way.
        """
        source = stored["source"]
        fact = Fact(session.tree_path(source), stored["size"], stored["mtime_ns"], 0)
        wanted = wanted_parameters(session, kind, source, fact, self.rules)
        if wanted == stored["params"]:
            return
        if wanted is not None:
            message = f"{source} is wanted in another way by now"
            raise Gone(message)
        record = session.manifest.get(kind, source) or {}
        if record.get("params") != stored["params"] or outputs_present(session.folder, record):
            message = f"{source} is done"
            raise Gone(message)

    def _source(self, session: Session, stored: Mapping[str, Any]) -> Path:
        source: Path = session.folder / stored["source"]
        try:
            found = source.lstat()
        except (FileNotFoundError, NotADirectoryError) as error:
            self._require_tree()
            raise Gone(str(error)) from error
        except OSError as error:
            raise Waiting(f"{source} cannot be looked at: {error.strerror}.") from error
        if (found.st_size, found.st_mtime_ns) != (stored["size"], stored["mtime_ns"]):
            message = f"{source} has changed since"
            raise Gone(message)
        refusal = session.manifest.get("refused", stored["source"])
        if refusal is not None and (refusal.get("size"), refusal.get("mtime_ns")) == (found.st_size, found.st_mtime_ns):
            message = f"{source} was refused"
            raise Gone(message)
        return source

    def _crop(self, session: Session, stored: Mapping[str, Any]) -> dict[str, Any]:
        source = self._source(session, stored)
        self._require_wanted(session, "crop", stored)
        network = self.network() if stored["params"].get("mode") == "smart" else None
        segment = (
            {"segment": os.fspath(network.path), "segment_memory": self.settings.limits.segment_memory}
            if network
            else {}
        )
        return {
            "source": os.fspath(source),
            "output": os.fspath(session.folder / layout.CROPS / f"{stored['stem']}.jpg"),
            **stored["params"],
            "pixel_limit": self.settings.limits.picture_pixels,
            **segment,
        }

    def _caption(self, session: Session, stored: Mapping[str, Any]) -> dict[str, Any]:
        source = self._source(session, stored)
        self._require_wanted(session, "caption", stored)
        stem = stored["stem"]
        record = session.manifest.get("caption", stored["source"]) or {}
        captions = session.folder / layout.CAPTIONS
        # A person's words beside the picture win: then no second text is written that would say otherwise.
        has_text = text_beside(session, stored["source"]) is not None
        return {
            "source": os.fspath(source),
            "text": None if has_text else os.fspath(captions / f"{stem}.txt"),
            "sidecar": os.fspath(captions / f"{stem}.json"),
            "preview": os.fspath(session.folder / layout.PREVIEWS / f"{stem}.jpg"),
            "written": record.get("text_sha256"),
            **stored["params"],
            "precision": self.settings.caption.precision,
            "check": self.settings.caption.check,
            "models": self.models,
            "pixel_limit": self.settings.limits.picture_pixels,
        }

    def _sheet(self, session: Session, stored: Mapping[str, Any]) -> dict[str, Any]:
        found = sheet_of(crops_of(session, lambda relative: self.index.lookup(session.tree_path(relative))))
        if not found.records or stored["params"] != {"digest": found.digest}:
            message = "the sheet would show what has changed since"
            raise Gone(message)
        return sheet_payload(session, found, self.settings.limits.picture_pixels)

    def _embed(self, session: Session, stored: Mapping[str, Any]) -> dict[str, Any]:
        if self.searching is None or stored["params"].get("search") != self.searching.model:
            message = "the search is switched off, or asks another model"
            raise Gone(message)
        crops = crops_of(session, lambda relative: self.index.lookup(session.tree_path(relative)))
        payload = self.searching.payload(session, crops, self.root)
        if payload["digest"] != stored["params"]["digest"]:
            message = "the pictures have changed since"
            raise Gone(message)
        return {**payload, "models": self.models, "pixel_limit": self.settings.limits.picture_pixels}

    def _translate(self, session: Session, stored: Mapping[str, Any]) -> dict[str, Any]:
        def line_of(record: Record) -> tuple[str, str] | None:
            chosen = caption_of(session, str(record["source"]), str(record["stem"]))
            if chosen is None:
                return None
            return chosen.line, "fastsd" if chosen.origin == "generated" else "person"

        records = captioned(session, lambda relative: self.index.lookup(session.tree_path(relative)))
        return translate_payload(session, records, stored, line_of, self.models)

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
            **({"wandb": self.settings.wandb} if self.settings.wandb else {}),
            "devices": list(self.crew),
        }
        ended = session.manifest.get("train", stored["run"]) or {}
        if ended.get("state") == "finished":
            message = f"run {stored['run']} is finished"
            raise Gone(message)
        # A run that has begun goes by its own run.json, whatever became of the train.yaml (promise 1).
        begun = read_json(session.folder / layout.RUNS / stored["run"] / "run.json")
        if begun is not None:
            base = str((begun.get("base") or {}).get("name") or self.settings.base)
            return {**common, "name": begun.get("name"), "spec": begun.get("spec"), "base": base, "pictures": []}
        try:
            now, content = read_spec_record(session, spec_record.path)
        except OSError as error:
            self._require_tree()
            raise Gone(str(error)) from error
        if not spec_record.matches(now):
            message = f"{spec_record.path} was saved anew, which asks for another run"
            raise Gone(message)
        spec = parse_spec(content.decode("utf-8", errors="replace"))
        return {
            **common,
            "name": spec.name or session.name,
            "spec": spec.to_json(),
            "base": base_name(spec, self.settings),
            "continued": former_run(session, spec.continue_) if spec.continue_ else None,
            "pictures": training_pictures(session, self.index),
        }

    def _convert_pipeline(self, session: Session, stored: Mapping[str, Any]) -> dict[str, Any]:
        """A Diffusers folder of another trainer, unchanged since it was looked at."""
        index = self._source(session, stored)
        found = pipeline_at(session, self.index, stored["source"])
        if found is None or stored["params"] != {"digest": found.digest} or not all(map(self._stands, found.files)):
            message = f"{index.parent} has changed since"
            raise Gone(message)
        done = session.manifest.get("convert", stored["source"]) or {}
        if done.get("params") == stored["params"]:
            message = f"{index.parent} has its model"
            raise Gone(message)
        payload = self._conversion(session, stored, index.parent)
        if done.get("outputs") and outputs_present(session.folder, done):
            # Touched or copied, it may be what it was: then nothing is made anew.
            outputs = [os.fspath(session.folder / output) for output in done["outputs"]]
            payload["known"] = {"outputs": outputs, "facts": {key: done.get(key) for key in _CONVERTED}}
        return payload

    def _stands(self, fact: Fact) -> bool:
        """Whether a file is as the index knows it."""
        try:
            found = (self.root / fact.path).lstat()
        except OSError:
            return False
        return (found.st_size, found.st_mtime_ns) == (fact.size, fact.mtime_ns)

    def _convert(self, session: Session, stored: Mapping[str, Any]) -> dict[str, Any]:
        if "source" in stored:
            return self._convert_pipeline(session, stored)
        if session.manifest.get(record_kind("convert", stored), stored["run"]) is not None:
            message = f"run {stored['run']} has its model"
            raise Gone(message)
        source = session.folder / stored["finished"]
        if "of" not in stored:
            return self._conversion(session, stored, source)
        if not source.is_dir():
            message = f"{source} is gone"
            raise Gone(message)
        output = os.fspath(output_of(session, stored))
        return {**self._conversion(session, stored, source), "output": output, "beside": os.fspath(session.folder)}

    def _conversion(self, session: Session, stored: Mapping[str, Any], source: Path) -> dict[str, Any]:
        metadata, preview = stored.get("metadata", {}), stored.get("preview")
        name = layout.model_stem(metadata.get("title") or session.name, stored["run"])
        return {
            "source": os.fspath(source),
            "output": os.fspath(session.folder / f"{name}.safetensors"),
            "dtype": None,
            "metadata": metadata,
            "run": stored["run"],
            "verify": "forward",
            "models": self.models,
            "preview": os.fspath(session.folder / preview) if preview else None,
        }

    def _publish(self, session: Session, stored: Mapping[str, Any]) -> dict[str, Any]:
        model = session.folder / stored["model"]
        if session.manifest.get("publish", stored["run"]) is not None:
            message = f"{model} is published"
            raise Gone(message)
        if is_superseded(session.manifest, stored["run"]):
            message = f"another model was promoted in place of {model}"
            raise Gone(message)
        if not model.exists():
            message = f"{model} is gone"
            raise Gone(message)
        webui = self.settings.webui.model_dump(mode="json")
        made = session.manifest.get("convert", stored["run"]) or {}
        folder = session.folder / layout.RUNS / str(made.get("of") or stored["run"])
        proof = folder / (f"proof-step-{made['step']}.png" if "of" in made else "proof.png")
        return {
            "model": os.fspath(model),
            "name": stored["name"],
            "run": stored["run"],
            "sha256": stored.get("sha256"),
            "webui": webui,
            "proof_picture": os.fspath(proof),
            **{key: stored[key] for key in ABOUT_LORAS if key in stored},
        }
