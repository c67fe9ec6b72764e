"""What jobs leave in the tree, and the promise as a whole: whatever people do and is lost, it ends the same."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from daemon import outcomes
from handlers.outcome import Outcome
from sessions.layout import place_of
from sessions.manifest import Manifest, outputs_present, subject_of
from sessions.refusal import Refusal
from tests.daemon.house import TODAY, House, without_syncs

A = "Sessions/a"
FOLDERS = ["Sessions/a", "Sessions/b", "Sessions/a/sub"]
NAMES = ["x.jpg", "X.png", "y.jpg"]
STEMS = ["x", "X", "y", "x~png"]
OUTPUTS = ["crops", "previews", "captions/x.json", "captions/x.txt", ".fastsd/trash"]


class People:
    """What people do, step by step; a step that makes no sense in the tree as it is does nothing.

    Attributes:
        words: captions that a person wrote and nobody but a person may change: path → content.
    """

    def __init__(self, house: House) -> None:
        self.house = house
        self.clock = 1_700_000_000
        self.words: dict[str, bytes] = {}

    def write(self, path: str, content: bytes) -> None:
        if (self.house.root / path).parent.parts[:-1] and not (self.house.root / path).is_dir():
            self.clock += 10
            self.house.write(path, content, mtime=self.clock)

    def drop(self, folder: str, name: str, content: int) -> None:
        # Contents of two sizes: equal sizes with other bytes are the hard case.
        self.write(f"{folder}/{name}", b"%04d" % content if content % 2 else b"%09d" % content)

    def touch(self, folder: str, name: str) -> None:
        file = self.house.root / folder / name
        if file.exists():
            self.clock += 10
            os.utime(file, (self.clock, self.clock))

    def remove(self, folder: str, name: str) -> None:
        (self.house.root / folder / name).unlink(missing_ok=True)

    def rename(self, folder: str, name: str, other: str) -> None:
        old, new = self.house.root / folder / name, self.house.root / folder / other
        if old.exists() and not new.exists():
            new.parent.mkdir(parents=True, exist_ok=True)
            old.rename(new)

    def caption(self, folder: str, stem: str, beside: bool, number: int) -> None:
        path = f"{folder}/{'' if beside else 'captions/'}{stem}.txt"
        content = b"words of a person %d\n" % number
        self.write(path, content)
        self.words[path] = content

    def spec(self, folder: str, there: bool) -> None:
        file = self.house.root / folder / "train.yaml"
        if there:
            self.write(f"{folder}/train.yaml", b"base: miniature\n")
        else:
            file.unlink(missing_ok=True)

    def move_session(self, old: str, new: str) -> None:
        source, target = self.house.root / old, self.house.root / new
        if source.is_dir() and not target.exists():
            source.rename(target)
            for path in [path for path in self.words if path.startswith(f"{old}/")]:
                self.words[new + path.removeprefix(old)] = self.words.pop(path)

    def copy_session(self, old: str, new: str) -> None:
        source, target = self.house.root / old, self.house.root / new
        if source.is_dir() and not target.exists():
            shutil.copytree(source, target)
            for path in [path for path in self.words if path.startswith(f"{old}/")]:
                self.words[new + path.removeprefix(old)] = self.words[path]

    def remove_session(self, folder: str) -> None:
        shutil.rmtree(self.house.root / folder, ignore_errors=True)
        self.words = {path: text for path, text in self.words.items() if not path.startswith(f"{folder}/")}

    def remove_output(self, folder: str, output: str) -> None:
        place = self.house.root / folder / output
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)
            self.words.pop(f"{folder}/{output}", None)


folders, names = st.sampled_from(FOLDERS), st.sampled_from(NAMES)
tops = st.sampled_from(["Sessions/a", "Sessions/b", "Sessions/a (copy)"])
numbers = st.integers(1, 4)
DEEDS = st.one_of(
    st.tuples(st.just("drop"), folders, names, numbers),
    st.tuples(st.just("touch"), folders, names),
    st.tuples(st.just("remove"), folders, names),
    st.tuples(st.just("rename"), folders, names, names),
    st.tuples(st.just("caption"), folders, st.sampled_from(STEMS), st.booleans(), numbers),
    st.tuples(st.just("spec"), folders, st.booleans()),
    st.tuples(st.just("move_session"), tops, tops),
    st.tuples(st.just("copy_session"), tops, tops),
    st.tuples(st.just("remove_session"), tops),
    st.tuples(st.just("remove_output"), folders, st.sampled_from(OUTPUTS)),
)
# What the daemon does after a deed: nothing yet, notice it, do a part of what follows, do all, end and begin again.
AFTERWARDS = st.sampled_from(["nothing", "look", "work", "settle", "", "index", "queue", "index queue"])
STEPS = st.lists(st.tuples(DEEDS, AFTERWARDS), min_size=1, max_size=10)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(STEPS)
def test_whatever_people_do_it_ends_with_one_result_a_picture(steps: list[tuple[tuple[Any, ...], str]]) -> None:
    with tempfile.TemporaryDirectory() as folder, without_syncs():
        house = House(Path(folder), webui={"kind": "none"})
        people = People(house)
        for place in FOLDERS:
            people.drop(place, "x.jpg", 1)
        people.drop(FOLDERS[0], "X.png", 2)
        people.drop(FOLDERS[0], "y.jpg", 3)
        house.settle()
        for (name, *arguments), afterwards in steps:
            getattr(people, name)(*arguments)
            match afterwards:
                case "nothing":
                    pass
                case "look":
                    house.look()
                case "work":
                    house.look()
                    house.work(at_most=3)
                case "settle":
                    house.settle()
                case lost:
                    house.restart(*lost.split())
        house.settle()
        # What somebody removed of ours is noticed at the next start.
        house.restart()
        house.settle()
        check(house, people)
        made = len(house.made)
        house.restart("index", "queue")
        house.look()
        assert house.open_jobs("crop", "caption") == [], "a new machine knows what is done"
        house.settle()
        assert len(house.made) == made
        check(house, people)
        house.close()


def check(house: House, people: People) -> None:
    """Every picture has one record of each kind, its outputs are there, and there are no others."""
    wanted: dict[str, set[str]] = {}
    for path in house.tree_pictures():
        place = place_of(path, house.router.shape)
        assert place is not None
        wanted.setdefault(place.session, set()).add(place.relative)
    identities = []
    for session, pictures in wanted.items():
        folder = house.root / session
        manifest = Manifest.load(folder)
        identities.append(house.session(session).id)
        outputs = []
        for kind in ("crop", "caption"):
            records = manifest.of_kind(kind)
            assert sorted(subject_of(record) for record in records) == sorted(pictures), (session, kind)
            for record in records:
                status = (folder / str(record["source"])).stat()
                assert (record["size"], record["mtime_ns"]) == (status.st_size, status.st_mtime_ns)
                assert outputs_present(folder, record), record
                outputs += record["outputs"]
            if kind == "crop":
                for record in records:
                    crop = (folder / record["outputs"][0]).read_bytes()
                    assert crop == (folder / str(record["source"])).read_bytes(), "the crop of this very content"
        assert max(Counter(outputs).values()) == 1, "no two pictures share an output"
        present = {f"crops/{name}" for name in house.files(f"{session}/crops")}
        assert present == {output for output in outputs if output.startswith("crops/")}
    assert len(set(identities)) == len(identities), "no two sessions share an identity"
    for path, content in people.words.items():
        assert (house.root / path).read_bytes() == content, "a person's words stay"


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path)
    yield made
    made.close()


def test_the_picture_that_changed_while_it_was_worked_on_has_a_job_again(house: House) -> None:
    house.write(f"{A}/x.jpg", b"first")
    house.look()
    job = house.claim("crop")
    assert job is not None
    house.finish(job, lambda: house.write(f"{A}/x.jpg", b"the second"))
    house.settle()
    assert (house.root / A / "crops/x.jpg").read_bytes() == b"the second"


def test_an_outcome_of_a_session_that_is_gone_is_told_all_the_same(house: House) -> None:
    """The WebUI, which gave way to a training, has to hear that it is over."""
    house.write(f"{A}/x.jpg")
    house.look()
    job = house.claim("crop")
    assert job is not None
    shutil.rmtree(house.root / A)
    asyncio.run(house.hooks.on_outcome(job, Outcome("done")))
    assert house.ended == [None]
    assert not (house.root / A).exists()


def test_an_outcome_while_the_tree_is_out_of_reach_is_not_lost(house: House) -> None:
    house.write(f"{A}/x.jpg")
    house.look()
    job = house.claim("crop")
    assert job is not None
    house.root.rename(house.root.with_name("away"))
    house.root.mkdir()
    house.unreachable = "The tree is not mounted."
    with pytest.raises(OSError, match="not mounted"):
        asyncio.run(house.hooks.on_outcome(job, Outcome("done")))
    assert list(house.root.iterdir()) == []


@pytest.mark.parametrize("kind", ["crop", "caption"])
def test_a_picture_that_failed_for_good_is_told_and_left_out(house: House, kind: str) -> None:
    house.write(f"{A}/x.jpg")
    house.settle()
    session = house.session(A)
    record = session.manifest.get(kind, "x.jpg")
    assert record is not None
    outcomes.record_failed(session, kind, record, "the worker died")
    text = (house.root / A / "x.jpg.error.txt").read_text()
    assert "the worker died" in text
    assert "fastsd retry" in text
    stored = {key: record[key] for key in ("source", "size", "mtime_ns", "stem", "params")}
    outcomes.record_done(session, kind, stored, {}, [])
    assert not (house.root / A / "x.jpg.error.txt").exists()
    assert session.manifest.of_kind("refused") == []


def test_one_kinds_success_does_not_take_back_what_another_said(house: House) -> None:
    house.write(f"{A}/x.jpg")
    house.settle()
    session = house.session(A)
    record = session.manifest.get("crop", "x.jpg")
    assert record is not None
    outcomes.record_failed(session, "caption", record, "no memory")
    outcomes.record_done(session, "crop", record, {}, [])
    assert (house.root / A / "x.jpg.error.txt").exists()


@pytest.mark.parametrize("kind", ["convert", "publish"])
def test_a_model_that_cannot_be_made_or_brought_is_told_beside_a_file(house: House, kind: str) -> None:
    house.pictures(A)
    house.write(f"{A}/train.yaml", "base: miniature\n")
    house.write(f"{A}/a-1.safetensors", "model")
    house.settle()
    session = house.session(A)
    train = {"kind": "train", "run": "1", "state": "finished", "finished": "runs/1/model"}
    session.manifest.append([{**train, "spec_record": {"path": "train.yaml", "sha256": "", "mtime_ns": 0}}])
    stored = {"run": "1", "model": "a-1.safetensors"} if kind == "publish" else {"run": "1", "finished": "runs/1/model"}
    outcomes.record_refused(session, kind, stored, Refusal("unequal", "It differs.", "Train again."))
    beside = "a-1.safetensors" if kind == "publish" else "train.yaml"
    assert "It differs." in (house.root / A / f"{beside}.error.txt").read_text()
    assert [record["source"] for record in session.manifest.of_kind("refused")] == [beside]


def test_checkpoints_of_other_runs_stay_when_a_model_is_done(house: House) -> None:
    house.write(f"{A}/x.jpg")
    house.settle()
    for step, run in ((1, "mine"), (2, "other")):
        house.write(f"{A}/checkpoints/step-{step}/state.json", f'{{"run": "{run}"}}')
    house.write(f"{A}/runs/mine/model/unet.bin")
    outcomes.tidy_after_convert(house.session(A), {"run": "mine", "finished": "runs/mine/model"})
    assert house.files(f"{A}/checkpoints") == {"step-2/state.json"}
    assert not (house.root / A / "runs/mine/model").exists()


def test_the_trash_keeps_the_order_of_folders(house: House) -> None:
    house.write(f"{A}/x.jpg")
    house.settle()
    outcomes.forget_picture(house.session(A), "x.jpg", TODAY)
    assert "crops/x.jpg" in house.files(f"{A}/.fastsd/trash/{TODAY.isoformat()}")
    outcomes.forget_picture(house.session(A), "x.jpg", TODAY)
    assert Manifest.load(house.root / A).records == {}
