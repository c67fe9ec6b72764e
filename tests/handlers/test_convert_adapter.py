"""A trained adapter and the file that WebUIs read of it: the same values, and the same computed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from handlers.context import JobContext, JobResult
from handlers.convert import adapter_forward
from handlers.convert.adapter import ADAPTER_FACTS, ADAPTER_FILE, adapter_header, convert_adapter, prove, read_facts
from handlers.convert.job import ConvertHandler, convert
from handlers.convert.lora import read_lora
from handlers.convert.verify import Unproven
from handlers.models import miniature
from handlers.models.inspect import inspect
from handlers.train.auto import make_plan
from handlers.train.base import BaseModel, find_base
from handlers.train.finish import write_adapters
from handlers.train.place import Place
from handlers.train.trainable import adapted, layers_of
from sessions.files import sha256_of
from sessions.refusal import Refusal
from sessions.spec import parse_spec

SPEC = "method: {method}\nlora: {{rank: 4, alpha: 6}}\n"
TRAINED: list[Any] = [
    ("miniature", "lora"),
    ("miniature", "dora"),
    ("miniature-sd2", "lora"),
    ("miniature-sdxl", "lora"),
]
TRAINED += [pytest.param("miniature-sdxl", "dora", marks=pytest.mark.soak)]
Make = Callable[[str, str], Path]


def context_of(kind: str, payload: dict[str, Any], cache: Path) -> JobContext:
    return JobContext(1, kind, payload, "cpu", cache, lambda *_: None, lambda: False, lambda: False)


@pytest.fixture(scope="module")
def trained(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """(base, method) → the finished folder of an adapter in which every number has been moved far."""
    made: dict[tuple[str, str], Path] = {}

    def make(name: str, method: str) -> Path:
        if (name, method) not in made:
            made[name, method] = finish(find_base(name, None, cache), method, tmp_path_factory.mktemp("session"))
        return made[name, method]

    return make


def finish(base: BaseModel, method: str, session: Path) -> Path:
    """What the trainer writes at the end of a run; in place of the training, noise."""
    plan = make_plan(parse_spec(SPEC.format(method=method)), base.facts, [{"source": "zwx.png"}] * 3, "s", "fp32")
    pipeline = base.load_pipeline()
    adapters = {}
    for number, part in enumerate(("unet", *base.training.encoders)):
        module = base.load_denoiser() if part == "unet" else getattr(pipeline, part)
        layers = layers_of(part, convolutions=plan.lora_convolutions)
        adapters[part] = adapted(
            module, layers, rank=plan.lora_rank, alpha=plan.lora_alpha, dora=method == "dora", seed=number
        )
        generator = torch.Generator().manual_seed(number)
        for name, parameter in adapters[part].parameters().items():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = parameter.data * (1 + 0.2 * noise) if "magnitude" in name else parameter.data + 0.1 * noise
    return write_adapters(
        Place(session, session, None), "r1", pipeline, adapters, plan=plan, dtype=base.finished_dtype()
    )


def run(source: Path, output: Path, cache: Path, **payload: Any) -> JobResult:
    metadata = {"title": "dog", "trigger_phrase": "zwx dog", "resolution": "64x64", "fastsd.run": "r1"}
    values = {"source": str(source), "output": str(output), "dtype": None, "metadata": metadata, "run": "r1", **payload}
    return ConvertHandler().run(context_of("convert", values, cache))


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        found: dict[str, str] = opened.metadata()
    return found


@pytest.mark.parametrize(("base", "method"), TRAINED)
# diffusers hands a torch tensor to numpy the old way.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_it_holds_and_computes_what_was_trained(
    base: str, method: str, trained: Make, cache: Path, tmp_path: Path
) -> None:
    source, output = trained(base, method), tmp_path / "dog-r1.safetensors"
    folder = miniature.folder_of(base, cache)
    before = {path: sha256_of(path) for path in folder.rglob("*.safetensors")}
    facts = run(source, output, cache).facts
    assert before == {path: sha256_of(path) for path in folder.rglob("*.safetensors")}, "the base stays as it is"
    family = {"miniature": "sd1", "miniature-sd2": "sd2", "miniature-sdxl": "sdxl"}[base]
    assert (facts["model_kind"], facts["variant"], facts["base"]) == (
        "lora",
        "dora" if method == "dora" else None,
        base,
    )
    assert (facts["verified"], facts["family"], facts["trigger"]) == ("forward", family, "zwx dog")
    assert (facts["sha256"], facts["bytes"]) == (sha256_of(output), output.stat().st_size)

    written = load_file(output)
    stems = {key.partition(".")[0] for key in written}
    halves = {key.partition(".")[2] for key in written}
    scale = {"dora_scale"} if method == "dora" else set()
    assert halves == {"alpha", "lora_down.weight", "lora_up.weight"} | scale
    assert len(written) == len(halves) * len(stems), "every module has all of them"
    assert {stem.split("_")[1] for stem in stems} == ({"unet", "te1", "te2"} if family == "sdxl" else {"unet", "te"})
    for stem in stems:
        assert written[f"{stem}.alpha"].item() == 6.0
        if method == "dora":
            up = written[f"{stem}.lora_up.weight"]
            assert written[f"{stem}.dora_scale"].shape == (up.shape[0], *[1] * (up.dim() - 1))
    if family == "sd1":
        down = written["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"]
        assert down.shape == (4, 48, 1, 1), "a convolution's factors are convolutions"
        down = written["lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight"]
        assert down.shape == (4, 48, 3, 3)
        up = written["lora_unet_down_blocks_0_resnets_0_conv1.lora_up.weight"]
        assert up.shape == (48, 4, 1, 1)
    values = sorted(float(tensor.double().sum()) for key, tensor in written.items() if not key.endswith("alpha"))
    assert values == sorted(float(tensor.double().sum()) for tensor in load_file(source / ADAPTER_FILE).values())

    found = inspect(output)
    assert (found.kind, found.layout, found.variant) == ("lora", "kohya", "dora" if method == "dora" else None)
    metadata = metadata_of(output)
    assert metadata["ss_network_module"] == "networks.lora"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "6")
    assert json.loads(metadata["ss_network_args"]) == {"conv_dim": "4", "conv_alpha": "6"}
    assert metadata["modelspec.architecture"].endswith("/lora")
    assert (metadata["modelspec.trigger_phrase"], metadata["fastsd.run"]) == ("zwx dog", "r1")

    sidecar = json.loads(output.with_suffix(".json").read_text())
    assert (sidecar["kind"], sidecar["family"], sidecar["sha256"]) == ("lora", family, facts["sha256"])
    assert sidecar["prompt"] == "<lora:dog-r1:1> zwx dog"
    assert sidecar["activation text"] == "zwx dog"


def test_what_programs_are_told_of_each_family(trained: Make, tmp_path: Path) -> None:
    told = {}
    folder = tmp_path / "adapter"
    folder.mkdir()
    for family, prediction in (
        ("sd1", "epsilon"),
        ("sd2", "epsilon"),
        ("sd2", "v"),
        ("sdxl", "epsilon"),
        ("flux", "flow"),
    ):
        facts = {"rank": 8, "alpha": 0.5, "method": "lora", "base": "b", "family": family, "parts": ["unet"]}
        (folder / ADAPTER_FACTS).write_text(json.dumps({**facts, "prediction": prediction, "resolution": 512}))
        header = adapter_header(read_facts(folder), {})
        told[family, prediction] = (header["modelspec.architecture"], header["ss_base_model_version"], header["ss_v2"])
        assert header["ss_network_alpha"] == "0.5"
    assert told == {
        ("sd1", "epsilon"): ("stable-diffusion-v1/lora", "sd_v1", "False"),
        ("sd2", "epsilon"): ("stable-diffusion-v2-512/lora", "sd_v2", "True"),
        ("sd2", "v"): ("stable-diffusion-v2-768-v/lora", "sd_v2_v", "True"),
        ("sdxl", "epsilon"): ("stable-diffusion-xl-v1-base/lora", "sdxl_base_v1-0", "False"),
        ("flux", "flow"): ("Flux.1-dev/lora", "flux1", "False"),
    }
    assert read_facts(trained("miniature-sd2", "lora")).pipeline.prediction == "v"


def test_half_precision(trained: Make, cache: Path, tmp_path: Path) -> None:
    source, output = trained("miniature", "dora"), tmp_path / "dog.safetensors"
    assert run(source, output, cache, dtype="fp16").facts["verified"] == "forward"
    kinds = {key.rpartition(".")[2]: tensor.dtype for key, tensor in load_file(output).items()}
    assert (kinds["dora_scale"], kinds["weight"]) == (torch.float16, torch.float16)


def test_without_its_base_every_byte_is_compared(trained: Make, cache: Path, tmp_path: Path) -> None:
    source = tmp_path / "finished"
    shutil.copytree(trained("miniature", "lora"), source)
    facts = json.loads((source / ADAPTER_FACTS).read_text())
    (source / ADAPTER_FACTS).write_text(json.dumps({**facts, "base": "gone"}))
    assert run(source, tmp_path / "dog.safetensors", cache).facts["verified"] == "all"


def test_a_base_that_is_another_runs_model_lies_beside_the_output(trained: Make, cache: Path, tmp_path: Path) -> None:
    convert(miniature.folder_of("miniature", cache), tmp_path / "dog-r0.safetensors", verify="header")
    source = tmp_path / "finished"
    shutil.copytree(trained("miniature", "dora"), source)
    facts = json.loads((source / ADAPTER_FACTS).read_text())
    (source / ADAPTER_FACTS).write_text(json.dumps({**facts, "base": "dog-r0"}))
    assert run(source, tmp_path / "dog-r1.safetensors", cache).facts["verified"] == "forward"


def changed(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)


STEM = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
OTHER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_k"


def swap(tensors: dict[str, torch.Tensor]) -> None:
    for half in ("lora_down.weight", "lora_up.weight"):
        left, right = f"{STEM}.{half}", f"{OTHER}.{half}"
        tensors[left], tensors[right] = tensors[right], tensors[left]


@pytest.mark.parametrize(
    ("method", "change", "what"),
    [
        ("lora", lambda made: made[f"{STEM}.lora_up.weight"].view(-1)[-1].add_(1), "does not hold the values"),
        ("lora", lambda made: made[f"{STEM}.alpha"].fill_(3), "the alpha of unet.mid_block"),
        ("lora", lambda made: [made.pop(key) for key in list(made) if key.startswith(STEM)], "changes other modules"),
        ("lora", swap, "does not hold the values"),
        ("dora", lambda made: made[f"{STEM}.dora_scale"].mul_(2), "does not hold the values"),
        ("dora", lambda made: made.pop(f"{STEM}.dora_scale"), "has down and up, its source down and up and scale"),
    ],
)
def test_another_file_is_not_proven(method: str, change: Any, what: str, trained: Make, tmp_path: Path) -> None:
    source, output = trained("miniature", method), tmp_path / "dog.safetensors"
    convert_adapter(source, output, verify="header")
    wanted = read_lora(source / ADAPTER_FILE, ("dora",))
    prove(read_lora(output, ("dora",)), wanted, "all")
    changed(output, change)
    with pytest.raises(Unproven, match=what):
        prove(read_lora(output, ("dora",)), wanted, "all")


@pytest.mark.parametrize(
    ("method", "change"),
    [
        ("lora", swap),
        ("lora", lambda made: made[f"{STEM}.lora_up.weight"].view(-1)[-1].add_(1)),
        ("lora", lambda made: [made[key].mul_(2) for key in made if key.endswith(".alpha")]),
        ("dora", lambda made: made[f"{STEM}.dora_scale"].mul_(2)),
        ("dora", swap),
    ],
)
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_another_file_computes_something_else(
    method: str, change: Any, trained: Make, cache: Path, tmp_path: Path
) -> None:
    source, output = trained("miniature", method), tmp_path / "dog.safetensors"
    convert_adapter(source, output, verify="header")
    base, facts = find_base("miniature", None, cache), read_facts(source)
    changed(output, change)
    with pytest.raises(Unproven):
        adapter_forward.compare_adapters(output, source / ADAPTER_FILE, base, facts)


def test_an_unproven_file_never_has_its_name(
    trained: Make, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise Unproven("it is another")

    monkeypatch.setattr(adapter_forward, "compare_adapters", fail)
    with pytest.raises(Unproven):
        run(trained("miniature", "lora"), tmp_path / "dog.safetensors", cache)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda folder: (folder / ADAPTER_FACTS).write_text("{"), "is damaged"),
        (lambda folder: (folder / ADAPTER_FILE).unlink(), "is no .safetensors file"),
        (lambda folder: (folder / ADAPTER_FILE).write_bytes(b"torn"), "pytorch_lora_weights"),
        (
            lambda folder: (folder / ADAPTER_FACTS).write_text(
                (folder / ADAPTER_FACTS).read_text().replace('"sd1"', '"kosmos2"')
            ),
            "an adapter of kosmos2",
        ),
    ],
)
def test_a_damaged_source_is_refused(damage: Any, what: str, trained: Make, cache: Path, tmp_path: Path) -> None:
    source = tmp_path / "finished"
    shutil.copytree(trained("miniature", "lora"), source)
    damage(source)
    with pytest.raises(Refusal, match=what):
        run(source, tmp_path / "dog.safetensors", cache)
    assert not list(tmp_path.glob("*.safetensors"))
