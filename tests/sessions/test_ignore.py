from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sessions.files import temporary_name
from sessions.ignore import IgnoreRules, is_ignored_file_name, is_ignored_folder_name


@pytest.mark.parametrize(
    "name",
    [
        ".hidden.jpg",
        ".DS_Store",
        "._a.jpg",
        "Thumbs.db",
        "desktop.ini",
        "DESKTOP.INI",
        "~$report.docx",
        ".~lock.a.odt#",
        "a.jpg.part",
        "a.jpg.PART",
        "a.crdownload",
        "a.jpg.filepart",
        "a.download",
        "a.jpg.4f2a.partial",
        "a.tmp",
        "train.yaml~",
    ],
)
def test_unfinished_and_litter_is_ignored(name: str) -> None:
    assert is_ignored_file_name(name)
    assert IgnoreRules().ignores_file(f"Sessions/anna/{name}")


@pytest.mark.parametrize(
    "name",
    ["a.jpg", "zwx (1).JPG", "train.yaml", "part.jpg", "a.txt", "-rf", "tmp", "a~b.png", "\udcff.jpg", "a\nb.jpg"],
)
def test_what_people_bring_is_not_ignored(name: str) -> None:
    assert not is_ignored_file_name(name)
    assert not IgnoreRules().ignores_file(f"Sessions/anna/{name}")


def test_own_temporary_files_are_ignored() -> None:
    assert is_ignored_file_name(temporary_name(Path("a.jpg")).name)


def test_hidden_and_system_folders_are_ignored() -> None:
    assert all(is_ignored_folder_name(name) for name in (".fastsd", ".git", "__MACOSX", "@eaDir", "$RECYCLE.BIN"))
    assert not any(is_ignored_folder_name(name) for name in ("captions", "Sessions", "runs"))


def test_a_name_pattern_matches_anywhere() -> None:
    rules = IgnoreRules(["*.bak", "old"])
    assert rules.ignores_file("a.bak")
    assert rules.ignores_file("Sessions/anna/a.bak")
    assert rules.ignores_folder("Sessions/anna/old")
    assert not rules.ignores_file("Sessions/anna/a.bak.jpg")
    assert not rules.ignores_file("a.BAK")


def test_a_path_pattern_stays_within_folders() -> None:
    rules = IgnoreRules(["Sessions/*/drafts", "**/raw/*.tif", "/top.jpg"])
    assert rules.ignores_folder("Sessions/anna/drafts")
    assert not rules.ignores_folder("Sessions/anna/more/drafts")
    assert not rules.ignores_folder("drafts")
    assert rules.ignores_file("raw/a.tif")
    assert rules.ignores_file("Sessions/anna/raw/a.tif")
    assert not rules.ignores_file("Sessions/anna/raw/deeper/a.tif")
    assert rules.ignores_file("top.jpg")
    assert not rules.ignores_file("Sessions/top.jpg")


def test_a_pattern_with_a_slash_at_its_end_is_for_folders() -> None:
    rules = IgnoreRules(["keep/", "a/b/"])
    assert rules.ignores_folder("x/keep")
    assert not rules.ignores_file("x/keep")
    assert rules.ignores_folder("a/b")
    assert not rules.ignores_file("a/b")


def test_empty_patterns_ignore_nothing() -> None:
    assert not IgnoreRules(["", "/", "."]).ignores_file("a.jpg")


@given(
    st.lists(st.text(alphabet="ab*?[]/.", max_size=8), max_size=4), st.text(alphabet="ab/.", min_size=1, max_size=12)
)
def test_any_pattern_is_accepted_and_a_double_star_matches_everything(patterns: list[str], path: str) -> None:
    assert IgnoreRules(patterns).ignores_file(path) in (True, False)
    assert IgnoreRules(["**/*"]).ignores_file(path.strip("/") or "a")
