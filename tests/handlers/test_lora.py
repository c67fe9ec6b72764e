"""LoRAs: every name there and back, the same values in every layout, and a merge that is diffusers' own."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from handlers.convert.header import read_header
from handlers.convert.job import convert, convert_single
from handlers.convert.lora import read_lora
from handlers.convert.lora_names import (
    FLAT_FAMILIES,
    LORA_FAMILIES,
    WORDS,
    Module,
    Share,
    dotted,
    flat,
    from_diffusers,
    from_kohya,
    to_diffusers,
    to_kohya,
)
from handlers.convert.lora_write import convert_lora, merge_loras
from handlers.models.inspect import inspect
from handlers.models.miniature.seeded import seeded
from sessions.refusal import Refusal
from tests.handlers import convert_models

CONFIGS = Path(importlib.import_module("handlers.convert").__path__[0]) / "configs"
PARTS = {
    "sd1": ("unet", "text_encoder"),
    "sd2": ("unet", "text_encoder"),
    "sdxl": ("unet", "text_encoder", "text_encoder_2"),
    "flux": ("transformer",),
}
TARGETS = {
    "unet": [
        *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2"),
        *("time_emb_proj", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "conv_in", "conv_out"),
    ],
    "transformer": [
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "proj_mlp"),
        *("attn.add_v_proj", "attn.to_add_out", "ff.net.2", "ff_context.net.0.proj", "norm.linear"),
    ],
    "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "text_encoder_2": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
}
# The module whose rank and alpha differ from the others'.
ODD = {"unet": "mid_block.attentions.0.proj_in", "transformer": "transformer_blocks.0.attn.to_k"}


@cache
def full_size_modules(family: str) -> tuple[Module, ...]:
    """Every linear layer and convolution of the full-size classes."""
    documents = json.loads((CONFIGS / f"{family}.json").read_bytes())["documents"]
    found = []
    for part in PARTS[family]:
        library, name = documents["model_index.json"][part]
        kind = getattr(importlib.import_module(library), name)
        config = documents[f"{part}/config.json"]
        with torch.device("meta"):
            model = kind(kind.config_class(**config)) if library == "transformers" else kind.from_config(config)
        for path, module in model.named_modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                found.append(Module(part, path.removeprefix("text_model.")))
    return tuple(found)


@pytest.mark.parametrize("family", FLAT_FAMILIES)
def test_the_names_of_every_module_go_there_and_back(family: str) -> None:
    modules = full_size_modules(family)
    assert len(modules) > 300
    kohya = [to_kohya(module, family) for module in modules]
    assert len(set(kohya)) == len(modules), "no two modules share a name"
    for module, name in zip(modules, kohya, strict=True):
        assert name is not None
        assert from_kohya(name) == (Share(module),)
        assert from_diffusers(to_diffusers(module)) == (Share(module),)
        assert "." not in name
    plain = [Module(module.part, dotted(flat(module.path)) or "") for module in modules]
    assert plain == list(modules), "also under diffusers' own names, which others write for SDXL"


@given(path=st.lists(st.one_of(st.sampled_from(sorted(WORDS)), st.integers(0, 40).map(str)), min_size=1, max_size=8))
def test_what_the_table_divides_it_divides_into_its_own_words(path: list[str]) -> None:
    back = dotted(flat(".".join(path)))
    assert back is not None
    assert flat(back) == flat(".".join(path))
    assert all(word in WORDS or word.isdecimal() for word in back.split("."))


def test_known_names() -> None:
    """As they stand in files of kohya's scripts."""
    block = "transformer_blocks.0.attn1.to_k"
    for family, module, name in (
        (
            "sd1",
            Module("unet", f"down_blocks.1.attentions.0.{block}"),
            "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_k",
        ),
        (
            "sdxl",
            Module("unet", f"down_blocks.1.attentions.0.{block}"),
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k",
        ),
        (
            "sdxl",
            Module("unet", "mid_block.attentions.0.proj_in"),
            "lora_unet_middle_block_1_proj_in",
        ),
        (
            "sdxl",
            Module("text_encoder_2", "encoder.layers.31.mlp.fc1"),
            "lora_te2_text_model_encoder_layers_31_mlp_fc1",
        ),
        (
            "sd2",
            Module("text_encoder", "encoder.layers.3.self_attn.out_proj"),
            "lora_te_text_model_encoder_layers_3_self_attn_out_proj",
        ),
    ):
        assert to_kohya(module, family) == name
        assert from_kohya(name) == (Share(module),)
    old = "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn2.processor"
    assert from_kohya("lora_unet_something_else") == ()
    assert from_diffusers(old) == (Share(Module("unet", old.removeprefix("unet."))),)


