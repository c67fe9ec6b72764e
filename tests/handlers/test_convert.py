"""Conversion: what comes out is what went in, and nothing else may call itself done."""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from base64 import b64decode
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from handlers.context import Cancelled, JobContext, Stopping, Waiting
from handlers.convert import sd1
from handlers.convert import single as single_module
from handlers.convert.cast import cast
from handlers.convert.families import FAMILIES
from handlers.convert.forward import compare_forward
from handlers.convert.header import read_header, write_header
from handlers.convert.job import ConvertHandler, convert
from handlers.convert.keymap import Rule
from handlers.convert.single import prove, read_folder
from handlers.convert.source import locate
from handlers.convert.verify import Unproven
from handlers.models import miniature
from sessions import files
from sessions.refusal import Refusal


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return miniature.ensure("miniature", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def single(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("single") / "model.safetensors"
    convert(source, output, verify="header")
    return output


def context(
    payload: dict[str, Any],
    cancelled: Callable[[], bool] = lambda: False,
    stopping: Callable[[], bool] = lambda: False,
) -> JobContext:
    return JobContext(1, "convert", payload, "cpu", Path(), lambda *_: None, cancelled, stopping)


def copy_of(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [None, "fp16", "bf16"])
def test_diffusers_reads_the_same_model(source: Path, tmp_path: Path, dtype: str | None) -> None:
    """``forward`` compares every weight and output through diffusers' own reader."""
    made = convert(source, tmp_path / "m.safetensors", dtype=dtype, verify="forward")
    assert made.bytes == (tmp_path / "m.safetensors").stat().st_size
    assert names_in(tmp_path) == ["m.safetensors"]


def test_the_file_is_safetensors_with_modelspec(source: Path, single: Path, tmp_path: Path) -> None:
    output = tmp_path / "m.safetensors"
    convert(source, output, metadata={"title": "zwx", "trigger_phrase": "zwx dog", "date": None, "fastsd.run": 7})
    with safe_open(output, "pt") as file:
        metadata = file.metadata()
        assert len(list(file.keys())) == len(read_header(single).tensors)
    assert metadata["format"] == "pt"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1"
    assert metadata["modelspec.resolution"] == "64x64"
    assert (metadata["modelspec.title"], metadata["fastsd.run"]) == ("zwx", "7")
    assert "modelspec.date" not in metadata
    assert not any("position_ids" in name for name in read_header(output).tensors)


def test_the_same_source_gives_the_same_bytes(source: Path, single: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "again.safetensors")
    assert files.sha256_of(tmp_path / "again.safetensors") == files.sha256_of(single)


@pytest.mark.parametrize("prefixed", [True, False])
def test_text_encoder_keys_with_and_without_text_model(
    source: Path, single: Path, tmp_path: Path, prefixed: bool
) -> None:
    copy = copy_of(source, tmp_path / "copy")

    def rename(tensors: dict[str, Any]) -> None:
        for key in list(tensors):
            bare = key.removeprefix("text_model.")
            tensors[f"text_model.{bare}" if prefixed else bare] = tensors.pop(key)
        tensors["text_model.embeddings.position_ids" if prefixed else "embeddings.position_ids"] = torch.arange(77)[
            None
        ]

    rewrite(copy / "text_encoder" / "model.safetensors", rename)
    convert(copy, tmp_path / "m.safetensors", verify="forward")
    want, have = load_file(single), load_file(tmp_path / "m.safetensors")
    assert want.keys() == have.keys()
    assert all(torch.equal(want[key], have[key]) for key in want)


def test_old_names_of_the_vae_attention(source: Path, single: Path, tmp_path: Path) -> None:
    copy = copy_of(source, tmp_path / "copy")

    def rename(tensors: dict[str, Any]) -> None:
        for key in list(tensors):
            old = key
            for new, older in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
                old = old.replace(f"mid_block.attentions.0.{new}.", f"mid_block.attentions.0.{older}.")
            tensors[old] = tensors.pop(key)

    rewrite(copy / "vae" / "diffusion_pytorch_model.safetensors", rename)
    assert any(".query.weight" in key for key in locate(copy, "vae"))
    convert(copy, tmp_path / "m.safetensors", verify="forward")
    want, have = load_file(single), load_file(tmp_path / "m.safetensors")
    assert want.keys() == have.keys()
    assert all(torch.equal(want[key], have[key]) for key in want)


def test_shards_and_the_fp16_variant(source: Path, single: Path, tmp_path: Path) -> None:
    copy = copy_of(source, tmp_path / "copy")
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    names = sorted(tensors)
    shards = {"a-00001-of-00002.safetensors": names[::2], "a-00002-of-00002.safetensors": names[1::2]}
    for shard, part in shards.items():
        save_file({name: tensors[name] for name in part}, weights.with_name(shard))
    table = {name: shard for shard, part in shards.items() for name in part}
    weights.with_name(f"{weights.name}.index.json").write_text(json.dumps({"weight_map": table}))
    weights.unlink()
    vae = copy / "vae" / "diffusion_pytorch_model.safetensors"
    vae.rename(vae.with_name("diffusion_pytorch_model.fp16.safetensors"))
    convert(copy, tmp_path / "m.safetensors", verify="all")
    want, have = load_file(single), load_file(tmp_path / "m.safetensors")
    assert want.keys() == have.keys()
    assert all(torch.equal(want[key], have[key]) for key in want)
    weights.with_name("a-00002-of-00002.safetensors").unlink()
    with pytest.raises(Refusal, match="a-00002-of-00002"):
        convert(copy, tmp_path / "n.safetensors")


# Mutations of a written file, each of which some WebUI would load without a word.
def _drop(tensors: dict[str, Any]) -> None:
    del tensors["first_stage_model.decoder.conv_out.bias"]


def _swap(tensors: dict[str, Any]) -> None:
    block = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1"
    tensors[f"{block}.to_q.weight"], tensors[f"{block}.to_k.weight"] = (
        tensors[f"{block}.to_k.weight"],
        tensors[f"{block}.to_q.weight"],
    )


def _zero(tensors: dict[str, Any]) -> None:
    for name, tensor in tensors.items():
        if name.startswith("cond_stage_model."):
            tensors[name] = torch.zeros_like(tensor)


def _one_value(tensors: dict[str, Any]) -> None:
    tensors["model.diffusion_model.middle_block.0.in_layers.2.weight"].view(-1)[20_000] += 1e-3


def _turn(tensors: dict[str, Any]) -> None:
    name = "first_stage_model.encoder.mid.attn_1.q.weight"
    tensors[name] = tensors[name][:, :1].contiguous()


MUTATIONS = [_drop, _swap, _zero, _one_value]


@pytest.mark.parametrize("mutate", [*MUTATIONS, _turn])
def test_mutations_are_caught_by_reading_back(
    source: Path, single: Path, tmp_path: Path, mutate: Callable[[dict[str, Any]], None]
) -> None:
    broken = tmp_path / "m.safetensors"
    shutil.copy(single, broken)
    rewrite(broken, mutate)
    found = read_folder(source, FAMILIES["sd1"])
    with pytest.raises(Unproven):
        prove(broken, FAMILIES["sd1"], found, "all")
    if mutate in (_swap, _zero):
        with pytest.raises(Unproven, match="values"):
            prove(broken, FAMILIES["sd1"], found, "sample")


@pytest.mark.parametrize("mutate", MUTATIONS)
def test_mutations_are_caught_by_loading(
    source: Path, single: Path, tmp_path: Path, mutate: Callable[[dict[str, Any]], None]
) -> None:
    broken = tmp_path / "m.safetensors"
    shutil.copy(single, broken)
    rewrite(broken, mutate)
    with pytest.raises(Unproven):
        compare_forward(broken, source, FAMILIES["sd1"])


def test_the_untouched_file_passes_both(source: Path, single: Path) -> None:
    found = read_folder(source, FAMILIES["sd1"])
    prove(single, FAMILIES["sd1"], found, "sample")
    prove(single, FAMILIES["sd1"], found, "all")
    compare_forward(single, source, FAMILIES["sd1"])


@pytest.mark.parametrize("lost", [1, 4096, 20_000_000])
def test_a_truncated_file_is_caught(source: Path, single: Path, tmp_path: Path, lost: int) -> None:
    broken = tmp_path / "m.safetensors"
    shutil.copy(single, broken)
    os.truncate(broken, single.stat().st_size - lost)
    with pytest.raises(Refusal, match="bytes are missing"):
        read_header(broken)


def test_a_wrong_table_gives_no_file(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own check would follow a wrong table both ways; diffusers' reader does not."""
    swapped = {"to_q": "to_k", "to_k": "to_q"}

    def turned(rule: Rule) -> Rule:
        module, _, leaf = rule.diffusers[0].rpartition(".")
        wrong = ".attentions." in module and leaf in swapped
        return replace(rule, diffusers=(f"{module}.{swapped[leaf]}",)) if wrong else rule

    wrong = replace(sd1.VAE, rules=tuple(turned(rule) for rule in sd1.VAE.rules))
    assert wrong.rules != sd1.VAE.rules
    family = replace(FAMILIES["sd1"], components=(sd1.UNET, wrong, sd1.TEXT_ENCODER))
    monkeypatch.setattr(single_module, "FAMILIES", {"sd1": family})
    convert(source, tmp_path / "unnoticed.safetensors", verify="all")
    with pytest.raises(Unproven, match="vae"):
        convert(source, tmp_path / "m.safetensors", verify="forward")
    assert names_in(tmp_path) == ["unnoticed.safetensors"]


def test_a_torn_source_is_refused(source: Path, tmp_path: Path) -> None:
    copy = copy_of(source, tmp_path / "copy")
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    os.truncate(weights, weights.stat().st_size - 10)
    with pytest.raises(Refusal, match="10 bytes are missing"):
        convert(copy, tmp_path / "m.safetensors")
    assert not (tmp_path / "m.safetensors").exists()


@pytest.mark.parametrize("lost", ["unet/config.json", "model_index.json", "vae/diffusion_pytorch_model.safetensors"])
def test_an_incomplete_source_is_refused(source: Path, tmp_path: Path, lost: str) -> None:
    copy = copy_of(source, tmp_path / "copy")
    (copy / lost).unlink()
    with pytest.raises(Refusal, match=lost.partition("/")[0]):
        convert(copy, tmp_path / "m.safetensors")


def test_other_families_are_refused(source: Path, tmp_path: Path) -> None:
    copy = copy_of(source, tmp_path / "copy")
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusion3Pipeline"}))
    with pytest.raises(Refusal, match="Diffusion3"):
        convert(copy, tmp_path / "m.safetensors")


def test_too_little_room_is_said_with_numbers(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    with pytest.raises(Waiting, match=r"needs 0\.0[1-9] GB .* 0\.00 GB are free"):
        convert(source, tmp_path / "m.safetensors")


def test_the_handler_writes_model_sidecar_and_preview(source: Path, tmp_path: Path) -> None:
    Image.new("RGB", (70, 40), "red").save(tmp_path / "grid.jpg")
    payload = {
        "source": str(source),
        "output": str(tmp_path / "dog-12ab.safetensors"),
        "dtype": None,
        "metadata": {"title": "dog"},
        "preview": str(tmp_path / "grid.jpg"),
        "run": "12ab",
    }
    result = ConvertHandler().run(context(payload))
    model = tmp_path / "dog-12ab.safetensors"
    assert result.facts["verified"] == "forward"
    assert result.facts["sha256"] == files.sha256_of(model)
    assert result.facts["bytes"] == model.stat().st_size
    assert (result.facts["family"], result.facts["prediction"], result.facts["run"]) == ("sd1", "epsilon", "12ab")
    assert {path.name for path in result.outputs} == {model.name, "dog-12ab.json", "dog-12ab.preview.png"}
    with Image.open(tmp_path / "dog-12ab.preview.png") as preview:
        assert preview.size == (70, 40)
    beginning, _, coded = read_header(model).metadata["modelspec.thumbnail"].partition(",")
    assert beginning == "data:image/jpeg;base64"
    with Image.open(BytesIO(b64decode(coded))) as thumbnail:
        assert (thumbnail.format, thumbnail.size) == ("JPEG", (70, 40))
        red, green, blue = np.asarray(thumbnail.convert("RGB")).mean((0, 1))
        assert red > 240
        assert max(green, blue) < 20
    assert "thumbnail" not in (tmp_path / "dog-12ab.json").read_text()
    sidecar = json.loads((tmp_path / "dog-12ab.json").read_text())
    assert sidecar["sha256"] == result.facts["sha256"]
    assert sidecar["autov2"] == sidecar["sha256"][:10]
    assert model.stat().st_mode & 0o777 == 0o666 & ~_umask()


def test_a_large_preview_is_small_in_the_header_and_one_that_is_none_loses_nothing(
    source: Path, tmp_path: Path
) -> None:
    noise = np.random.default_rng(3).integers(0, 255, (1500, 3000, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "grid.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "grid.png").read_bytes()[:100])
    payload = {"source": str(source), "verify": "sample"}
    for name in ("grid", "torn"):
        output = tmp_path / f"{name}.safetensors"
        ConvertHandler().run(context({**payload, "output": str(output), "preview": str(tmp_path / f"{name}.png")}))
        found = read_header(output).metadata.get("modelspec.thumbnail")
        assert (found is not None) == (name == "grid")
        if found is not None:
            assert len(found) < 64_000
            with Image.open(BytesIO(b64decode(found.partition(",")[2]))) as thumbnail:
                assert thumbnail.size == (256, 128)


def test_what_still_holds_every_byte_of_a_folder_is_not_made_again(source: Path, single: Path, tmp_path: Path) -> None:
    known = {"outputs": [str(single)], "facts": {"run": "old"}}
    payload = {"source": str(source), "output": str(tmp_path / "m.safetensors"), "known": known, "verify": "sample"}
    result = ConvertHandler().run(context(payload))
    assert (result.facts, result.outputs) == ({"run": "old"}, [single])
    assert names_in(tmp_path) == []
    other = copy_of(source, tmp_path / "other")
    rewrite(other / "vae" / "diffusion_pytorch_model.safetensors", lambda tensors: next(iter(tensors.values())).add_(1))
    result = ConvertHandler().run(context({**payload, "source": str(other), "run": "new"}))
    assert result.facts["run"] == "new"
    assert (tmp_path / "m.safetensors").is_file()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_cancel_and_stop_leave_nothing(source: Path, tmp_path: Path) -> None:
    payload: dict[str, Any] = {
        "source": str(source),
        "output": str(tmp_path / "m.safetensors"),
        "dtype": None,
        "metadata": {},
    }
    with pytest.raises(Cancelled):
        ConvertHandler().run(context(payload, cancelled=lambda: True))
    with pytest.raises(Stopping):
        ConvertHandler().run(context(payload, stopping=lambda: True))
    assert names_in(tmp_path) == []


_PAUSED = """
import sys
from pathlib import Path
from handlers.convert.job import convert
def progress(done, total, note):
    if done > total // 2:
        print(note, flush=True)
        sys.stdin.readline()
convert(Path(sys.argv[1]), Path(sys.argv[2]), progress=progress)
"""


@pytest.mark.parametrize("moment", [b"writing\n", b"checking\n"])
def test_killed_mid_write_no_name_exists_and_a_retry_works(
    source: Path, single: Path, tmp_path: Path, moment: bytes
) -> None:
    output = tmp_path / "m.safetensors"
    process = subprocess.Popen(
        [sys.executable, "-c", _PAUSED, str(source), str(output)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin
    assert process.stdout
    with process:
        while process.stdout.readline() != moment:
            process.stdin.write(b"\n")
            process.stdin.flush()
        process.send_signal(signal.SIGKILL)
    left = names_in(tmp_path)
    assert len(left) == 1
    assert left[0].startswith(files.TEMPORARY_PREFIX)
    payload: dict[str, Any] = {
        "source": str(source),
        "output": str(output),
        "dtype": None,
        "metadata": {},
        "verify": "sample",
    }
    ConvertHandler().run(context(payload))
    assert names_in(tmp_path) == ["m.json", "m.safetensors"]
    assert files.sha256_of(output) == files.sha256_of(single)


def test_copying_imports_no_torch(source: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from handlers.convert.job import convert;"
        "convert(Path(sys.argv[1]), Path(sys.argv[2]), dtype='fp16', verify='all');"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, str(source), str(tmp_path / "m.safetensors")], check=True)


_NUMBERS = st.binary(min_size=4, max_size=64).map(lambda raw: raw[: len(raw) // 4 * 4])
_TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@example(b"\x00H\x81\x7f", "BF16", "F16")  # 131072 beside a signalling NaN
@given(_NUMBERS, st.sampled_from(sorted(_TORCH)), st.sampled_from(sorted(_TORCH)))
def test_casts_are_torch_casts(raw: bytes, source: str, target: str) -> None:
    values = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(_TORCH[source])
    want = values.to(_TORCH[target])
    if not torch.equal(torch.isfinite(want), torch.isfinite(values)):
        with pytest.raises(ValueError, match="does not fit"):
            cast(raw, source, target)
        return
    have = torch.frombuffer(bytearray(cast(raw, source, target)), dtype=torch.uint8).view(_TORCH[target])
    assert torch.equal(have.isnan(), want.isnan())
    assert torch.equal(have.nan_to_num(), want.nan_to_num())


def _valid_file() -> bytes:
    head = write_header([("a", "F32", (2, 3)), ("b", "F16", (5,)), ("c", "I64", ())], {"format": "pt"})
    return head + bytes(24 + 10 + 8)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "f.safetensors"


def test_a_written_header_is_read_by_the_reference(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    path.write_bytes(_valid_file())
    with safe_open(path, "np") as file:
        assert {key: tuple(file.get_slice(key).get_shape()) for key in list(file.keys())} == {
            "a": (2, 3),
            "b": (5,),
            "c": (),
        }
    assert read_header(path).metadata == {"format": "pt"}
    assert np.prod(read_header(path).tensors["a"].shape) == 6


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(st.data())
def test_damaged_headers_are_refused_and_nothing_else(scratch: Path, data: st.DataObject) -> None:
    raw = bytearray(_valid_file())
    kind = data.draw(st.sampled_from(["flip", "cut", "length", "noise", "add"]))
    if kind == "flip":
        for _ in range(data.draw(st.integers(1, 4))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    elif kind == "cut":
        del raw[data.draw(st.integers(0, len(raw) - 1)) :]
    elif kind == "length":
        raw[:8] = struct.pack("<Q", data.draw(st.integers(0, 2**64 - 1)))
    elif kind == "noise":
        raw = bytearray(data.draw(st.binary(max_size=200)))
    else:
        raw += data.draw(st.binary(min_size=1, max_size=20))
    scratch.write_bytes(bytes(raw))
    try:
        header = read_header(scratch)
    except Refusal:
        return
    assert sum(tensor.length for tensor in header.tensors.values()) <= len(raw)
