"""What a file is, told from its header alone; and every way in which a header can lie."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from handlers.models import headers, pickles
from handlers.models.inspect import inspect, with_hashes
from handlers.models.miniature import captioner, drawing

UNET = "model.diffusion_model."
TO_K = UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
VAE = "first_stage_model.decoder.conv_in.weight"
SD1 = "cond_stage_model.transformer.text_model.final_layer_norm.weight"
SD2 = "cond_stage_model.model.ln_final.weight"
SDXL = "conditioner.embedders.1.model.ln_final.weight"
FIRST = UNET + "input_blocks.0.0.weight"
BIAS = UNET + "output_blocks.11.1.transformer_blocks.0.norm1.bias"


Shapes = dict[str, tuple[int, ...]]


def write(path: Path, *names: str, metadata: dict[str, str] | None = None, shapes: Shapes | None = None) -> Path:
    tensors = {name: torch.zeros(2, 4, dtype=torch.float16) for name in names}
    tensors |= {name: torch.zeros(shape, dtype=torch.float16) for name, shape in (shapes or {}).items()}
    save_file(tensors, path, metadata)
    return path


def raw(path: Path, table: Any, body: bytes = b"", header: bytes | None = None) -> Path:
    text = json.dumps(table).encode() if header is None else header
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ([FIRST, SD1, VAE], ("checkpoint", "sd1", "epsilon", "base")),
        ([FIRST, SDXL, VAE], ("checkpoint", "sdxl", "epsilon", "base")),
        ([FIRST, "conditioner.embedders.0.model.ln_final.weight", VAE], ("checkpoint", "sdxl", "epsilon", "refiner")),
        ([FIRST, SDXL, VAE, "v_pred"], ("checkpoint", "sdxl", "v", "base")),
        (["double_blocks.0.img_attn.qkv.weight", "img_in.weight"], ("checkpoint", "flux", "flow", "base")),
        (["lora_unet_x.lora_down.weight", "lora_te2_x.lora_up.weight"], ("lora", "sdxl", "epsilon", None)),
        (["transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"], ("lora", "flux", "flow", None)),
        (["unet.a.lora_A.weight", "unet.a.lora_magnitude_vector"], ("lora", None, None, "dora")),
        (["encoder.conv_in.weight", "decoder.conv_in.weight"], ("vae", None, None, None)),
        (["clip_g", "clip_l"], ("embedding", "sdxl", None, None)),
        (["text_model.encoder.layers.0.mlp.fc1.weight"], ("text-encoder", None, None, None)),
        (["adapter.body.0.weight"], ("adapter", None, None, None)),
        (["image_to_text_projection.a", "text_model.model.b"], ("captioner", "kosmos2", None, None)),
    ],
)
def test_kind_family_prediction_and_variant(
    file: Path, names: list[str], told: tuple[str, str | None, str | None, str | None]
) -> None:
    found = inspect(write(file, *names))
    assert (found.kind, found.family, found.prediction, found.variant) == told
    assert (found.format, found.dtype, found.safe, found.problems) == ("safetensors", "F16", True, [])


def test_parameters_and_metadata(file: Path) -> None:
    picture = "data:image/jpeg;base64," + "A" * 5000
    write(file, FIRST, SD1, VAE, metadata={"modelspec.title": "zwx", "modelspec.thumbnail": picture})
    found = inspect(file)
    assert found.parameters == 24
    assert found.metadata["modelspec.title"] == "zwx"
    assert found.metadata["modelspec.thumbnail"] == "data:image/jpeg;base64,A… (5,023 characters)"


@pytest.mark.parametrize(
    ("shapes", "told"),
    [
        ({"lora_unet_a.lora_down.weight": (2, 2)}, ("lora", None, "kohya")),
        ({"lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": (4, 768)}, ("lora", "sd1", "kohya")),
        ({"unet.down_blocks.0.attn2.to_k.lora_A.weight": (4, 1024)}, ("lora", "sd2", "peft")),
        ({"base_model.model.down_blocks.0.attn2.to_k.lora_A.weight": (4, 2048)}, ("lora", "sdxl", "peft")),
        ({"unet.down_blocks.0.attn2.processor.to_k_lora.down.weight": (4, 768)}, ("lora", "sd1", "diffusers")),
        ({"emb_params": (4, 768)}, ("embedding", "sd1", None)),
        ({"<zwx>": (768,)}, ("embedding", "sd1", "diffusers")),
        ({"zwx": (3, 1024)}, ("embedding", "sd2", "diffusers")),
        ({"encoder.block.0.layer.0.SelfAttention.q.weight": (4, 4)}, ("text-encoder", "flux", None)),
        (
            {
                "text_model.encoder.layers.0.mlp.fc1.weight": (4, 4),
                "text_model.embeddings.token_embedding.weight": (9, 1280),
            },
            ("text-encoder", "sdxl", None),
        ),
        (
            {"encoder.conv_in.weight": (1,), "decoder.conv_in.weight": (8, 16, 3, 3), "decoder.up_blocks.0.a": (1,)},
            ("vae", "flux", "diffusers"),
        ),
        (
            {"controlnet_cond_embedding.conv_in.weight": (1,), "down_blocks.0.attn2.to_k.weight": (4, 1024)},
            ("controlnet", "sd2", None),
        ),
        ({"lora_controlnet": (0,), "a.attn2.to_k.down": (4, 2048)}, ("controlnet", "sdxl", None)),
        (
            {
                "conv_in.weight": (4, 9, 3, 3),
                "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (4, 768),
            },
            ("diffusers", "sd1", "diffusers"),
        ),
    ],
)
def test_loras_embeddings_and_parts_by_their_names_and_widths(
    file: Path, shapes: Shapes, told: tuple[str, str | None, str | None]
) -> None:
    found = inspect(write(file, shapes=shapes))
    assert (found.kind, found.family, found.layout) == told


@pytest.mark.parametrize(("width", "family"), [(768, "sd1"), (1024, "sd2"), (2048, "sdxl"), (5, None)])
def test_the_family_by_the_width_of_the_text(file: Path, width: int, family: str | None) -> None:
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight"
    assert inspect(write(file, shapes={name: (4, width)})).family == family
    control: Shapes = {
        "control_model." + TO_K.removeprefix(UNET): (4, width),
        "control_model.input_hint_block.0.weight": (2,),
    }
    found = inspect(write(file, shapes=control))
    assert (found.kind, found.family) == ("controlnet", family)


@pytest.mark.parametrize(
    ("channels", "variant"), [(4, "base"), (9, "inpainting"), (8, "instruct-pix2pix"), (5, "depth")]
)
def test_the_variant_by_the_input_channels(file: Path, channels: int, variant: str) -> None:
    assert inspect(write(file, SD1, VAE, shapes={FIRST: (320, channels, 3, 3)})).variant == variant


def test_a_missing_part_is_a_problem(file: Path) -> None:
    found = inspect(write(file, FIRST, shapes={TO_K: (320, 768)}))
    assert found.family == "sd1"
    assert found.problems == ["It has no text encoder.", "It has no VAE."]


@pytest.mark.parametrize(("spread", "prediction"), [(0.2, "v"), (0.01, "epsilon")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sd2s_prediction_by_its_bias(file: Path, spread: float, prediction: str, dtype: torch.dtype) -> None:
    bias = (spread * torch.randn(320, generator=torch.Generator().manual_seed(0))).to(dtype)
    save_file({name: torch.zeros(2, dtype=dtype) for name in (FIRST, SD2, VAE)} | {BIAS: bias}, file)
    found = inspect(file)
    assert (found.family, found.prediction) == ("sd2", prediction)


def test_what_the_file_says_of_itself_comes_before_what_lies_beside_it(file: Path) -> None:
    write(file, FIRST, SD2, VAE)
    assert inspect(file).prediction is None
    file.with_suffix(".yaml").write_text('model:\n  params:\n    parameterization: "v"\n')
    assert inspect(file).prediction == "v"
    write(file, FIRST, SD2, VAE, metadata={"modelspec.prediction_type": "epsilon"})
    assert inspect(file).prediction == "epsilon"


def test_hashes_are_made_when_asked_for(file: Path) -> None:
    found = inspect(write(file, FIRST, SD1, VAE))
    assert (found.sha256, found.autov2) == (None, None)
    hashed = with_hashes(found)
    told = subprocess.run(["sha256sum", str(file)], capture_output=True, text=True, check=True, timeout=20).stdout
    assert hashed.sha256 == told.split()[0]
    assert hashed.autov2 == told[:10]
    assert list(hashed.to_json()) == [
        *("file", "kind", "family", "prediction", "variant", "format", "dtype", "sha256", "autov2", "safe"),
        *("problems", "parameters", "layout", "metadata"),
    ]


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
LIES: dict[str, tuple[Any, bytes, str]] = {
    "too short": ({"a": ENTRY}, b"1234567", "1 bytes are missing"),
    "too long": ({"a": ENTRY}, b"123456789", "1 bytes too many"),
    "shape": ({"a": {**ENTRY, "shape": [3]}}, b"12345678", "has 8 bytes"),
    "dtype": ({"a": {**ENTRY, "dtype": "F33"}}, b"12345678", "unknown dtype"),
    "overlap": ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}}, b"123456789012", "overlaps"),
    "gap": ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [12, 20]}}, b"x" * 20, "gap"),
    "negative": ({"a": {**ENTRY, "shape": [-2]}}, b"12345678", "no sizes"),
    "backwards": ({"a": {**ENTRY, "data_offsets": [8, 0]}}, b"12345678", "has -8 bytes"),
    "boolean": ({"a": {**ENTRY, "shape": [True, 2]}}, b"12345678", "no sizes"),
    "incomplete": ({"a": {"dtype": "F32"}}, b"", "incomplete"),
    "list": ([], b"", "no JSON object"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", "not all strings"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_found_out(file: Path, lie: str) -> None:
    table, body, said = LIES[lie]
    found = inspect(raw(file, table, body))
    assert len(found.problems) == 1
    assert said in found.problems[0]


@pytest.mark.parametrize(
    "content",
    [b"1234567", b"\xff" * 16, struct.pack("<Q", 100) + b"{}", struct.pack("<Q", 2) + b"\xff\xfe", b"[" * 9],
)
def test_what_is_no_header_at_all_is_a_problem_too(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    assert "damaged" in inspect(file).problems[0]
    raw(file, None, header=b"[" * 100_000)
    assert "no JSON" in inspect(file).problems[0]
    raw(file, None, b"12345678", header=f'{{"a": {json.dumps(ENTRY)}, "a": {json.dumps(ENTRY)}}}'.encode())
    assert "twice" in inspect(file).problems[0]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_one_changed_byte_of_a_header_never_crashes_and_one_lost_byte_is_always_seen(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    write(path, FIRST, SD1, VAE)
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    position = data.draw(st.integers(0, header - 1))
    content[position] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    inspect(path)
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    assert inspect(path).problems


def test_the_header_reads_as_the_library_reads_it(file: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(0, 4, dtype=torch.bfloat16), "c": torch.tensor(7)}
    save_file(tensors, file, {"format": "pt"})
    header = headers.read_header(file)
    assert {name: entry.shape for name, entry in header.tensors.items()} == {"a": (2, 3), "b": (0, 4), "c": ()}
    assert header.metadata == {"format": "pt"}
    entry = header.tensors["a"]
    assert file.read_bytes()[entry.begin : entry.end] == tensors["a"].numpy().tobytes()
    assert headers.dtype_of(header.tensors) == "mixed"


def checkpoint(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


def test_a_checkpoint_of_plain_tensors_is_safe(tmp_path: Path) -> None:
    state = OrderedDict((name, torch.zeros(2, dtype=torch.float16)) for name in (FIRST, SD1, VAE))
    found = inspect(checkpoint(tmp_path / "model.ckpt", {"state_dict": state, "global_step": 7}))
    assert (found.kind, found.family, found.prediction) == ("checkpoint", "sd1", "epsilon")
    assert (found.format, found.dtype, found.safe, found.problems) == ("ckpt", "F16", True, [])


class Harmful:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
def test_a_checkpoint_that_would_run_code_is_unsafe_and_does_not_run_it(tmp_path: Path, protocol: int) -> None:
    trace = tmp_path / "it-ran"
    payload = {FIRST: 1, SD1: 2, VAE: 3, "x": Harmful(os.system, f"touch {trace}")}
    with zipfile.ZipFile(tmp_path / "model.ckpt", "w") as archive:
        archive.writestr("model/data.pkl", pickle.dumps(payload, protocol))
    found = inspect(tmp_path / "model.ckpt")
    assert found.safe is False
    assert "posix.system" in found.problems[-1]
    assert not trace.exists()


def test_a_global_whose_name_is_put_together_is_unsafe(tmp_path: Path) -> None:
    # The name on the stack comes from a call, not from a string that can be read.
    code = pickle.PROTO + b"\x04" + b"cposix\nsystem\n" + b"\x8c\x02os" + b"\x8c\x01a\x85R" + b"\x93."
    with zipfile.ZipFile(tmp_path / "model.ckpt", "w") as archive:
        archive.writestr("m/data.pkl", code)
    contents = pickles.read_contents(tmp_path / "model.ckpt")
    assert {"posix.system", "?"} <= set(contents.harmful)


def test_what_cannot_be_looked_into_is_not_safe(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"a": torch.zeros(1)}, path, _use_new_zipfile_serialization=False)
    assert inspect(path).safe is False
    whole = io.BytesIO()
    torch.save({"a": torch.zeros(1000)}, whole)
    path.write_bytes(whole.getvalue()[:-200])
    found = inspect(path)
    assert found.safe is False
    assert "no whole zip" in found.problems[0]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", b"\x80\x04not a pickle")
    assert inspect(path).safe is False
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", b"nothing")
    assert "no torch checkpoint" in inspect(path).problems[0]


def test_empty_and_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    assert inspect(path).problems == ["The file is empty."]
    picture = tmp_path / "a.png"
    picture.write_bytes(b"\x89PNG\r\n\x1a\n0000")
    assert inspect(picture).format is None
    assert inspect(picture).problems
    with pytest.raises(FileNotFoundError):
        inspect(tmp_path / "absent.safetensors")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folders")
    drawing.build(folder / "drawing")
    captioner.build(folder / "captioner")
    return folder


def test_folders_of_diffusers_and_transformers(folders: Path) -> None:
    found = inspect(folders / "drawing")
    assert (found.kind, found.family, found.prediction, found.variant) == ("diffusers", "sd1", "epsilon", "base")
    assert (found.format, found.dtype, found.safe, found.problems) == ("diffusers", "F32", True, [])
    found = inspect(folders / "captioner")
    assert (found.kind, found.family, found.safe, found.problems) == ("captioner", "kosmos2", True, [])
    assert "model_index.json" in inspect(folders).problems[0]


def test_parts_of_a_folder_are_told_alone(folders: Path, tmp_path: Path) -> None:
    for part, kind in (("vae", "vae"), ("text_encoder", "text-encoder")):
        found = inspect(folders / "drawing" / part)
        assert (found.kind, found.layout, found.problems) == (kind, "diffusers", [])
        assert found.parameters
    whole = inspect(folders / "drawing")
    assert whole.parameters == sum(
        inspect(weights).parameters or 0 for weights in (folders / "drawing").rglob("*.safetensors")
    )
    (tmp_path / "adapter_config.json").write_text("{}")
    write(tmp_path / "adapter_model.safetensors", "base_model.model.a.lora_A.weight")
    found = inspect(tmp_path)
    assert (found.kind, found.layout, found.problems) == ("lora", "peft", [])


def test_what_a_folder_lacks_is_named(folders: Path, tmp_path: Path) -> None:
    folder = tmp_path / "drawing"
    subprocess.run(["cp", "-r", str(folders / "drawing"), str(folder)], check=True, timeout=20)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    os.truncate(weights, weights.stat().st_size - 4)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "scheduler" / "scheduler_config.json").unlink()
    (folder / "scheduler").rmdir()
    problems = " ".join(inspect(folder).problems)
    assert "unet's diffusion_pytorch_model.safetensors is damaged: 4 bytes are missing" in problems
    assert "vae's weights are missing" in problems
    assert "scheduler is missing" in problems


def test_sd2_by_its_text_encoder_and_v_by_its_scheduler(folders: Path, tmp_path: Path) -> None:
    folder = tmp_path / "drawing"
    subprocess.run(["cp", "-r", str(folders / "drawing"), str(folder)], check=True, timeout=20)
    for name, key, value in (
        ("text_encoder/config.json", "hidden_act", "gelu"),
        ("scheduler/scheduler_config.json", "prediction_type", "v_prediction"),
    ):
        settings_ = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**settings_, key: value}))
    found = inspect(folder)
    assert (found.family, found.prediction) == ("sd2", "v")


def test_looking_loads_no_torch(folders: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from handlers.models.inspect import inspect; inspect(Path(sys.argv[1]))"
    )
    tail = "; print([name for name in ('torch', 'numpy', 'safetensors') if name in sys.modules])"
    ran = subprocess.run(
        [sys.executable, "-c", code + tail, str(folders / "drawing")],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert ran.stdout.strip() == "[]"
