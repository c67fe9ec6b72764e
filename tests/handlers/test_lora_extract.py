"""A LoRA taken out of a model: as near as one of its rank can be, and the whole where that is enough."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from handlers.convert.job import convert
from handlers.convert.lora import read_lora
from handlers.convert.lora_extract import extract_lora, nearest
from handlers.convert.lora_write import merge_loras
from handlers.models.miniature.seeded import seeded
from sessions.refusal import Refusal
from tests.handlers import convert_models


@given(rows=st.integers(1, 12), columns=st.integers(1, 12), rank=st.integers(1, 12), seed=st.integers(0, 99))
def test_nothing_of_that_rank_is_nearer(rows: int, columns: int, rank: int, seed: int) -> None:
    """Against torch's own singular values: the rest is what the smaller ones hold."""
    matrix = np.random.default_rng(seed).standard_normal((rows, columns)).astype("<f4")
    rank = min(rank, rows, columns)
    up, down = nearest(matrix, rank)
    assert (up.shape, down.shape) == ((rows, rank), (rank, columns))
    rest = float(((matrix - up @ down).astype("<f8") ** 2).sum())
    values = torch.linalg.svdvals(torch.from_numpy(matrix).double())
    assert rest == pytest.approx(float((values[rank:] ** 2).sum()), rel=1e-4, abs=1e-6)


def test_a_matrix_of_zeros_and_one_of_less_rank_are_no_trouble() -> None:
    for matrix in (np.zeros((3, 5), "<f4"), np.outer(np.arange(4.0), np.arange(3.0)).astype("<f4")):
        up, down = nearest(matrix, 3)
        np.testing.assert_allclose(up @ down, matrix, atol=1e-5)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_models.build("sd2", tmp_path_factory.mktemp("base") / "sd2")


NAMES = {
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k": ((24,), (24,)),
    "lora_unet_down_blocks_0_resnets_0_conv1": ((24, 3, 3), (24, 1, 1)),
    "lora_te_text_model_encoder_layers_0_self_attn_v_proj": ((128,), (128,)),
}


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("lora") / "a.safetensors"
    with seeded(2):
        made = {}
        for name, (inner, outer) in NAMES.items():
            made[f"{name}.lora_down.weight"] = torch.randn(3, *inner)
            made[f"{name}.lora_up.weight"] = torch.randn(outer[0], 3, *outer[1:])
            made[f"{name}.alpha"] = torch.tensor(1.5)
    save_file(made, file)
    return file


@pytest.mark.parametrize("of_files", [False, True])
def test_what_was_merged_comes_out_again(base: Path, lora: Path, tmp_path: Path, of_files: bool) -> None:
    tuned, plain = tmp_path / "tuned.safetensors", base
    merge_loras(base, [(lora, 1.0)], tuned)
    if of_files:
        plain = tmp_path / "plain.safetensors"
        convert(base, plain, verify="header")
    made, kept = extract_lora(tuned, plain, tmp_path / "out.safetensors", 3, dtype="fp32")
    assert (made.family, made.modules) == ("sd2", len(NAMES))
    assert kept == pytest.approx(1.0, abs=1e-6)
    assert {pair.module for pair in read_lora(made.output).pairs} == {pair.module for pair in read_lora(lora).pairs}
    merge_loras(plain, [(made.output, 1.0)], tmp_path / "again.safetensors")
    have, want = load_file(tmp_path / "again.safetensors"), load_file(tuned)
    assert have.keys() == want.keys()
    for key in want:
        torch.testing.assert_close(have[key], want[key], rtol=1e-4, atol=1e-4)


def test_less_rank_holds_less_and_says_how_much(base: Path, lora: Path, tmp_path: Path) -> None:
    tuned = tmp_path / "tuned.safetensors"
    merge_loras(base, [(lora, 1.0)], tuned)
    shares = [extract_lora(tuned, base, tmp_path / f"{rank}.safetensors", rank)[1] for rank in (1, 2, 3)]
    assert 0.3 < shares[0] < shares[1] < shares[2]
    assert shares[2] == pytest.approx(1.0, abs=1e-4)
    assert all(tensor.dtype == torch.float16 for tensor in load_file(tmp_path / "1.safetensors").values())


def test_the_same_model_and_another_family_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="does not differ"):
        extract_lora(base, base, tmp_path / "out.safetensors", 4)
    other = convert_models.build("sd1", tmp_path / "sd1")
    with pytest.raises(Refusal, match="of the family sd2"):
        extract_lora(base, other, tmp_path / "out.safetensors", 4)
    assert not (tmp_path / "out.safetensors").exists()


def test_the_command_says_how_much_it_holds(base: Path, lora: Path, tmp_path: Path) -> None:
    tuned = tmp_path / "tuned.safetensors"
    merge_loras(base, [(lora, 1.0)], tuned)
    shutil.copytree(base, tmp_path / "base")
    command = ["lora", "extract", str(tuned), str(tmp_path / "base"), "--rank", "3", "--json"]
    ran = subprocess.run(
        [sys.executable, "-m", "daemon", *command, "--out", str(tmp_path / "out.safetensors")],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert (told["modules"], told["kept"]) == (len(NAMES), 1.0)
