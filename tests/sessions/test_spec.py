"""train.yaml: what is accepted, and what a person is told when it is not."""

import json
import re
import string
from itertools import pairwise

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from sessions.refusal import Refusal
from sessions.spec import TrainSpec, json_schema, parse_spec
from sessions.spec_example import EXAMPLE
from sessions.spec_model import seconds_of, steps_of
from sessions.spec_rules import kept_steps


def refusal_of(text: str) -> Refusal:
    with pytest.raises(Refusal) as caught:
        parse_spec(text)
    assert caught.value.code == "spec"
    assert caught.value.advice
    return caught.value


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing\n", "---\n", "\ufeff", "unet:\nname: ~\ncontinue: null\n"])
def test_an_empty_file_is_the_defaults(text: str) -> None:
    assert parse_spec(text) == TrainSpec()


def test_the_example_without_its_marks_is_the_defaults() -> None:
    bare = re.sub(r"^#", "", EXAMPLE, flags=re.MULTILINE)
    assert parse_spec(EXAMPLE) == TrainSpec()
    assert parse_spec(bare) == TrainSpec()
    named = set(yaml.safe_load(bare))
    assert named == set(TrainSpec().to_json()), "every key of the file stands in the example"


def test_every_line_of_the_example_works_alone() -> None:
    for line in EXAMPLE.splitlines():
        if re.match(r"#\w", line):
            assert parse_spec(line[1:]) == TrainSpec()


@pytest.mark.parametrize("written", ["1e-6", "'1e-6'", "1.0e-06", "0.000001", "1E-6"])
def test_numbers_that_yaml_takes_for_text(written: str) -> None:
    assert parse_spec(f"unet: {{learning_rate: {written}}}").unet.learning_rate == 1e-6


def test_scalars_mean_what_their_key_says() -> None:
    spec = parse_spec(
        "name: 007\ncaptions: yes\npublish: off\ninstance: 2024-01-01\nprompts: one\nseed: '9'\nclass: no\n"
    )
    assert (spec.name, spec.captions, spec.publish, spec.instance) == ("007", True, False, "2024-01-01")
    assert (spec.prompts, spec.seed, spec.class_) == (["one"], 9, "no")


def test_curly_quotes_of_a_phone() -> None:
    assert parse_spec("instance: “zwx”\n").instance == "zwx"


def test_steps_a_picture() -> None:
    spec = parse_spec('unet: {steps: "150 / image"}\ntext_encoder: {steps: 10}\n')
    assert (steps_of(spec.unet.steps, 7), steps_of(spec.text_encoder.steps, 7)) == (1050, 10)
    assert steps_of(TrainSpec().unet.steps, 7) is None


@pytest.mark.parametrize(
    ("written", "seconds"), [("10min", 600.0), ("10 min", 600.0), ("90s", 90.0), ("1.5h", 5400.0), ("250", None)]
)
def test_checkpoint_every(written: str, seconds: float | None) -> None:
    assert seconds_of(parse_spec(f"checkpoint_every: {written}\n").checkpoint_every) == seconds


@pytest.mark.parametrize(
    ("text", "line", "what", "advice"),
    [
        ("base: sd15\nresolutoin: 512\n", 2, "resolutoin", "'resolution'"),
        ("unet:\n  steps: 10\n  learning-rate: 1e-6\n", 3, "learning-rate", "'learning_rate'"),
        ("# a\nsteps: 100\n", 2, "steps", "unet: {steps"),
        ("zebra: 1\n", 1, "zebra", "keys are"),
        ("base: sd15\nresolution: 1024\n", 2, "sd15", "256 to 768"),
        ("resolution: 513\n", 1, "513", "8 divides"),
        ("seed: seven\n", 1, "seven", "whole number"),
        ("unet: {learning_rate: fast}\n", 1, "fast", "2e-6"),
        ("unet: 100\n", 1, "unet: 100", "steps"),
        ("\n\nmethod: dreambooh\n", 3, "dreambooh", "dreambooth"),
        ("unet:\n\tsteps: 4\n", 2, "tab", "spaces"),
        ("- base\n- sd15\n", 1, "list", "key: value"),
        ("base:sd15\n", 1, "space", "key: value"),
        ("instance: zwx: dog\n", 1, "colon", "quotes"),
        ("base: sd15\nname: 'open\n", 3, "YAML", "quote"),
        ("base: sd15\nunet: {steps: 4\nseed: 1\n", 3, "YAML", "bracket"),
        ("base: a\nseed: 1\nbase: b\n", 3, "twice", "one"),
        ("base: /etc\n", 1, "outside", "Models"),
        ("base: ../other\n", 1, "outside", "Models"),
        ("base: https://example.org/x\n", 1, "outside", "Models"),
        ("text_encoder: {steps: 0}\nunet: {steps: 0}\n", 2, "nothing to train", "steps"),
        ("a: &x 1\nb: *x\n", 2, "aliases", "quotes"),
        ("name: a/b\n", 1, "a/b", "slashes"),
        ("seed: 1\nvae: /etc/vae.safetensors\n", 2, "outside", "Models"),
        ("save_from: 500\n", 1, "save_every keeps none", "save_every"),
        ("save_every: 200\nunet: {steps: 200}\n", 1, "step 200, and the run has 200", "below 200"),
        ("save_every: 50\nsave_from: 900\nunet: {steps: 800}\n", 2, "step 900", "save_from below 800"),
        ("{\\rtf1 base}", 1, "rich text", "plain"),
    ],
)
def test_refusals_name_line_reason_and_fix(text: str, line: int, what: str, advice: str) -> None:
    refusal = refusal_of(text)
    assert refusal.line == line
    assert what in refusal.what
    assert advice in refusal.advice


