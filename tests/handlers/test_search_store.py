"""The index of embeddings: what it says of a tree after anything, kills included."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handlers.search import store as stores
from handlers.search.find import Matrix, nearest, pairs, to_bytes
from handlers.search.store import Picture, Store, Twins, digest_of, digests, twins_of

WIDTH = 8


def vector(sha256: str) -> bytes:
    """The vector of a content: another one for each."""
    digest = hashlib.sha256(sha256.encode()).digest()
    return to_bytes(np.frombuffer(digest[:WIDTH], np.uint8).astype(np.float32))


def picture(path: str, content: str) -> Picture:
    return Picture(path, len(content), 7, content)


def tree_of(store: Store) -> dict[str, bytes]:
    """Every picture that can be found, with its vector as it lies on the disk."""
    file, rows = store.rows()
    content = file.read_bytes()
    return {path: content[row * 2 * WIDTH : (row + 1) * 2 * WIDTH] for path, row in rows}


@contextmanager
def opened(folder: Path, model: str = "m", width: int = WIDTH) -> Iterator[Store]:
    with closing(Store(folder, model, width)) as store:
        yield store


CONTENTS = st.sampled_from([f"content {number}" for number in range(6)])
SCOPE = st.dictionaries(st.sampled_from(["a.png", "b.png", "ü/c.png", "d\udcff.png"]), CONTENTS, max_size=4)
STEPS = st.lists(st.tuples(st.sampled_from(["Sessions/x", "Sessions/y", "*"]), SCOPE, st.booleans()), max_size=12)


@settings(max_examples=40)
@given(steps=STEPS)
def test_it_holds_what_was_said_last_whatever_came_before(steps: list[tuple[str, dict[str, str], bool]]) -> None:
    truth: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(stores, "_WASTE", 2)  # so that files of vectors are made anew now and then
        patch.setattr(os, "fsync", lambda _descriptor: None)
        store = Store(Path(name), "m", WIDTH)
        for scope, held, again in steps:
            found = {f"{scope}/{path}": content for path, content in held.items()}
            missing = store.missing(found.values())
            assert set(missing) == set(found.values()) - store_contents(store)
            store.add({content: vector(content) for content in missing})
            rows = [picture(path, content) for path, content in found.items()]
            if scope == "*":
                store.replace_all(rows)
                truth = found
            else:
                store.replace_scope(scope, rows, str(sorted(found.items())))
                truth = {path: sha for path, sha in truth.items() if not path.startswith(f"{scope}/")} | found
                assert digest_of(Path(name), scope) == str(sorted(found.items()))
            if again:
                store.close()
                store = Store(Path(name), "m", WIDTH)
            assert tree_of(store) == {path: vector(content) for path, content in truth.items()}
            assert {path: found.sha256 for path, found in store.known().items()} == truth
            assert len(list(Path(name).glob("vectors-*"))) == 1
        store.close()


def store_contents(store: Store) -> set[str]:
    return {row[0] for row in store._connection.execute("SELECT sha256 FROM content")}


def test_a_moved_picture_is_not_looked_at_again_and_one_that_is_none_is_not_either(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.add({"one": vector("one"), "text": None})
        store.replace_scope("a", [picture("a/1.png", "one"), picture("a/2.png", "text")], "d")
        store.replace_scope("a", [], "e")
        store.replace_scope("b", [picture("b/1.png", "one"), picture("b/copy.png", "one")], "f")
        assert store.missing(["one", "text", "two"]) == ["two"]
        assert tree_of(store) == {"b/1.png": vector("one"), "b/copy.png": vector("one")}
        assert digests(tmp_path) == {"a": "e", "b": "f"}


def test_a_look_at_the_whole_tree_takes_the_word_of_those_parts_that_changed(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        for scope in "abc":
            store.replace_scope(scope, [picture(f"{scope}/1.png", scope)], "d")
        same, other = picture("a/1.png", "a"), picture("b/1.png", "changed")
        store.replace_all([same, other])
        assert digests(tmp_path) == {"a": "d"}
        assert set(store.known()) == {"a/1.png", "b/1.png"}


def test_another_model_begins_anew_and_so_does_an_index_that_lost_its_vectors(tmp_path: Path) -> None:
    for loss in (None, "vectors"):
        with opened(tmp_path) as store:
            store.add({"one": vector("one")})
            store.replace_scope("a", [picture("a/1.png", "one")], "d", [Twins("a/1.png", "a/2.png", 0.99)])
        assert twins_of(tmp_path, "a") == [Twins("a/1.png", "a/2.png", 0.99)]
        if loss:
            next(tmp_path.glob("vectors-*")).unlink()
        with opened(tmp_path, "m" if loss else "another") as store:
            assert store.missing(["one"]) == ["one"]
            assert tree_of(store) == {}
        assert digests(tmp_path) == {}


def test_who_only_looks_makes_nothing_and_survives_what_is_no_index(tmp_path: Path) -> None:
    assert digests(tmp_path / "none") == {}
    assert not (tmp_path / "none").exists()
    (tmp_path / "search.sqlite").write_bytes(b"no database at all" * 100)
    assert digest_of(tmp_path, "a") is None
    assert twins_of(tmp_path, "a") == []


def test_a_vector_of_another_width_is_refused_whole(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        with pytest.raises(ValueError, match="8 numbers"):
            store.add({"one": vector("one"), "two": b"12"})
        assert store.missing(["one", "two"]) == ["one", "two"]


WRITER = """
import sys
from pathlib import Path
from handlers.search import store as stores
from tests.handlers.test_search_store import WIDTH, picture, vector
stores._WASTE = 3
store = stores.Store(Path(sys.argv[1]), "m", WIDTH)
print("open", flush=True)
number = int(sys.argv[2])
while True:
    number += 1
    new = [f"content {number} {part}" for part in range(4)]
    store.add({content: vector(content) for content in new})
    store.replace_scope("a", [picture(f"a/{part}.png", content) for part, content in enumerate(new)], str(number))
    print(number, flush=True)
