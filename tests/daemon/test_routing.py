"""From facts to wanted jobs: pure functions of what the tree and the manifest say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.index import Fact
from daemon.routing import (
    PictureRules,
    RecordedRun,
    SpecRecord,
    convert_requests,
    needs_stamp,
    picture_requests,
    publish_requests,
    run_for,
    sessions_touched,
    train_request,
)
from daemon.session import Session
from sessions.layout import Shape
from sessions.manifest import Manifest, Record, subject_of

RULES = PictureRules(captioner="miniature")
FACT = Fact("Sessions/a/x.jpg", 10, 1_700_000_000_000_000_000, 5)


def session_with(*records: Record) -> Session:
    folder = Path("/nowhere/Sessions/a")
    manifest = Manifest(folder, {(record["kind"], subject_of(record)): record for record in records})
    return Session(Path("/nowhere"), "Sessions/a", "abcd", manifest)


def record(kind: str, **changes: Any) -> Record:
    made = {"kind": kind, "source": "x.jpg", "size": 10, "mtime_ns": FACT.mtime_ns, "sha256": "s", "stem": "x"}
    return {**made, "params": RULES.parameters(kind), **changes}


def wanted(*records: Record) -> list[str]:
    return [request.kind for request in picture_requests(session_with(*records), "x.jpg", FACT, RULES)]


def test_a_new_picture_wants_everything() -> None:
    assert wanted() == ["crop", "caption"]


def test_what_is_on_record_is_not_wanted() -> None:
    assert wanted(record("crop"), record("caption")) == []
    assert wanted(record("crop")) == ["caption"]


@pytest.mark.parametrize("changes", [{"size": 11}, {"mtime_ns": 1}, {"stale": True}, {"params": {"mode": "centre"}}])
def test_what_was_made_of_something_else_is_wanted_again(changes: dict[str, Any]) -> None:
    assert wanted(record("crop", **changes), record("caption")) == ["crop"]


def test_another_captioner_captions_anew() -> None:
    assert wanted(record("crop"), record("caption", params={"captioner": "kosmos-2"})) == ["caption"]


def test_a_refusal_holds_until_the_file_changes() -> None:
    assert wanted(record("refused")) == []
    assert wanted(record("refused", mtime_ns=1)) == ["crop", "caption"]


@given(st.integers(0, 2**62), st.integers(-(2**62), 2**62))
def test_the_key_is_the_content(size: int, mtime_ns: int) -> None:
    fact = Fact("Sessions/a/x.jpg", size, mtime_ns, 1)
    keys = [request.key for request in picture_requests(session_with(), "x.jpg", fact, RULES)]
    same = Fact(fact.path, size, mtime_ns, 2)
    assert [request.key for request in picture_requests(session_with(), "x.jpg", same, RULES)] == keys
    for other in (Fact(fact.path, size + 1, mtime_ns, 1), Fact(fact.path, size, mtime_ns + 1, 1)):
        assert not {request.key for request in picture_requests(session_with(), "x.jpg", other, RULES)} & set(keys)


@pytest.mark.parametrize(
    ("changes", "asks"),
    [
        ({}, False),
        ({"mtime_ns": 1}, True),
        ({"mtime_ns": 1, "size": 11}, False),
        ({"mtime_ns": 1, "stale": True}, False),
    ],
)
def test_only_a_file_of_equal_size_and_another_time_is_worth_a_hash(changes: dict[str, Any], asks: bool) -> None:
    assert (needs_stamp(session_with(record("crop", **changes)), "x.jpg", FACT) is not None) == asks


def test_a_record_without_a_hash_cannot_be_compared() -> None:
    plain = record("crop", mtime_ns=1)
    del plain["sha256"]
    assert needs_stamp(session_with(plain), "x.jpg", FACT) is None


SPECS = st.builds(
    SpecRecord,
    st.just("train.yaml"),
    st.sampled_from(["aa", "bb"]),
    st.integers(0, 3 * 10**9).map(lambda ns: ns + 10**18),
)


@given(SPECS, st.lists(st.tuples(SPECS, st.sampled_from(["", "finished", "failed", "cancelled", "elsewhere"]))))
def test_a_saving_asks_for_one_run_until_it_has_ended(spec: SpecRecord, others: list[tuple[SpecRecord, str]]) -> None:
    first: dict[tuple[str, int], RecordedRun] = {}
    for other, ended in others:
        first.setdefault((other.sha256, other.mtime_ns // 10**9), RecordedRun(other.run_id("abcd"), other, ended))
    found = run_for(spec, "abcd", list(first.values()))
    known = first.get((spec.sha256, spec.mtime_ns // 10**9))
    if known is None or not known.ended:
        assert found == spec.run_id("abcd")
    else:
        assert found is None


def test_the_name_of_a_run_is_its_date_and_four_digits() -> None:
    spec = SpecRecord("train.yaml", "aa", 1_760_000_000 * 10**9)
    assert spec.run_id("abcd").startswith("251009-")
    assert len(spec.run_id("abcd")) == 11
    others = [
        SpecRecord("train.yaml", "bb", spec.mtime_ns).run_id("abcd"),
        SpecRecord("train.yaml", "aa", spec.mtime_ns + 10**9).run_id("abcd"),
        spec.run_id("another session"),
    ]
    assert spec.run_id("abcd") not in others
    assert SpecRecord("train.yml", "aa", spec.mtime_ns + 999).run_id("abcd") == spec.run_id("abcd")


def test_a_spec_record_survives_json() -> None:
    spec = SpecRecord("train.yaml", "aa", 12)
    assert SpecRecord.from_json(spec.to_json()) == spec


def test_the_request_of_a_run_is_the_same_when_it_begins_and_when_it_goes_on() -> None:
    spec = SpecRecord("train.yaml", "aa", 12)
    session = session_with()
    assert train_request(session, "r", spec).key == train_request(session, "r", SpecRecord("train.yml", "aa", 13)).key
    assert train_request(session, "r", spec).key != train_request(session, "q", spec).key


def test_a_finished_run_wants_its_file_and_the_file_its_webui() -> None:
    train = {"kind": "train", "run": "r", "state": "finished", "finished": "runs/r/model", "metadata": {"title": "t"}}
    failed = {"kind": "train", "run": "f", "state": "failed"}
    (request,) = convert_requests(session_with(train, failed))
    assert request.payload == {"run": "r", "finished": "runs/r/model", "metadata": {"title": "t"}}
    convert = {"kind": "convert", "run": "r", "outputs": ["a-r.safetensors"], "sha256": "s"}
    assert convert_requests(session_with(train, convert)) == []
    (request,) = publish_requests(session_with(train, convert))
    assert request.payload == {"run": "r", "model": "a-r.safetensors", "name": "a", "sha256": "s"}
    publish = {"kind": "publish", "run": "r"}
    assert publish_requests(session_with(train, convert, publish)) == []


def test_what_is_known_of_a_lora_goes_on_to_its_publication() -> None:
    convert = {"kind": "convert", "run": "r", "outputs": ["a-r.safetensors"], "sha256": "s", "family": "sd1"}
    lora = {**convert, "model_kind": "lora", "trigger": "zwx cat", "base": "sd15"}
    (request,) = publish_requests(session_with(lora))
    about = {"model_kind": "lora", "family": "sd1", "trigger": "zwx cat"}
    assert request.payload == {"run": "r", "model": "a-r.safetensors", "name": "a", "sha256": "s", **about}
    (request,) = publish_requests(session_with(convert))
    assert "family" not in request.payload, "a checkpoint's job stays as it was"


def test_the_sessions_of_many_paths() -> None:
    shape = Shape(has_sessions=True, nested=frozenset({"Sessions/a/sub"}))
    paths = [
        "Sessions/a/x.jpg",
        "Sessions/a/deep/x.jpg",
        "Sessions/a/sub/x.jpg",
        "Models/b.ckpt",
        "top.jpg",
        "Sessions/x",
    ]
    assert sessions_touched(paths, shape) == {"Sessions/a", "Sessions/a/sub"}
    assert sessions_touched(["x.jpg", "deep/x.jpg"], Shape(root_is_session=True)) == {""}
