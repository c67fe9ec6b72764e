"""Pickles: written so that every careful reader takes them, read so that none can do harm."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from handlers.convert.folder import convert_single
from handlers.convert.single import convert
from handlers.convert.source import tensors_of
from handlers.convert.unpickle import read_tensors
from handlers.models import pickles
from handlers.models.miniature import drawing
from sessions.refusal import Refusal


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pickles") / "model"
    drawing.build(folder)
    return folder


def values(path: Path) -> dict[str, torch.Tensor]:
    """The tensors where ``read_tensors`` says that they lie."""
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
    raw = path.read_bytes()
    return {
        name: torch.frombuffer(bytearray(raw[entry.begin : entry.end]), dtype=kinds[entry.dtype]).reshape(entry.shape)
        for name, entry in read_tensors(path).items()
        if entry.length
    }


# What A1111's reader lets through (modules/safe.py): names of members, and globals.
MEMBERS = re.compile(r"^([^/]+)/((data/\d+)|version|byteorder|(data\.pkl))$")
GLOBALS = {
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    *(f"torch.{kind}Storage" for kind in ("Float", "Half", "Int", "Long", "Double", "Byte", "BFloat16")),
}


@pytest.mark.parametrize("dtype", [None, "fp16", "bf16"])
def test_a_checkpoint_loads_in_torch_and_passes_webuis_filters(source: Path, tmp_path: Path, dtype: str | None) -> None:
    path, same = tmp_path / "m.ckpt", tmp_path / "m.safetensors"
    convert(source, path, dtype=dtype, verify="all")
    convert(source, same, dtype=dtype, verify="all")
    loaded = torch.load(path, weights_only=True)["state_dict"]
    want = load_file(same)
    assert loaded.keys() == want.keys()
    assert all(torch.equal(loaded[name], want[name]) and loaded[name].dtype == want[name].dtype for name in want)
    with zipfile.ZipFile(path) as archive:
        assert all(MEMBERS.match(name) for name in archive.namelist())
        assert archive.testzip() is None
    assert pickles.read_contents(path).imports <= GLOBALS
    assert path.stat().st_mode & 0o777 == same.stat().st_mode & 0o777


@pytest.mark.parametrize("safe", [True, False])
def test_bin_folders_are_sources(source: Path, tmp_path: Path, safe: bool) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    for weights in copy.rglob("*.safetensors"):
        stem = "pytorch_model" if weights.stem == "model" else weights.stem
        torch.save(load_file(weights), weights.with_name(f"{stem}.bin" if safe else f"{stem}.fp16.bin"))
        weights.unlink()
    convert(copy, tmp_path / "m.safetensors", verify="all")
    convert(source, tmp_path / "want.safetensors")
    have, want = load_file(tmp_path / "m.safetensors"), load_file(tmp_path / "want.safetensors")
    assert have.keys() == want.keys()
    assert all(torch.equal(have[name], want[name]) for name in want)


def test_views_parameters_and_scalars_are_found(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    whole = torch.arange(24, dtype=torch.float32)
    tensors = {
        "whole": whole,
        "part": whole[6:12].reshape(2, 3),
        "scalar": torch.tensor(7),
        "flat": torch.ones(3, 1, 2, dtype=torch.bfloat16),
        "parameter": torch.nn.Parameter(torch.ones(2, 2)),
    }
    torch.save({"state_dict": OrderedDict(tensors), "epoch": 3, "lr": 0.1}, path)
    found = values(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor.detach()) for name, tensor in tensors.items())
    torch.save({"turned": torch.ones(2, 3).T}, path)
    with pytest.raises(Refusal, match="turned do not lie in order"):
        read_tensors(path)


class Harmful:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize("suffix", ["ckpt", "bin"])
def test_a_hostile_pickle_is_refused_and_named(source: Path, tmp_path: Path, suffix: str) -> None:
    trace = tmp_path / "it-ran"
    code = pickle.dumps({"state_dict": {"a": Harmful(os.system, f"touch {trace}")}})
    if suffix == "ckpt":
        path = tmp_path / "m.ckpt"
    else:
        shutil.copytree(source, tmp_path / "folder")
        (tmp_path / "folder/unet/diffusion_pytorch_model.safetensors").unlink()
        path = tmp_path / "folder/unet/diffusion_pytorch_model.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", code)
    convert_it = (
        partial(convert_single, path, tmp_path / "out", cache=tmp_path)
        if suffix == "ckpt"
        else partial(convert, tmp_path / "folder", tmp_path / "m.safetensors")
    )
    with pytest.raises(Refusal, match=r"would run code.*posix\.system") as caught:
        convert_it()
    assert caught.value.code == "unsafe"
    assert not trace.exists()


def test_a_pickle_that_wants_all_memory_or_lies_about_places_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.ckpt"
    huge = pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + pickle.LONG_BINPUT + (0x7FFFFFF0).to_bytes(4, "little") + b"."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", huge)
    with pytest.raises(Refusal, match="memory"):
        read_tensors(path)
    torch.save({"a": torch.zeros(100)}, path)
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(tmp_path / "n.ckpt", "w") as broken:
        for name in whole.namelist():
            broken.writestr(name, whole.read(name)[:8] if "/data/" in name else whole.read(name))
    with pytest.raises(Refusal, match="longer than its storage"):
        read_tensors(tmp_path / "n.ckpt")


def test_the_old_form_is_refused_plainly(tmp_path: Path) -> None:
    path = tmp_path / "m.ckpt"
    torch.save({"a": torch.zeros(1)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(Refusal, match="no whole zip"):
        tensors_of(path)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_checkpoint_is_refused_or_read_within_its_bounds(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "m.ckpt"
    torch.save({"state_dict": {"a": torch.zeros(3, 4), "b": torch.ones(5)}}, path)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        found = tensors_of(path)
    except Refusal:
        return
    assert all(0 <= located.tensor.begin <= located.tensor.end <= len(raw) for located in found.values())
