"""Heat maps: they add up, they lie over the object more than chance has it, and looking changes nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open

from handlers.caption.attention import Attention, attend, composed, grounded_only, mass_inside, words_of
from handlers.caption.boxes import parse
from handlers.caption.heat import TILE, overlaid, sheet
from handlers.caption.look import AttentionHandler, FeaturesHandler
from handlers.caption.model import Captioner
from handlers.caption.prompts import BRIEF
from handlers.caption.speaking import Ask, Spoken
from handlers.context import JobContext
from handlers.models import miniature
from handlers.models.miniature import captioner as widths
from handlers.models.miniature import world
from sessions.refusal import Refusal

GRID = widths.RESOLUTION // widths.PATCH
PICTURES = 12


@pytest.fixture(scope="module")
def captioner(cache: Path) -> Captioner:
    return Captioner.load(miniature.ensure("miniature-captioner", cache), "cpu")


@pytest.fixture(scope="module")
def drawn() -> list[world.Picture]:
    return [
        world.draw(world.random_scene(np.random.default_rng((61, number)), 1 + number % 2))
        for number in range(PICTURES)
    ]


@pytest.fixture(scope="module")
def looked(captioner: Captioner, drawn: list[world.Picture]) -> list[Attention]:
    return [attend(captioner, picture.image, Ask(0, BRIEF)) for picture in drawn]


def context(cache: Path, **payload: object) -> JobContext:
    whole = {"captioner": "miniature", **payload}
    return JobContext(1, "look", whole, "cpu", cache, lambda *_: None, lambda: False, lambda: False)


def test_the_arrays_have_the_shapes_that_the_docs_name(looked: list[Attention]) -> None:
    found = looked[0]
    tokens, words = len(found.tokens), len(found.words)
    assert found.text.shape == (3, 4, tokens, 64)
    assert found.resampler.shape == (4, 64, 1 + GRID * GRID + 64)
    assert found.token_heat.shape == (tokens, GRID, GRID)
    assert found.heat.shape == (words, GRID, GRID)
    assert found.resampler.sum(-1) == pytest.approx(1.0, abs=1e-5)
    assert found.heat.sum((1, 2)) == pytest.approx(1.0, abs=1e-5)
    assert ((found.text >= 0) & (found.text <= 1)).all()


def test_the_words_are_those_of_the_caption(looked: list[Attention], drawn: list[world.Picture]) -> None:
    for found, picture in zip(looked, drawn, strict=True):
        said = "".join(letter if letter.isalnum() else " " for letter in found.utterance.text).split()
        # The prompt's words were given, not said.
        assert [word.text for word in found.words] == said[3:]
        for index, thing in enumerate(picture.scene.things[: len(found.utterance.grounded)]):
            spoken = [word.text for word in found.words if word.phrase == index]
            assert spoken == found.utterance.grounded[index].phrase.split()
            assert thing.shape in spoken


def test_looking_changes_nothing(captioner: Captioner, drawn: list[world.Picture], looked: list[Attention]) -> None:
    said = dict(captioner.speak([drawn[0].image], [Ask(0, BRIEF)]))[0]
    assert isinstance(said, Spoken)
    assert said.raw == looked[0].raw
    assert captioner.model.config.text_config._attn_implementation == "sdpa"


def test_the_attention_lies_in_the_objects_box_more_than_chance(
    looked: list[Attention], drawn: list[world.Picture]
) -> None:
    inside, chance = [], []
    for found, picture in zip(looked, drawn, strict=True):
        for index, box in enumerate(picture.boxes[: len(found.utterance.grounded)]):
            inside.append(mass_inside(found.phrase_heat(index), box))
            chance.append((box[2] - box[0]) * (box[3] - box[1]))
    print(f"mass in the box {np.mean(inside):.2f}, chance {np.mean(chance):.2f}")
    assert np.mean(inside) > 1.5 * np.mean(chance)
    assert np.mean(np.array(inside) > np.array(chance)) > 0.8


def test_words_belong_to_the_phrases_that_have_a_box(captioner: Captioner) -> None:
    raw = (
        "<phrase> a red ring</phrase> and<phrase> a blue heart</phrase><object><patch_index_0044><patch_index_0863>"
        "</object> , on a pink background."
    )
    tokenizer = captioner.processor.tokenizer
    words = grounded_only(words_of(tokenizer, tokenizer(raw, add_special_tokens=False).input_ids), parse(raw))
    assert " ".join(word.text for word in words) == "a red ring and a blue heart on a pink background"
    assert [word.text for word in words if word.phrase == 0] == ["a", "blue", "heart"]
    assert {word.phrase for word in words} == {None, 0}


@given(st.floats(0, 0.9), st.floats(0, 0.9), st.floats(0.01, 1), st.floats(0.01, 1), st.integers(1, 16))
def test_an_even_map_has_a_boxs_area_in_it(x: float, y: float, width: float, height: float, side: int) -> None:
    box = (x, y, min(1.0, x + width), min(1.0, y + height))
    area = (box[2] - box[0]) * (box[3] - box[1])
    assert mass_inside(np.ones((side, side)), box) == pytest.approx(area, abs=1e-6)


def test_the_composition_is_a_product_of_two_looks() -> None:
    """A token that reads one latent, which reads one patch, looks at that patch."""
    text = np.zeros((2, 3, 1, 4))
    text[..., 2] = 1.0
    resampler = np.zeros((5, 4, 1 + 9 + 4))
    resampler[:, 2, 1 + 7] = 0.5
    resampler[:, 2, 0] = 0.5  # what it reads from CLS is nowhere
    (heat,) = composed(text, resampler)
    assert heat.shape == (3, 3)
    assert heat[2, 1] == 1.0
    assert heat.sum() == 1.0


def test_the_sheet_shows_every_word(drawn: list[world.Picture], looked: list[Attention]) -> None:
    one = sheet(drawn[0].image, looked[0])
    rows = -(-len(looked[0].words) // 4)
    assert one.height > rows * TILE
    assert one.mode == "RGB"


def test_hot_patches_are_light_and_cold_ones_are_dark() -> None:
    heat = np.zeros((8, 8), np.float32)
    heat[2, 5] = 1.0
    shown = np.asarray(overlaid(Image.new("RGB", (80, 80), "gray"), heat)).astype(int).sum(-1)
    assert np.unravel_index(shown.argmax(), shown.shape)[0] // 10 == 2
    assert np.unravel_index(shown.argmax(), shown.shape)[1] // 10 == 5
    flat = np.asarray(overlaid(Image.new("RGB", (8, 8), "gray"), np.ones((8, 8), np.float32)))
    assert len(np.unique(flat.reshape(-1, 3), axis=0)) == 1


def test_the_command_writes_a_picture_and_the_raw_arrays(
    cache: Path, drawn: list[world.Picture], looked: list[Attention], tmp_path: Path
) -> None:
    drawn[1].image.save(tmp_path / "a.png")
    output, npz = tmp_path / "heat.png", tmp_path / "heat.npz"
    payload = {"source": str(tmp_path / "a.png"), "output": str(output), "npz": str(npz)}
    result = AttentionHandler().run(context(cache, **payload))
    assert list(result.outputs) == [output, npz]
    with Image.open(output) as shown:
        assert shown.format == "PNG"
    arrays = np.load(npz)
    assert arrays["words"].tolist() == [word.text for word in looked[1].words] == result.facts["words"]
    np.testing.assert_allclose(arrays["heat"], looked[1].heat, atol=1e-5)
    assert arrays["boxes"].shape == (len(looked[1].utterance.grounded), 5)
    assert all(0 <= phrase["mass"] <= 1 for phrase in result.facts["phrases"])


def test_features_are_what_the_model_sees(
    cache: Path, captioner: Captioner, drawn: list[world.Picture], tmp_path: Path
) -> None:
    for number in range(3):
        drawn[number].image.save(tmp_path / f"{number}.png")
    (tmp_path / "1.png").write_bytes(b"no picture")
    sources = [str(tmp_path / f"{number}.png") for number in range(3)]
    output = tmp_path / "features.safetensors"
    result = FeaturesHandler().run(context(cache, sources=sources, output=str(output)))
    assert result.facts["shapes"] == {"patches": [2, 1 + GRID * GRID, 128], "latents": [2, 64, 128]}
    assert [left["source"] for left in result.facts["left_out"]] == [sources[1]]
    with safe_open(output, "pt") as file:
        assert file.metadata()["model"] == "miniature-captioner"
        latents = file.get_tensor("latents")
    torch.testing.assert_close(latents[1], captioner.encode([drawn[2].image])[0], atol=1e-5, rtol=1e-5)
    (tmp_path / "0.png").write_bytes(b"")
    with pytest.raises(Refusal):
        FeaturesHandler().run(context(cache, sources=sources[:2], output=str(output)))
