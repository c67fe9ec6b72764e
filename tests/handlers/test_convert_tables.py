"""The key maps: read forwards and backwards they are the same, and they know every tensor of the real classes."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from handlers.convert import configure
from handlers.convert.families import FAMILIES
from handlers.convert.header import TensorEntry, bytes_of
from handlers.convert.keymap import Component
from handlers.convert.plan import Located, to_components, to_single
from handlers.convert.vocabulary import write_clip

DATA = Path(configure.__file__).parent / "configs"
# Published counts of parameters.
COUNTS = {
    ("sd1", "unet"): 859_520_964,
    ("sd1", "vae"): 83_653_863,
    ("sd1", "text_encoder"): 123_060_480,
    ("sd2", "unet"): 865_910_724,
    ("sd2", "text_encoder"): 340_387_840,
    ("sdxl", "unet"): 2_567_463_684,
    ("sdxl", "text_encoder_2"): 694_659_840,
    ("flux", "transformer"): 11_901_408_320,
}


@cache
def state(family: str, component: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the full-size class, built of the configuration that comes with fastsd, without memory."""
    documents = json.loads((DATA / f"{family}.json").read_bytes())["documents"]
    library, name = documents["model_index.json"][component]
    kind = getattr(importlib.import_module(library), name)
    config: dict[str, Any] = documents[f"{component}/config.json"]
    with torch.device("meta"):
        model = kind(kind.config_class(**config)) if library == "transformers" else kind.from_config(config)
    # Tied weights have two names and one tensor; buffers that are not saved are not in the state.
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


PARTS = [(family.name, part) for family in FAMILIES.values() for part in family.components]


def located(shapes: dict[str, tuple[int, ...]]) -> dict[str, Located]:
    found, begin = {}, 0
    for key, shape in shapes.items():
        length = bytes_of("F16", shape)
        found[key] = Located(Path("x"), TensorEntry("F16", shape, begin, begin + length))
        begin += length
    return found


@pytest.mark.parametrize(("family", "component"), PARTS, ids=lambda value: getattr(value, "name", value))
def test_every_tensor_of_the_real_class_goes_there_and_back(family: str, component: Component) -> None:
    shapes = {component.current(key): shape for key, shape in state(family, component.name).items()}
    shapes = {key: shape for key, shape in shapes.items() if not component.is_ignored(key)}
    others = FAMILIES[family].components
    single = to_single((component,), {component.name: located(shapes)}, family)
    assert len({entry.name for entry in single}) == len(single)
    for entry in single:
        owners = [other.name for other in others if other.match_single(entry.name)]
        assert owners[0] == component.name
    back, unknown = to_components(others, located({entry.name: entry.shape for entry in single}))
    if family == "sd2" and component.name == "text_encoder":
        assert "encoder.layers.22.layer_norm1.weight" in shapes  # the 24th is not kept
    assert unknown == []
    assert {entry.name: entry.shape for entry in back[component.name]} == shapes
    assert set(back) == {component.name}


@pytest.mark.parametrize(("family", "component"), PARTS, ids=lambda value: getattr(value, "name", value))
def test_a_table_is_a_bijection_of_its_modules_and_has_no_line_too_many(family: str, component: Component) -> None:
    rules = component.rules
    assert all(count == 1 for count in Counter(rule.single for rule in rules).values())
    assert all(count == 1 for count in Counter(part for rule in rules for part in rule.diffusers).values())
    used = set()
    for key in state(family, component.name):
        match = component.match_diffusers(component.current(key))
        assert match is not None
        used.add(match.rule)
    idle = {rule.single for rule in rules if rule not in used}
    flat = {"conv_shortcut", "nin_shortcut"}  # whether they are there depends on the widths
    absent = {"text_projection", "quant_conv", "post_quant_conv"}
    # A depth of the VAE's levels is shared by families; a shortcut stands where widths differ.
    assert {name for name in idle if name not in absent and not name.endswith(("skip_connection", *flat))} == set()


@pytest.mark.parametrize(("family", "component"), list(COUNTS))
def test_the_configurations_give_the_published_sizes(family: str, component: str) -> None:
    shapes = state(family, component)
    numbers = sum(int(torch.Size(shape).numel()) for key, shape in shapes.items() if "position_ids" not in key)
    assert numbers == COUNTS[family, component]


@given(st.data())
def test_any_part_of_a_component_goes_there_and_back(data: st.DataObject) -> None:
    """Whatever subset of whole tensors: names of one side never collide on the other."""
    family, component = data.draw(st.sampled_from(PARTS))
    shapes = state(family, component.name)
    keys = data.draw(st.lists(st.sampled_from(sorted(shapes)), max_size=30, unique=True))
    singles: dict[str, tuple[str, ...]] = {}
    for key in keys:
        match = component.match_diffusers(component.current(key))
        assert match is not None
        again = component.match_single(match.single)
        assert again == match
        assert component.current(key) in match.parts
        assert singles.setdefault(match.single, match.parts) == match.parts


@given(st.lists(st.sampled_from(["a", "0", "12", "weight", "", "text_model", "#", "attn"]), max_size=6).map(".".join))
def test_a_key_that_no_table_knows_is_none_or_comes_back(key: str) -> None:
    for _family, component in PARTS:
        match = component.match_diffusers(key)
        if match and component.rules:
            assert component.match_single(match.single) == match


def test_the_tokenizer_that_comes_with_fastsd_is_clips(tmp_path: Path) -> None:
    write_clip(tmp_path, "!")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert len(tokenizer) == 49408
    # Known from CLIP's own: start, "a photo of a cat", end.
    assert tokenizer("A photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    padded = tokenizer("a", padding="max_length").input_ids
    assert padded == [49406, 320, 49407] + [0] * 74