@pytest.fixture(scope="module", params=LORA_FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def base(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_models.build(family, tmp_path_factory.mktemp("base") / family)


def load(base: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return DiffusionPipeline.from_pretrained(base, local_files_only=True)


def parts_of(pipeline: Any, family: str) -> Iterator[tuple[str, Any]]:
    for part in PARTS[family]:
        yield part, getattr(pipeline, part)


@pytest.fixture(scope="module")
def trained(family: str, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA as diffusers saves it: ranks and alphas differ between modules."""
    pipeline = load(base)
    layers, metadata = {}, {}
    with seeded(11):
        for part, model in parts_of(pipeline, family):
            odd = ODD.get(part, "encoder.layers.0.mlp.fc1")
            config = LoraConfig(
                r=4,
                lora_alpha=2,
                target_modules=TARGETS[part],
                rank_pattern={odd: 6},
                # diffusers overlooks a text encoder's alphas in kohya's layout, where they differ.
                alpha_pattern={odd: 3} if part in ODD else {},
                init_lora_weights=False,
            )
            model.add_adapter(config)
            layers[part] = get_peft_model_state_dict(model)
            metadata[part] = model.peft_config["default"].to_dict()
    folder = tmp_path_factory.mktemp("trained")
    arguments = {f"{part}_lora_layers": tensors for part, tensors in layers.items()}
    arguments |= {f"{part}_lora_adapter_metadata": table for part, table in metadata.items()}
    type(pipeline).save_lora_weights(folder, **arguments)
    return folder / "pytorch_lora_weights.safetensors"


def fused(base: Path, lora: Path, family: str, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Every weight after diffusers has loaded and fused a LoRA itself."""
    pipeline = load(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline.load_lora_weights(lora)
        pipeline.fuse_lora(components=list(PARTS[family]), lora_scale=scale)
        pipeline.unload_lora_weights()
    return {
        f"{part}.{key}": tensor
        for part, model in parts_of(pipeline, family)
        for key, tensor in model.state_dict().items()
    }


def weights(base: Path, family: str) -> dict[str, torch.Tensor]:
    pipeline = load(base)
    return {
        f"{part}.{key}": tensor
        for part, model in parts_of(pipeline, family)
        for key, tensor in model.state_dict().items()
    }


def test_there_and_back_is_the_same_and_diffusers_fuses_either_like_the_other(
    family: str, base: Path, trained: Path, tmp_path: Path
) -> None:
    kohya, back, again = (tmp_path / f"{name}.safetensors" for name in ("kohya", "back", "again"))
    made = convert_lora(trained, kohya, "kohya", family)
    assert made.modules == len(load_file(trained)) // 2
    # Flux has dotted names in either layout, with kohya's alphas beside them.
    assert inspect(kohya).layout == ("peft" if family == "flux" else "kohya")
    convert_lora(kohya, back, "diffusers")
    assert inspect(back).layout == "peft"
    convert_lora(back, again, "kohya", family)
    first, second = load_file(kohya), load_file(again)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    pairs = {pair.module: (pair.rank, pair.alpha) for pair in read_lora(back).pairs}
    assert set(pairs.values()) == {(4, 2.0), (6, 3.0), *([(6, 2.0)] if "text_encoder" in PARTS[family] else [])}
    plain = weights(base, family)
    wanted = fused(base, trained, family)
    changed = [key for key in plain if not torch.equal(plain[key], wanted[key])]
    assert len(changed) >= made.modules - 2
    for file in (kohya, back):
        have = fused(base, file, family)
        assert have.keys() == wanted.keys()
        for key, tensor in wanted.items():
            torch.testing.assert_close(have[key], tensor, msg=lambda text, key=key: f"{key}: {text}")


def test_a_merge_is_what_diffusers_fuses(family: str, base: Path, trained: Path, tmp_path: Path) -> None:
    source = base
    if family != "sd1":
        source = tmp_path / "base.safetensors"
        convert(base, source, verify="header")
    kohya = tmp_path / "kohya.safetensors"
    convert_lora(trained, kohya, "kohya", family)
    made = merge_loras(source, [(kohya, 0.7)], tmp_path / "merged.safetensors")
    assert made.family == family
    back = tmp_path / "back"
    convert_single(made.output, back, cache=tmp_path, like=base)
    have, wanted, plain = weights(back, family), fused(base, trained, family, 0.7), weights(base, family)
    assert have.keys() == wanted.keys()
    for key, tensor in wanted.items():
        torch.testing.assert_close(have[key], tensor, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
    untouched = [key for key in plain if torch.equal(plain[key], wanted[key])]
    assert untouched
    assert all(torch.equal(plain[key], have[key]) for key in untouched)
    with safe_open(made.output, "pt") as file:
        assert file.metadata()["modelspec.merged_from"].endswith("kohya.safetensors x 0.7")


@pytest.mark.parametrize("family", ["sd1"], indirect=True)
def test_of_several_loras_each_has_its_weight(base: Path, trained: Path, tmp_path: Path) -> None:
    once, nothing, ckpt = (tmp_path / name for name in ("once.safetensors", "nothing.safetensors", "half.ckpt"))
    merge_loras(base, [(trained, 1.0)], once)
    merge_loras(base, [(trained, 1.0), (trained, -1.0)], nothing)
    merge_loras(base, [(trained, 0.5), (trained, 0.5)], ckpt, dtype="fp16")
    convert(base, tmp_path / "plain.safetensors", verify="header")
    plain, full, none = (load_file(path) for path in (tmp_path / "plain.safetensors", once, nothing))
    half = torch.load(ckpt, weights_only=True)["state_dict"]
    assert plain.keys() == full.keys() == none.keys() == half.keys()
    for key in plain:
        torch.testing.assert_close(none[key], plain[key], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(half[key].float(), full[key], rtol=2e-3, atol=1e-4)


def tensors(rank: int = 4, width: int = 128) -> dict[str, torch.Tensor]:
    name = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    return {f"{name}.lora_down.weight": torch.ones(rank, width), f"{name}.lora_up.weight": torch.ones(512, rank)}


def test_older_layouts_and_peft_folders_are_read(tmp_path: Path) -> None:
    attention = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    old = {
        f"{attention}.processor.to_out_lora.down.weight": torch.ones(4, 32),
        f"{attention}.processor.to_out_lora.up.weight": torch.ones(32, 4),
        f"{attention}.to_q.lora.down.weight": torch.ones(4, 32),
        f"{attention}.to_q.lora.up.weight": torch.ones(32, 4),
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight": torch.ones(4, 8),
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight": torch.ones(8, 4),
        "text_encoder.text_model.encoder.layers.1.self_attn.to_out_lora.down.weight": torch.ones(4, 8),
        "text_encoder.text_model.encoder.layers.1.self_attn.to_out_lora.up.weight": torch.ones(8, 4),
    }
    save_file(old, tmp_path / "old.safetensors")
    pairs = read_lora(tmp_path / "old.safetensors").pairs
    path = attention.removeprefix("unet.")
    assert {(pair.module, pair.alpha) for pair in pairs} == {
        (Module("unet", f"{path}.to_out.0"), 4.0),
        (Module("unet", f"{path}.to_q"), 4.0),
        (Module("text_encoder", "encoder.layers.0.self_attn.q_proj"), 4.0),
        (Module("text_encoder", "encoder.layers.1.self_attn.out_proj"), 4.0),
    }
    peft = {
        f"base_model.model.{path}.to_q.lora_A.weight": torch.ones(4, 32),
        f"base_model.model.{path}.to_q.lora_B.weight": torch.ones(32, 4),
        f"base_model.model.{path}.to_k.lora_A.weight": torch.ones(4, 32),
        f"base_model.model.{path}.to_k.lora_B.weight": torch.ones(32, 4),
    }
    save_file(peft, tmp_path / "adapter_model.safetensors")
    settings = {"r": 4, "lora_alpha": 8, "alpha_pattern": {"to_k": 2}, "use_rslora": False}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    assert {pair.module.path[-4:]: pair.alpha for pair in read_lora(tmp_path).pairs} == {"to_q": 8.0, "to_k": 2.0}
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "use_rslora": True}))
    assert {pair.module.path[-4:]: pair.alpha for pair in read_lora(tmp_path).pairs} == {"to_q": 16.0, "to_k": 4.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("alpha", [1.0, 4.0, 0.1])
def test_alpha_survives_in_every_type(tmp_path: Path, dtype: torch.dtype, alpha: float) -> None:
    name = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    held = torch.tensor(alpha, dtype=dtype)
    save_file(
        {**{key: value.to(dtype) for key, value in tensors().items()}, f"{name}.alpha": held},
        tmp_path / "a.safetensors",
    )
    convert_lora(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers")
    convert_lora(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "kohya", "sd1")
    have, wanted = load_file(tmp_path / "c.safetensors"), load_file(tmp_path / "a.safetensors")
    assert have.keys() == wanted.keys()
    assert all(torch.equal(have[key], wanted[key]) and have[key].dtype == wanted[key].dtype for key in wanted)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda made: made.pop("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"), "has no up part"),
        (lambda made: made.update({"lora_unet_odd.lora_down.weight": torch.ones(1)}), "belongs to no module"),
        (lambda made: made.update({"lora_unet_conv_in.dora_scale": torch.ones(1)}), "is a dora"),
        (lambda made: made.update({"lora_unet_conv_in.hada_w1_a": torch.ones(1)}), "is a loha"),
        (
            lambda made: made.update(
                {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(512, 5)}
            ),
            "do not fit together",
        ),
        (lambda made: made.clear(), "no LoRA"),
    ],
)
def test_what_is_no_plain_lora_is_refused_with_its_name(tmp_path: Path, change: Any, told: str) -> None:
    made = tensors()
    change(made)
    save_file(made or {"x": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(Refusal, match=told):
        read_lora(tmp_path / "a.safetensors")


def test_a_lora_of_another_family_is_refused_before_anything_is_written(
    family: str, base: Path, tmp_path: Path
) -> None:
    save_file(tensors(width=77), tmp_path / "wide.safetensors")
    save_file(
        {key.replace("lora_te_", "lora_te2_"): value for key, value in tensors().items()},
        tmp_path / "other.safetensors",
    )
    output = tmp_path / "out.safetensors"
    with pytest.raises(Refusal, match="by 512 x 77 values"):
        merge_loras(base, [(tmp_path / "wide.safetensors", 1.0)], output)
    if family != "sdxl":
        with pytest.raises(Refusal, match="which the base has not"):
            merge_loras(base, [(tmp_path / "other.safetensors", 1.0)], output)
    assert not output.exists()
    with pytest.raises(Refusal, match="cannot be told"):
        convert_lora(tmp_path / "wide.safetensors", output, "kohya")


def test_the_command(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "a.safetensors")
    command = [sys.executable, "-m", "daemon", "lora", "convert", str(tmp_path / "a.safetensors")]
    ran = subprocess.run(
        [*command, str(tmp_path / "b.safetensors"), "--to", "diffusers", "--json"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert (told["modules"], told["bytes"]) == (1, (tmp_path / "b.safetensors").stat().st_size)
    assert "lora_adapter_metadata" in read_header(tmp_path / "b.safetensors").metadata