def test_other_lines_at_fault_are_named_too() -> None:
    assert "line 3" in refusal_of("sead: 1\nbase: sd15\nresolution: big\n").advice


@given(st.integers(1, 400), st.integers(0, 400), st.integers(0, 400))
def test_intermediate_models_come_every_so_many_steps_from_the_first_on(every: int, first: int, steps: int) -> None:
    kept = list(kept_steps(every, first, steps))
    assert all(max(first, 1) <= step < steps for step in kept)
    assert all(later - earlier == every for earlier, later in pairwise(kept))
    assert bool(kept) == ((first or every) < steps)
    assert not kept or kept[0] == (first or every)
    assert not kept or kept[-1] + every >= steps
    assert not kept_steps(0, first, steps)


@pytest.mark.parametrize("text", ["[" * 20_000, "a:\n" * 30_000, "\x00", "a: [[[[[1]]]]]", "? [a]\n: b", "{" * 50])
def test_files_that_are_none(text: str) -> None:
    refusal_of(text)


def test_a_spec_crosses_a_process_border() -> None:
    spec = parse_spec("class: dog\ncontinue:\nunet: {steps: 12}\ncheckpoint_every: 3\nprompts: [a, b]\n")
    assert TrainSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_the_schema_has_every_key() -> None:
    schema = json_schema()
    assert set(schema["properties"]) == set(TrainSpec().to_json())
    assert schema["additionalProperties"] is False


_WORDS = st.sampled_from(
    [*TrainSpec().to_json(), "steps", "auto", "1e-6", "{", "}", "[", ":", ": ", "\n", "  ", "\t", "#", "- ", "&a", "*a"]
)


@given(st.lists(_WORDS | st.text(string.printable, max_size=4), max_size=30).map("".join))
@example("base: !!python/object/apply:os.system [ls]")
def test_any_text_is_a_spec_or_a_refusal(text: str) -> None:
    try:
        spec = parse_spec(text)
    except Refusal:
        return
    assert TrainSpec.from_json(spec.to_json()) == spec


@given(st.data())
def test_a_spec_written_as_yaml_is_read_back(data: st.DataObject) -> None:
    keys = {
        "unet": st.fixed_dictionaries({"steps": st.integers(1, 99_999), "learning_rate": st.floats(1e-9, 0.5)}),
        "seed": st.integers(0, 2**32 - 1),
        "resolution": st.integers(8, 256).map(lambda n: n * 8),
        "instance": st.text(string.ascii_letters + " :#-'\"", min_size=1, max_size=20).map(str.strip).filter(bool),
        "captions": st.sampled_from(["auto", True, False]),
    }
    chosen = data.draw(st.sets(st.sampled_from(sorted(keys))))
    values = {key: data.draw(keys[key]) for key in sorted(chosen)}
    spec = parse_spec(yaml.safe_dump(values)).to_json()
    assert {
        key: spec[key] if key != "unet" else {k: spec[key][k] for k in ("steps", "learning_rate")} for key in values
    } == values


def test_a_slip_at_the_end_of_any_key_is_understood() -> None:
    for key in TrainSpec().to_json():
        assert f"'{key}'" in refusal_of(f"{key}x: 1\n").advice
