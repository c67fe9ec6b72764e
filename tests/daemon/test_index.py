from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.index import Fact, Index, RootIdentity, absent, fact_of

names = st.binary(min_size=1, max_size=20).filter(lambda raw: b"/" not in raw and b"\0" not in raw)
paths = st.lists(names, min_size=1, max_size=4).map(lambda parts: os.fsdecode(b"/".join(parts)))


@pytest.fixture
def index(tmp_path: Path) -> Index:
    return Index(tmp_path / "index.sqlite")


def test_facts_are_found_again_by_path_folder_and_prefix(index: Index) -> None:
    facts = [Fact(path, 1, 2, 3) for path in ("top", "a/x", "a/y", "a/b/z", "a b/w", "a0/v", "a/b/c/u")]
    index.record(facts)
    assert index.lookup("a/x") == Fact("a/x", 1, 2, 3)
    assert index.lookup("a/nothing") is None
    assert set(index.known("a")) == {"x", "y"}
    assert index.known("")["top"] == Fact("top", 1, 2, 3)
    assert {fact.path for fact in index.under("a")} == {"a/x", "a/y", "a/b/z", "a/b/c/u"}
    assert {fact.path for fact in index.under("")} == {fact.path for fact in facts}
    assert list(index.folders("a")) == ["a", "a/b", "a/b/c"]
    assert (index.count(), index.count("a"), index.count("a/b"), index.count("nothing")) == (7, 4, 2, 0)


def test_recording_replaces_and_forgetting_removes(index: Index) -> None:
    index.record([Fact("a", 1, 1, 1)])
    index.record([Fact("a", 2, 2, 2)])
    assert index.lookup("a") == Fact("a", 2, 2, 2)
    index.forget(["a", "never known"])
    assert index.count() == 0


def test_the_index_may_change_while_it_is_walked(index: Index) -> None:
    index.record(Fact(f"{folder}/{name}", 1, 1, 1) for folder in "abc" for name in "xyz")
    seen = []
    for fact in index.under(""):
        seen.append(fact.path)
        index.forget([fact.path])
    assert len(seen) == 9
    assert index.count() == 0


def test_a_failing_record_changes_nothing(index: Index) -> None:
    with pytest.raises(OverflowError):
        index.record([Fact("a", 1, 1, 1), Fact("b", 1 << 70, 1, 1)])
    assert index.count() == 0
    index.record([Fact("a", 1, 1, 1)])
    assert index.count() == 1


@given(st.dictionaries(paths, st.integers(0, (1 << 63) - 1), max_size=12))
def test_any_bytes_are_a_name(facts: dict[str, int]) -> None:
    index = Index(Path(":memory:"))
    index.record(Fact(path, size, -size, size) for path, size in facts.items())
    assert {fact.path: fact.size for fact in index.under("")} == facts
    assert all(index.lookup(path) == Fact(path, size, -size, size) for path, size in facts.items())
    for prefix in {path.split("/")[0] for path in facts}:
        expected = {path for path in facts if path.startswith(prefix + "/")}
        assert {fact.path for fact in index.under(prefix)} == expected
        assert index.count(prefix) == len(expected)
    index.close()


def test_what_a_stat_says_always_fits(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"abc")
    real = file.stat()
    assert fact_of("a", real) == Fact("a", 3, real.st_mtime_ns, real.st_ino)
    assert fact_of("a", real, inode_mask=0).inode == 0
    fields = (0o100644, (1 << 64) - 1, 1, 1, 0, 0, 3, 0, 1 << 40, 0)
    huge = os.stat_result(fields, {"st_mtime_ns": (1 << 40) * 10**9})
    index = Index(tmp_path / "index.sqlite")
    index.record([fact_of("a", huge)])
    assert index.lookup("a") == fact_of("a", huge)
    assert absent("a").exists is False


def test_the_root_is_remembered(tmp_path: Path) -> None:
    path = tmp_path / "index.sqlite"
    index = Index(path)
    assert index.root_identity() is None
    index.record_root(RootIdentity((1 << 64) - 1, 7))
    index.record_root(RootIdentity(5, (1 << 64) - 1))
    index.close()
    assert Index(path).root_identity() == RootIdentity(5, (1 << 64) - 1)


@pytest.mark.parametrize("content", [b"this is no database, but long enough to be taken for one" * 40, b""])
def test_a_damaged_database_is_made_anew(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "index.sqlite"
    path.write_bytes(content)
    index = Index(path)
    index.record([Fact("a", 1, 1, 1)])
    assert index.count() == 1


def test_a_database_of_another_version_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "index.sqlite"
    index = Index(path)
    index.record([Fact("a", 1, 1, 1)])
    index._database.execute("PRAGMA user_version = 99")
    index.close()
    assert Index(path).count() == 0


def test_what_was_recorded_survives_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "index.sqlite"
    script = (
        "import os, pathlib, sys\n"
        "from daemon.index import Fact, Index\n"
        "index = Index(pathlib.Path(sys.argv[1]))\n"
        "index.record(Fact(f'a/{n}', n, n, n) for n in range(1000))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    root = Path(__file__).resolve().parents[2]
    process = subprocess.run([sys.executable, "-c", script, str(path)], cwd=root, check=False)
    assert process.returncode == -9
    assert Index(path).count("a") == 1000