"""


def test_kill_9_at_any_time_leaves_an_index_that_says_the_truth(tmp_path: Path) -> None:
    number = 0
    for rounds in range(6):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(number)], stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "open\n"
            told = [int(writer.stdout.readline()) for _ in range(3 + 2 * rounds)][-1]
            writer.send_signal(signal.SIGKILL)
        with opened(tmp_path) as store:
            digest = digest_of(tmp_path, "a")
            assert digest is not None
            number = int(digest)
            assert number >= told, "what was told of is kept"
            held = {f"a/{part}.png": f"content {number} {part}" for part in range(4)}
            assert {path: found.sha256 for path, found in store.known().items()} == held
            assert tree_of(store) == {path: vector(content) for path, content in held.items()}
            assert len(list(tmp_path.glob("vectors-*"))) == 1


def test_two_writers_take_turns(tmp_path: Path) -> None:
    with opened(tmp_path):
        pass
    counts = [1000, 5000]
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(count)], stdout=subprocess.PIPE, text=True)
        for count in counts
    ]
    try:
        for writer in writers:
            assert writer.stdout is not None
            assert [writer.stdout.readline() for _ in range(6)][:1] == ["open\n"]
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    with opened(tmp_path) as store:
        number = int(digest_of(tmp_path, "a") or "")
        found = tree_of(store)
        assert found == {f"a/{part}.png": vector(f"content {number} {part}") for part in range(4)}


def test_a_full_disk_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path) as store:
        store.add({"one": vector("one")})
        store.replace_scope("a", [picture("a/1.png", "one")], "d")

        def full(_descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            store.add({"two": vector("two")})
        monkeypatch.undo()
        assert store.missing(["one", "two"]) == ["two"]
        store.add({"two": vector("two")})
        store.replace_scope("a", [picture("a/1.png", "one"), picture("a/2.png", "two")], "e")
        assert tree_of(store) == {"a/1.png": vector("one"), "a/2.png": vector("two")}


@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(0, 40), count=st.integers(1, 50))
def test_the_nearest_are_those_that_a_plain_product_calls_the_nearest(seed: int, rows: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(rows, WIDTH)).astype(np.float16)
    query = rng.normal(size=WIDTH).astype(np.float32)
    chosen = [int(row) for row in rng.permutation(rows)[: rows // 2 + 1]]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "v.f16")
        file.write_bytes(vectors.astype("<f2").tobytes())
        scores = Matrix(file, WIDTH).cosines(query, chosen)
        expected = vectors.astype(np.float64)[chosen] @ query.astype(np.float64)
        np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4)
        best = nearest(scores, count)
        assert len(best) == min(count, len(chosen))
        assert [scores[place] for place in best] == sorted(scores, reverse=True)[:count]


def test_pairs_are_told_once_each() -> None:
    near = np.array([[1, 0], [0, 1], [1, 0.1], [0.1, 1]], np.float32)
    near /= np.linalg.norm(near, axis=1, keepdims=True)
    assert [(one, other) for one, other, _ in pairs(near, 0.97)] == [(0, 2), (1, 3)]
