"""fastsd.yaml: what it may say, and what is told when it says something else."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from daemon.config import BadSettings, Settings, load_settings, quantity, seconds

SECTIONS = ("caption", "watch", "webui", "limits")


def load(folder: Path, text: str) -> Settings:
    (folder / "fastsd.yaml").write_text(text, encoding="utf-8")
    return load_settings(folder)


def refusal(folder: Path, text: str) -> tuple[int | None, str, str]:
    with pytest.raises(BadSettings) as caught:
        load(folder, text)
    assert caught.value.file == folder / "fastsd.yaml"
    return caught.value.refusal.line, caught.value.refusal.what, caught.value.refusal.advice


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "\n\n", "{}\n"])
def test_nothing_said_is_the_defaults(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, text) == Settings()


def test_no_file_is_the_defaults(tmp_path: Path) -> None:
    assert load_settings(tmp_path) == Settings()


@pytest.mark.parametrize("file", ["shipped", "in the repository"])
def test_the_commented_file_says_the_defaults(tmp_path: Path, file: str) -> None:
    shipped = resources.files("daemon").joinpath("fastsd.yaml").read_text(encoding="utf-8")
    text = shipped if file == "shipped" else (Path(__file__).parents[2] / "fastsd.yaml").read_text(encoding="utf-8")
    assert load(tmp_path, text) == Settings()
    uncommented = re.sub(r"^# (?=[ a-z_]+:)", "", text, flags=re.MULTILINE)
    said = yaml.safe_load(uncommented)
    assert set(said) == set(Settings.model_fields), "every key is shown"
    assert {key for section in SECTIONS for key in said[section]} == {
        field.alias or key
        for section in SECTIONS
        for key, field in Settings.model_fields[section].annotation.model_fields.items()  # type: ignore[union-attr]
    }
    assert load(tmp_path, uncommented) == Settings(), "and what stands behind the # is the default"


def test_every_key_is_understood(tmp_path: Path) -> None:
    found = load(
        tmp_path,
        """
captioner: miniature
base: miniature
watch: {events: scan, poll: 1min, settle: 500ms, rescan: 2h, ignore: ["*.bak"]}
webui: {kind: forge, url: "http://127.0.0.1:1", command: [python, launch.py], models: models, switch: announce}
limits: {picture_pixels: 50M, disk_reserve: 1.5GB}
caption: {mode: detailed, class: dog, instance: zwx, drop: [wall], precision: int8, check: off}
""",
    )
    assert found.caption.parameters() == {"mode": "detailed", "class": "dog", "instance": "zwx", "drop": ["wall"]}
    assert (found.caption.precision, found.caption.check) == ("int8", False)
    assert Settings().caption.parameters() == {}
    assert (found.watch.poll, found.watch.settle, found.watch.rescan) == (60.0, 0.5, 7200.0)
    assert (found.limits.picture_pixels, found.limits.disk_reserve) == (50_000_000, 1_500_000_000)
    assert found.webui.command == ["python", "launch.py"]
    assert found.webui.models == Path("models")


@pytest.mark.parametrize(
    ("text", "line", "what", "advice"),
    [
        ("captoiner: miniature\n", 1, "`captoiner` is unknown", "Did you mean `captioner`?"),
        ("base: auto\nwatch:\n  pol: 3s\n", 3, "`watch.pol` is unknown", "Did you mean `poll`?"),
        ("zzz: 1\n", 1, "`zzz` is unknown", "Known here: base, caption, captioner,"),
        ("watch:\n  poll: soon\n", 2, "`watch.poll`: 'soon' is no length of time", "Write for example 10s"),
        ("limits:\n  disk_reserve: much\n", 2, "`limits.disk_reserve`: 'much' is no number", "200M or 5GB"),
        ("watch:\n  events: never\n", 2, "'never'", "Correct `watch.events`"),
        ("webui:\n  kind: gradio\n", 2, "'gradio'", "Correct `webui.kind`"),
        ("webui:\n  command: python launch.py\n", 2, "`webui.command`", "Correct `webui.command`"),
        ("\n\ncaptioner: [a, b]\n", 3, "`captioner`", "Correct `captioner`"),
        ("caption:\n  blacklst: [a]\n", 2, "`caption.blacklst` is unknown", "Did you mean `blacklist`?"),
        ("caption:\n  mode: long\n", 2, "'long'", "Correct `caption.mode`"),
        ("watch: yes\n", 1, "`watch`", "Correct `watch`"),
        ("- a\n- b\n", 1, "a list", "`key: value`"),
        ("just words\n", 1, "one value", "`key: value`"),
        ("watch:\n\tpoll: 3s\n", 2, "a tab", "two spaces"),
        ("base: [a\n", None, "cannot be read as YAML", "`key: value`"),
        ("base: a: b\n", 1, "cannot be read as YAML", "`key: value`"),
        ("base: auto\nbase: auto\n", 2, "`base` stands there twice", "Keep one"),
    ],
)
def test_a_mistake_is_told_with_line_reason_and_fix(
    tmp_path: Path, text: str, line: int | None, what: str, advice: str
) -> None:
    found = refusal(tmp_path, text)
    if line is not None:
        assert found[0] == line
    assert what in found[1]
    assert advice in found[2]


def test_a_file_that_is_no_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "fastsd.yaml").write_bytes(b"captioner: \xff\xfe\n")
    with pytest.raises(BadSettings, match="Save it as UTF-8"):
        load_settings(tmp_path)


def test_a_chosen_file_that_is_absent_is_told(tmp_path: Path) -> None:
    with pytest.raises(BadSettings, match="--config"):
        load_settings(tmp_path, tmp_path / "other.yaml")


def test_a_folder_in_place_of_the_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "fastsd.yaml").mkdir()
    with pytest.raises(BadSettings):
        load_settings(tmp_path)


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    assert load(tmp_path, "\ufeffcaptioner: miniature\n").captioner == "miniature"


def test_null_for_a_section_is_its_default(tmp_path: Path) -> None:
    assert load(tmp_path, "watch:\nwebui:\n") == Settings()


@pytest.mark.parametrize(("text", "value"), [("10s", 10.0), ("5min", 300.0), ("2h", 7200.0), (3, 3.0), (" .5 s ", 0.5)])
def test_lengths_of_time(text: object, value: float) -> None:
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["", "s", "-3s", "3 weeks", None, True, [], float("nan"), float("inf"), -1])
def test_what_is_no_length_of_time(text: object) -> None:
    with pytest.raises(ValueError, match="no length of time"):
        seconds(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [("200M", 200_000_000), ("5GB", 5_000_000_000), (1500, 1500), ("1.5 k", 1500), ("2GiB", 2 * 10**9)],
)
def test_quantities(text: object, value: int) -> None:
    assert quantity(text) == value


@pytest.mark.parametrize("text", ["", "M", "-5", "5 apples", None, False, float("nan"), float("inf"), -1])
def test_what_is_no_quantity(text: object) -> None:
    with pytest.raises(ValueError, match="no number"):
        quantity(text)


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError):
        Settings().captioner = "other"  # type: ignore[misc]
