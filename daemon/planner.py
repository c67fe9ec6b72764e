"""What a session wants beyond its pictures: a run, a model's file, its place in the WebUI; and what it waits for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from daemon.config import Settings
from daemon.index import Fact, Index
from daemon.intermediates import intermediate_requests, tidy_intermediates
from daemon.jobs import JobRequest
from daemon.looks import hints, unmet_wish
from daemon.material import base_name, wants_generated
from daemon.pipelines import plan_pipelines
from daemon.promotion import place, promoted
from daemon.refusals import refuse, remove_refusal
from daemon.routing import (
    PictureRules,
    RecordedRun,
    SpecRecord,
    convert_requests,
    publish_requests,
    run_for,
    same_content,
    train_request,
    wanted_kinds,
)
from daemon.runs import former_run, lacks_model, read_spec_record, recorded_runs
from daemon.searching import Searching
from daemon.session import Session
from daemon.sheet import crops_of, remove_sheet, sheet_request
from daemon.translating import captioned, protected, translate_request, translators_here
from handlers.context import Waiting
from handlers.models import registry
from sessions import layout
from sessions.refusal import Refusal
from sessions.spec import TrainSpec, parse_spec
from sessions.wishes import CODE

FEWEST_PICTURES = 3
# A larger set is looked at as a whole only when all of it is done.
_MANY = 2000
_SHEET_REST = 10.0
"""Seconds without a change after which the contact sheet is drawn."""
_PIPELINE_RESTS = 5.0
"""Settle times without a change after which a whole Diffusers folder is taken: more of it may be on its way."""


@dataclass
class Plan:
    """What a session wants now.

    Attributes:
        requests: jobs to put into the queue.
        waits: reasons why something waits, each a sentence with what helps.
        hints: lines about its pictures that a person may want to look at.
        again_in: seconds after which it is worth planning anew, None when only a change can help.
    """

    requests: list[JobRequest] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)
    again_in: float | None = None

    def look_again(self, seconds: float) -> None:
        """It is worth planning anew after so many seconds, if not earlier."""
        self.again_in = seconds if self.again_in is None else min(self.again_in, seconds)


@dataclass(frozen=True)
class Pictures:
    """The settled pictures of a session, and what they want.

    Attributes:
        facts: path in the session → fact.
        crops: how many want a crop.
        captions: how many want a caption.
        refused: how many are refused as they are.
    """

    facts: Mapping[str, Fact]
    crops: int
    captions: int
    refused: int

    @classmethod
    def of(cls, session: Session, facts: Mapping[str, Fact], rules: PictureRules) -> Pictures:
        """Count what the pictures of a session want."""
        wanted = [wanted_kinds(session, relative, fact, rules) for relative, fact in facts.items()]
        refusals = ((session.manifest.get("refused", relative), fact) for relative, fact in facts.items())
        refused = sum(record is not None and same_content(record, fact) for record, fact in refusals)
        return cls(
            facts, sum("crop" in kinds for kinds in wanted), sum("caption" in kinds for kinds in wanted), refused
        )


@dataclass(frozen=True)
class Planner:
    """Plans sessions.

    Attributes:
        root: the tree.
        index: its settled facts.
        settings: of the tree.
        rules: parameters of its pictures' outputs.
        cache: the folder of downloads, where bases lie.
        quiet_for: (session) → seconds since people last moved something in it.
        quiet_needed: () → seconds of quiet before a run starts by itself.
        caption_gate: () → why captions cannot be made now, or None.
        searching: the index of the search, where it is switched on.
    """

    root: Path
    index: Index
    settings: Settings
    rules: PictureRules
    cache: Path
    quiet_for: Callable[[Session], float]
    quiet_needed: Callable[[], float]
    caption_gate: Callable[[], str | None]
    searching: Searching | None = None

    def plan(self, session: Session, shape: layout.Shape) -> Plan:
        """What a session wants now.

        Raises:
            OSError: the session's folder cannot be read or written.
        """
        plan = Plan()
        pictures = Pictures.of(session, self.pictures(session, shape), self.rules)
        self._tell_of_wishes(session, pictures)
        self._plan_run(session, pictures, plan)
        self._plan_looks(session, pictures, plan)
        self._plan_pipelines(session, shape, plan)
        if not pictures.captions or self.caption_gate():  # once the captions stand
            self._plan_translations(session, pictures, plan)
        tidy_intermediates(session)
        place(session.manifest)
        plan.requests += convert_requests(session) + intermediate_requests(session)
        if self.settings.webui.kind != "none":
            plan.requests += [
                request
                for request in publish_requests(session)
                if _wants_publication(session, str(request.payload["run"]))
            ]
        return plan

    def spec_of(self, session: Session) -> str | None:
        """The name of the train.yaml that lies in a session, settled; None when there is none."""
        names = [name for name in self.index.known(session.path) if layout.is_spec_name(name)]
        return min(names, key=lambda name: layout.SPEC_NAMES.index(name.lower()), default=None)

    def _tell_of_wishes(self, session: Session, pictures: Pictures) -> None:
        """What is wrong with a crop.txt is told beside it, once it has settled."""
        rules = session.crop_rules
        name = rules.wishes_name
        if not name or self.index.lookup(session.tree_path(name)) is None:
            return
        problem = rules.problem or unmet_wish(session, pictures.facts)
        if problem is None:
            remove_refusal(session, name, CODE)
        else:
            refuse(session, name, problem, job=CODE)

    def _plan_looks(self, session: Session, pictures: Pictures, plan: Plan) -> None:
        """What people may want to look at: lines about the set, the contact sheet, and the index of the search."""
        if not pictures.facts:
            remove_sheet(session)
            return
        captions = 0 if self.caption_gate() else pictures.captions
        if len(pictures.facts) > _MANY and (pictures.crops or captions):
            return  # looking at so many takes a while, and all of them will be looked at again
        crops = crops_of(session, pictures.facts.get)
        complete = len(crops) >= len(pictures.facts) - pictures.refused
        twins = self.searching.twins(session) if self.searching else ()
        plan.hints += hints(session, pictures.facts, crops, self._resolution(session), complete=complete, twins=twins)
        if pictures.crops or captions:
            return
        wanted = [sheet_request(session, crops), self.searching.request(session, crops) if self.searching else None]
        requests = [request for request in wanted if request is not None]
        if not requests:
            return
        rest = min(self.quiet_needed(), _SHEET_REST) - self.quiet_for(session)
        if rest > 0:
            plan.look_again(max(0.5, rest))  # while pictures arrive, it would be drawn for each of them
        else:
            plan.requests += requests

    def _plan_pipelines(self, session: Session, shape: layout.Shape, plan: Plan) -> None:
        """Models that another trainer left in the session."""
        quiet, needed = self.quiet_for(session), self.quiet_needed()
        rest = min(needed, _PIPELINE_RESTS * self.settings.watch.settle)
        requests, waits, again_in = plan_pipelines(session, self.index, shape, quiet=quiet, rest=rest, needed=needed)
        plan.requests += requests
        plan.waits += waits
        if again_in is not None:
            plan.look_again(again_in)

    def _plan_translations(self, session: Session, pictures: Pictures, plan: Plan) -> None:
        """Captions in other languages; where a translator is missing they stay English."""
        here, waits, again_in = translators_here(self.settings, self._models(), self.cache)
        plan.waits += waits
        if again_in is not None:
            plan.look_again(again_in)
        words = protected(session, self.settings, self.spec_of(session))
        records = captioned(session, pictures.facts.get)
        request = translate_request(
            session, records, here, words, lambda relative: self.index.lookup(session.tree_path(relative))
        )
        if request is not None:
            plan.requests.append(request)

    def _models(self) -> Path | None:
        """The tree's Models folder, None where there is none."""
        folder = self.root / layout.MODELS
        return folder if folder.is_dir() else None

    def _plan_run(self, session: Session, pictures: Pictures, plan: Plan) -> None:
        runs = recorded_runs(session)
        # A run that has begun goes on, whatever became of the train.yaml that asked for it.
        plan.requests += [train_request(session, run.id, run.spec) for run in runs if not run.ended]
        name = self.spec_of(session)
        if name is None:
            return
        try:
            record, content = read_spec_record(session, name)
        except FileNotFoundError:
            return
        except OSError as error:
            plan.waits.append(f"{name} cannot be read: {error.strerror}. Give fastsd's user the right to read it.")
            return
        _remove_old_refusal(session, name, record)
        run = run_for(record, session.id, runs)
        if run is None or any(run == begun.id and not begun.ended for begun in runs):
            remove_refusal(session, name, "spec")
            return
        try:
            spec = parse_spec(content.decode("utf-8", errors="replace"))
            self._check_base(session, spec, [each for each in runs if each.id != run])
            ready = self._ready(session, pictures, spec, plan)
        except Refusal as refusal:
            refuse(session, name, refusal, job="spec", sha256=record.sha256)
            return
        except Waiting as waiting:
            remove_refusal(session, name, "spec")
            plan.waits.append(waiting.reason)
            plan.look_again(waiting.retry_after)
            return
        remove_refusal(session, name, "spec")
        if ready:
            plan.requests.append(train_request(session, run, record))

    def _check_base(self, session: Session, spec: TrainSpec, others: Sequence[RecordedRun]) -> None:
        if spec.vae != "auto":
            registry.check(spec.vae, "vae", self._models(), self.cache)
        if spec.continue_ is not None:
            unfinished = [run.id for run in others if not run.ended or lacks_model(session, run)]
            if spec.continue_ == "last" and unfinished:
                raise Waiting(f"continue: last waits for the model of run {unfinished[-1]}.", retry_after=60.0)
            former_run(session, spec.continue_)
            return
        registry.check(base_name(spec, self.settings), "checkpoint", self._models(), self.cache)

    def _resolution(self, session: Session) -> int:
        """Pixels of a side at which a session trains, or would."""
        rules = session.crop_rules
        if rules.resolution:
            return rules.resolution
        name = rules.base if rules.base != "auto" else self.settings.base
        return registry.resolution_of(name, self._models(), self.cache)

    def _ready(self, session: Session, pictures: Pictures, spec: TrainSpec, plan: Plan) -> bool:
        closed = self.caption_gate()
        if pictures.crops:
            plan.waits.append(f"Training waits for {_count(pictures.crops, 'picture')} to be cropped.")
            return False
        if pictures.captions and (closed is None or wants_generated(spec)):
            plan.waits.append(closed or f"Training waits for {_count(pictures.captions, 'caption')}.")
            return False
        # Before the pictures are counted: they may still be on their way, and arrive in any order.
        quiet, needed = self.quiet_for(session), self.quiet_needed()
        if spec.start != "now" and quiet < needed:
            plan.look_again(max(0.5, needed - quiet))
            plan.waits.append(
                f"Training starts when nothing has been added for {needed:.0f} s "
                "(`start: now` in train.yaml skips that).",
            )
            return False
        usable = sum(1 for relative in pictures.facts if session.manifest.get("crop", relative) is not None)
        if usable < FEWEST_PICTURES:
            raise Refusal(
                "too-few",
                f"There are {usable} usable pictures in this session, and a run needs {FEWEST_PICTURES}.",
                "Add pictures to the folder; the run then starts by itself.",
            )
        return True

    def pictures(self, session: Session, shape: layout.Shape) -> dict[str, Fact]:
        """The settled pictures of a session: path in the session → fact."""
        found = {}
        for fact in self.index.under(session.path):
            place = layout.place_of(fact.path, shape)
            if place is not None and place.session == session.path and place.role is layout.Role.PICTURE:
                found[place.relative] = fact
        return found


def _remove_old_refusal(session: Session, name: str, record: SpecRecord) -> None:
    """What a run said against an earlier saving of its train.yaml no longer holds."""
    known = session.manifest.get("refused", name) or {}
    if known.get("job") == "train" and not record.matches(SpecRecord.from_json(known)):
        remove_refusal(session, name, "train")


def _wants_publication(session: Session, run: str) -> bool:
    if promoted(session.manifest).get("run") == run:
        return True  # somebody asked for it
    try:
        spec = json.loads((session.folder / layout.RUNS / run / "run.json").read_bytes()).get("spec") or {}
    except (OSError, ValueError):
        return True
    return bool(spec.get("publish", True))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
