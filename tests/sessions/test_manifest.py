from __future__ import annotations

from datetime import date, timedelta
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from sessions.errors import error_path, remove_error, write_error
from sessions.manifest import Identity, Manifest, manifest_path, outputs_present, read_identity, write_identity
from sessions.refusal import Refusal
from sessions.trash import KEPT_DAYS, empty_trash, move_to_trash


def test_the_newest_line_counts_and_gone_means_gone(tmp_path: Path) -> None:
    manifest = Manifest.load(tmp_path)
    manifest.append([{"kind": "crop", "source": "a.jpg", "stem": "a", "size": 1}, {"kind": "train", "run": "r"}])
    manifest.append([{"kind": "crop", "source": "a.jpg", "stem": "a", "size": 2}])
    again = Manifest.load(tmp_path)
    record = again.get("crop", "a.jpg")
    assert record is not None
    assert record["size"] == 2
    assert again.stems() == {"a.jpg": "a"}
    manifest.append([{"kind": "crop", "source": "a.jpg", "gone": True}])
    assert manifest.get("crop", "a.jpg") is None
    assert Manifest.load(tmp_path).records == manifest.records


def test_torn_and_foreign_lines_are_passed_over(tmp_path: Path) -> None:
    Manifest.load(tmp_path).append([{"kind": "crop", "source": "a"}])
    with manifest_path(tmp_path).open("ab") as file:
        file.write(b'{"kind": "crop", "sou\n\xff\xfe\n[1]\n{"no": "kind"}\n')
    Manifest.load(tmp_path).append([{"kind": "crop", "source": "b"}])
    assert [record["source"] for record in Manifest.load(tmp_path).of_kind("crop")] == ["a", "b"]


@given(
    st.lists(
        st.tuples(st.sampled_from(["crop", "caption"]), st.text(max_size=4), st.booleans(), st.integers()), max_size=20
    )
)
def test_what_is_in_memory_is_what_a_new_machine_reads(
    tmp_path_factory: object, lines: list[tuple[str, str, bool, int]]
) -> None:
    folder = tmp_path_factory.mktemp("session")  # type: ignore[attr-defined]
    manifest = Manifest.load(folder)
    for kind, source, gone, size in lines:
        manifest.append([{"kind": kind, "source": source, "size": size, **({"gone": True} if gone else {})}])
    assert Manifest.load(folder).records == manifest.records


def test_surrogate_names_survive(tmp_path: Path) -> None:
    name = b"caf\xe9.jpg".decode("utf-8", errors="surrogateescape")
    Manifest.load(tmp_path).append([{"kind": "crop", "source": name}])
    assert Manifest.load(tmp_path).get("crop", name) is not None


def test_identity(tmp_path: Path) -> None:
    assert read_identity(tmp_path) is None
    write_identity(tmp_path, Identity("12345678", "zwx"))
    assert read_identity(tmp_path) == Identity("12345678", "zwx")
    (tmp_path / ".fastsd" / "session.json").write_text("{broken")
    assert read_identity(tmp_path) is None


def test_trash_keeps_thirty_days(tmp_path: Path) -> None:
    (tmp_path / "crops").mkdir()
    (tmp_path / "crops" / "a.jpg").write_bytes(b"a")
    today = date(2026, 11, 23)
    assert move_to_trash(tmp_path, ["crops/a.jpg", "crops/none.jpg"], today) == ["crops/a.jpg"]
    thrown = tmp_path / ".fastsd" / "trash" / "2026-11-23" / "crops" / "a.jpg"
    assert thrown.read_bytes() == b"a"
    assert empty_trash(tmp_path, today + timedelta(days=KEPT_DAYS)) == 0
    assert thrown.exists()
    assert empty_trash(tmp_path, today + timedelta(days=KEPT_DAYS + 1)) == 1
    assert not thrown.exists()


def test_outputs_present(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    assert outputs_present(tmp_path, {"outputs": ["a"]})
    assert not outputs_present(tmp_path, {"outputs": ["a", "b"]})


def test_error_files_come_and_go(tmp_path: Path) -> None:
    picture = tmp_path / "a.jpg"
    write_error(picture, Refusal("corrupt", "It breaks off.", "Copy it again.", line=3))
    text = error_path(picture).read_text()
    assert "a.jpg (line 3)" in text
    assert "It breaks off." in text
    assert "Copy it again." in text
    written = error_path(picture).stat().st_ino
    write_error(picture, Refusal("corrupt", "It breaks off.", "Copy it again.", line=3))
    assert error_path(picture).stat().st_ino == written, "the same is not written twice"
    assert remove_error(picture)
    assert not remove_error(picture)
