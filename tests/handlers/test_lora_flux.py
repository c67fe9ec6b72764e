"""LoRAs of Flux in the names of its authors' code, as kohya and ComfyUI write them: a layer may be several of ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from safetensors.torch import load_file, save_file

from handlers.convert.job import convert
from handlers.convert.lora import read_lora
from handlers.convert.lora_write import convert_lora, merge_loras
from handlers.models.inspect import inspect
from sessions.refusal import Refusal
from tests.handlers import convert_models

PREFIX = "model.diffusion_model."
RANK, ALPHA = 3, 1.5
WIDTH = 3072
Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]
Write = Callable[[Pairs], dict[str, torch.Tensor]]


def pairs_of(shapes: dict[str, tuple[int, int]]) -> Pairs:
    """Layer → down and up, of random numbers."""
    generator = torch.Generator().manual_seed(5)
    return {
        layer: (
            torch.randn(RANK, columns, generator=generator) / 8,
            torch.randn(rows, RANK, generator=generator) / 8,
        )
        for layer, (rows, columns) in shapes.items()
    }


def named(pairs: Pairs, name: Callable[[str], str], down: str, up: str) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for layer, halves in pairs.items():
        tensors |= {f"{name(layer)}.{half}.weight": tensor for half, tensor in zip((down, up), halves, strict=True)}
        tensors[f"{name(layer)}.alpha"] = torch.tensor(ALPHA)
    return tensors


def as_kohya(pairs: Pairs) -> dict[str, torch.Tensor]:
    return named(pairs, lambda layer: f"lora_unet_{layer.replace('.', '_')}", "lora_down", "lora_up")


def as_comfy(pairs: Pairs) -> dict[str, torch.Tensor]:
    return named(pairs, lambda layer: f"diffusion_model.{layer}", "lora_A", "lora_B")


def test_each_layer_gets_what_diffusers_gives_it(tmp_path: Path) -> None:
    double, single = "double_blocks.0", "single_blocks.1"
    streams: dict[str, tuple[int, int]] = {}
    for stream in ("img", "txt"):
        streams |= {
            f"{double}.{stream}_attn.qkv": (3 * WIDTH, WIDTH),
            f"{double}.{stream}_attn.proj": (WIDTH, WIDTH),
            f"{double}.{stream}_mlp.0": (4 * WIDTH, WIDTH),
            f"{double}.{stream}_mlp.2": (WIDTH, 4 * WIDTH),
            f"{double}.{stream}_mod.lin": (6 * WIDTH, WIDTH),
        }
    tensors = as_kohya(
        pairs_of(
            {
                **streams,
                f"{single}.linear1": (7 * WIDTH, WIDTH),
                f"{single}.linear2": (WIDTH, 5 * WIDTH),
                f"{single}.modulation.lin": (3 * WIDTH, WIDTH),
            }
        )
    )
    save_file(tensors, tmp_path / "kohya.safetensors")
    assert inspect(tmp_path / "kohya.safetensors").family == "flux"
    convert_lora(tmp_path / "kohya.safetensors", tmp_path / "ours.safetensors", "diffusers")
    ours = load_file(tmp_path / "ours.safetensors")
    # Theirs have alpha / rank in the factors; ours beside them.
    theirs = _convert_kohya_flux_lora_to_diffusers(dict(tensors))
    assert ours.keys() == theirs.keys()
    assert {pair.alpha for pair in read_lora(tmp_path / "ours.safetensors").pairs} == {ALPHA}
    for name in theirs:
        if name.endswith("lora_A.weight"):
            other = name.replace("lora_A", "lora_B")
            corner = (slice(-5, None), slice(-5, None))  # the last rows, of the last share
            wanted = theirs[other][corner[0]] @ theirs[name][:, corner[1]]
            found = ours[other][corner[0]] @ ours[name][:, corner[1]] * (ALPHA / RANK)
            torch.testing.assert_close(found, wanted, msg=lambda text, name=name: f"{name}: {text}")
            assert ours[other].shape == theirs[other].shape


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Flux in one file, as its authors name it."""
    folder = tmp_path_factory.mktemp("flux")
    convert(convert_models.build("flux", folder / "base"), folder / "base.safetensors", verify="header")
    return folder / "base.safetensors"


@pytest.mark.parametrize("write", [as_kohya, as_comfy])
def test_merged_it_adds_to_each_layer_what_it_says(write: Write, base: Path, tmp_path: Path) -> None:
    plain = load_file(base)
    layers = {
        key.removeprefix(PREFIX).removesuffix(".weight"): (tensor.shape[0], tensor.shape[1])
        for key, tensor in plain.items()
        if key.startswith(PREFIX) and key.endswith(".weight") and tensor.ndim == 2 and "adaLN" not in key
    }
    assert {"double_blocks.0.img_attn.qkv", "single_blocks.0.linear1", "img_in", "final_layer.linear"} <= layers.keys()
    pairs = pairs_of(layers)
    save_file(write(pairs), tmp_path / "lora.safetensors")
    made = merge_loras(base, [(tmp_path / "lora.safetensors", 0.7)], tmp_path / "merged.safetensors")
    assert made.family == "flux"
    merged = load_file(made.output)
    for key, tensor in plain.items():
        layer = key.removeprefix(PREFIX).removesuffix(".weight")
        if layer not in pairs:
            assert torch.equal(merged[key], tensor), key
            continue
        down, up = pairs[layer]
        wanted = tensor + 0.7 * ALPHA / RANK * (up @ down)
        torch.testing.assert_close(
            merged[key], wanted, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_what_cannot_be_divided_is_refused(tmp_path: Path) -> None:
    for layer, rows, said in (
        ("single_blocks.0.linear1", 8, "rows are no 7 equal shares"),
        ("final_layer.adaLN_modulation.1", 8, "belongs to no module that is known"),
    ):
        save_file(
            as_kohya(pairs_of({"double_blocks.0.img_attn.qkv": (6, 8), layer: (rows, 8)})), tmp_path / "a.safetensors"
        )
        with pytest.raises(Refusal, match=said):
            read_lora(tmp_path / "a.safetensors")
