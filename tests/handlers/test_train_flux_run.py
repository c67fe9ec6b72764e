"""Runs on a tiny Flux: LoRA and DoRA from the session to the file, killed, in 4 bits, with blocks that come and go."""

from __future__ import annotations

import json
import shutil
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from handlers.context import JobContext, JobResult, Stopping
from handlers.convert import adapter_forward
from handlers.convert.adapter import ADAPTER_FILE, read_facts
from handlers.convert.header import read_header
from handlers.convert.job import ConvertHandler
from handlers.convert.job import convert as write_single
from handlers.convert.verify import Unproven
from handlers.models.inspect import inspect
from handlers.train import room, sampler
from handlers.train.base import find_base
from handlers.train.job import TrainHandler
from handlers.train.speaking import speak
from handlers.train.trainable import TRANSFORMER_LAYERS, adapted
from sessions.refusal import Refusal
from tests.handlers.flux_models import DEV, SCHNELL, build
from tests.handlers.train_process import finished, run_child, tear
from tests.handlers.train_session import make_session, payload_of

SPEC = """
method: {method}
resolution: 256
unet: {{steps: 4, learning_rate: 1e-2}}
lora: {{rank: 4, alpha: 6}}
checkpoint_every: 1
sample_every: {samples}
prompts: [a photo of zwx]
instance: zwx
class: dog
prior: {{images: {prior}}}
caption_dropout: 0.2
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux") / "Models"
    for name in (DEV, SCHNELL):
        build(name, folder)
    return folder


def asked(session: Path, models: Path, *, base: str = DEV, method: str = "lora", **more: int) -> dict[str, Any]:
    spec = SPEC.format(method=method, samples=more.get("samples", 0), prior=more.get("prior", 0))
    return payload_of(session, spec, base=base, models=str(models))


def train(payload: dict[str, Any], cache: Path, stop_after: int | None = None) -> JobResult:
    stop = False

    def report(done: float, total: float, note: str, facts: Any) -> None:
        nonlocal stop
        stop = stop or ("loss" in facts and done == stop_after)

    return TrainHandler().run(JobContext(1, "train", payload, "cpu", cache, report, lambda: False, lambda: stop))


def convert(made: JobResult, models: Path, cache: Path) -> JobResult:
    source = Path(made.facts["finished"])
    values = {"source": str(source), "output": str(source.parents[2] / "dog-r1.safetensors"), "dtype": None}
    payload = {**values, "metadata": made.facts["metadata"], "run": "r1", "models": str(models)}
    return ConvertHandler().run(
        JobContext(1, "convert", payload, "cpu", cache, lambda *_: None, lambda: False, lambda: False)
    )


@pytest.mark.parametrize(("base", "method"), [(DEV, "lora"), (SCHNELL, "dora")])
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_from_the_session_to_the_file_that_webuis_read(
    base: str, method: str, models: Path, cache: Path, tmp_path: Path
) -> None:
    session = make_session(tmp_path / "Sessions" / "dog")
    made = train(asked(session, models, base=base, method=method, samples=4, prior=2), cache)
    assert made.facts["state"] == "finished"
    assert len(list((session / "concept_images").glob("*.png"))) == 2
    assert Path(str(made.facts["preview"])).is_file()
    folder = Path(made.facts["finished"])
    facts = json.loads((folder / "adapter.json").read_text())
    assert (facts["family"], facts["prediction"], facts["parts"]) == ("flux", "flow", ["transformer"])
    converted = convert(made, models, cache)
    assert (converted.facts["verified"], converted.facts["family"]) == ("forward", "flux")
    file = Path(converted.outputs[0])
    found = inspect(file)
    assert (found.kind, found.family, found.variant) == ("lora", "flux", "dora" if method == "dora" else None)
    tensors = load_file(file)
    stem = "transformer.single_transformer_blocks.2.proj_out"
    halves = {key.removeprefix(f"{stem}.") for key in tensors if key.startswith(f"{stem}.")}
    assert halves == {"lora_A.weight", "lora_B.weight", "alpha"} | ({"dora_scale"} if method == "dora" else set())
    assert tensors[f"{stem}.alpha"] == 6
    kind = "dev" if base == DEV else "schnell"
    assert read_header(file).metadata["modelspec.architecture"] == f"Flux.1-{kind}/lora"
    assert not any(key.startswith("transformer.proj_out") for key in tensors), "the last layer is left alone"
    # One pair for each linear layer of two double and three single blocks.
    assert sum(key.endswith(".lora_A.weight") for key in tensors) == 2 * 12 + 3 * 5


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_diffusers_draws_with_the_finished_adapter_what_our_module_draws(
    method: str, models: Path, cache: Path, tmp_path: Path
) -> None:
    session = make_session(tmp_path / "Sessions" / "dog")
    folder = Path(train(asked(session, models, method=method), cache).facts["finished"])
    base = find_base(DEV, models, cache)
    denoiser = base.load_denoiser()
    ours = adapted(denoiser, TRANSFORMER_LAYERS, rank=4, alpha=6, dora=method == "dora", seed=0)
    trained = load_file(folder / "pytorch_lora_weights.safetensors")
    ours.load({key.removeprefix("transformer."): tensor.float() for key, tensor in trained.items()})
    pipeline = base.load_pipeline()
    (spoken,) = speak(base.training, pipeline, ["zwx"], "cpu", lambda _line: None)
    (drawn,) = sampler.draw(
        base.training,
        pipeline,
        denoiser,
        wanted=[("zwx", 7)],
        embedded={"zwx": spoken},
        batch=1,
        resolution=64,
        guidance=3.5,
        device="cpu",
        should_stop=lambda: False,
    )
    whole = FluxPipeline.from_pretrained(base.folder, dtype=torch.float32, local_files_only=True)
    whole.set_progress_bar_config(disable=True)

    def picture() -> bytes:
        random = [torch.Generator().manual_seed(7)]
        made = whole("zwx", height=64, width=64, num_inference_steps=20, guidance_scale=3.5, generator=random)
        return bytes(made.images[0].tobytes())

    plain = picture()
    whole.load_lora_weights(folder, local_files_only=True)
    whole.transformer.to(torch.float32)  # else it computes in the file's float16
    assert picture() == drawn.tobytes() != plain


def test_a_base_that_memory_does_not_hold_is_taken_hollow(
    models: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = make_session(tmp_path / "Sessions" / "dog")
    made = train(asked(session, models), cache)
    monkeypatch.setattr(adapter_forward, "free_memory", lambda: 1000)
    converted = convert(made, models, cache)
    assert converted.facts["verified"] == "all"
    file, source = Path(converted.outputs[0]), Path(made.facts["finished"])
    base, facts = find_base(DEV, models, cache), read_facts(source)
    stem = "transformer.transformer_blocks.0.attn.to_q"
    for change, what in (
        (lambda tensors: tensors[f"{stem}.lora_B.weight"].view(-1)[-1].add_(1), "does not hold the values"),
        (lambda tensors: tensors[f"{stem}.alpha"].fill_(3), "counts"),
        (lambda tensors: [tensors.pop(key) for key in list(tensors) if key.startswith(stem)], "differ in"),
    ):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, tmp_path / "other.safetensors")
        with pytest.raises(Unproven, match=what):
            adapter_forward.compare_adapters(tmp_path / "other.safetensors", source / ADAPTER_FILE, base, facts)


@pytest.mark.parametrize("method", ["lora", pytest.param("dora", marks=pytest.mark.soak)])
def test_killed_it_ends_with_the_same_bytes(
    method: str, server: ForkServerContext, models: Path, cache: Path, tmp_path: Path
) -> None:
    whole = make_session(tmp_path / "a" / "Sessions" / "dog")
    assert run_child(server, asked(whole, models, method=method, prior=2), cache, None) == [1, 2, 3, 4]
    killed = make_session(tmp_path / "b" / "Sessions" / "dog")
    payload = asked(killed, models, method=method, prior=2)
    assert run_child(server, payload, cache, 2) == [1, 2]
    assert run_child(server, payload, cache, 3)[-1] == 3
    tear(killed / "checkpoints" / "step-2" / "transformer.safetensors")
    assert run_child(server, payload, cache, None)[-1] == 4
    assert finished(killed) == finished(whole)


def with_means(session: Path, **means: Any) -> None:
    """Write other means into a run that was stopped after its first step: it goes by what it wrote down."""
    path = session / "runs" / "r1" / "run.json"
    record = json.loads(path.read_text())
    record["plan"].update(means)
    path.write_text(json.dumps(record))


def adapter_of(session: Path) -> dict[str, torch.Tensor]:
    return load_file(session / ".fastsd" / "finished" / "r1" / ADAPTER_FILE)


def run_with(session: Path, models: Path, cache: Path, *, base: str = DEV, **means: Any) -> dict[str, torch.Tensor]:
    payload = asked(session, models, base=base)
    if base == "miniature":
        payload["spec"] = {**payload["spec"], "resolution": 64}
    with pytest.raises(Stopping):
        train(payload, cache, stop_after=1)
    shutil.rmtree(session / "checkpoints")
    with_means(session, **means)
    train(payload, cache)
    return adapter_of(session)


def test_blocks_that_come_and_go_learn_the_same(models: Path, cache: Path, tmp_path: Path) -> None:
    means: dict[str, dict[str, Any]] = {
        "plain": {"checkpointing": True},
        "moved": {"checkpointing": True, "offload": True},
        "coarse": {"checkpointing": True, "quantised": True},
        "coarse and moved": {"checkpointing": True, "quantised": True, "offload": True},
    }
    made = {
        name: run_with(make_session(tmp_path / name / "Sessions" / "dog"), models, cache, **each)
        for name, each in means.items()
    }
    for one, other in (("plain", "moved"), ("coarse", "coarse and moved")):
        assert made[one].keys() == made[other].keys()
        assert all(torch.equal(made[one][key], made[other][key]) for key in made[one])
    # What is learned on a base in 4 bits is about what is learned on the whole one, and not the same.
    ours, theirs = (
        torch.cat([made[name][key].flatten() for key in made[name] if "lora_B" in key]).float()
        for name in ("coarse", "plain")
    )
    assert not torch.equal(ours, theirs)
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.8


@pytest.mark.parametrize("base", [DEV, pytest.param("miniature", marks=pytest.mark.soak)])
def test_in_half_precision_it_learns_about_the_same_and_shows_it(
    base: str, models: Path, cache: Path, tmp_path: Path
) -> None:
    """As on a GPU: the base in bfloat16, of Flux in 4 bits, the adapter in float32, the VAE in float32."""
    whole = run_with(make_session(tmp_path / "a" / "Sessions" / "dog"), models, cache, base=base)
    session = make_session(tmp_path / "b" / "Sessions" / "dog")
    of_flux = {"quantised": True, "checkpointing": True, "offload": True} if base == DEV else {}
    half = run_with(session, models, cache, base=base, precision="bf16", sample_every=4, **of_flux)
    ours, theirs = (
        torch.cat([made[key].flatten() for key in made if "lora_B" in key]).float() for made in (half, whole)
    )
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.7
    with Image.open(session / "previews" / "samples-step-4.jpg") as shown:
        assert np.asarray(shown).std() > 5


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_more_steps_from_a_finished_adapter(models: Path, cache: Path, tmp_path: Path) -> None:
    """It begins with the factors that the written file holds, under their dotted names."""
    session = make_session(tmp_path / "Sessions" / "dog")
    made = train(asked(session, models), cache)
    former = adapter_of(session)
    file = Path(convert(made, models, cache).outputs[0])
    still = "continue: last\nsample_every: 0\nunet: {steps: 1, learning_rate: 1e-30}\n"
    continued = {"run": "r1", "model": file.name}
    more = train(payload_of(session, still, run="r2", models=str(models), continued=continued), cache)
    after = load_file(Path(more.facts["finished"]) / ADAPTER_FILE)
    assert former.keys() == after.keys()
    assert all(torch.equal(former[key], after[key]) for key in former)


def test_the_loss_goes_down(models: Path, cache: Path, tmp_path: Path) -> None:
    session = make_session(tmp_path / "Sessions" / "dog")
    payload = asked(session, models)
    more = {"unet": {"steps": 40, "learning_rate": 1e-2}, "checkpoint_every": 100, "batch_size": 2}
    payload["spec"] = {**payload["spec"], **more}
    train(payload, cache)
    rows = (session / "runs" / "r1" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(row)["loss"] for row in rows]
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])


def test_a_base_that_memory_cannot_hold_is_refused_before_it_is_read(
    models: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = make_session(tmp_path / "Sessions" / "dog")
    monkeypatch.setattr(room, "free_memory", lambda: 1000)
    with pytest.raises(Refusal, match="of the computer's memory while it is read"):
        train(asked(session, models), cache)
    assert not (session / "runs" / "r1" / "run.json").exists()


def test_one_file_is_a_base_and_a_variant_is_none(models: Path, cache: Path, tmp_path: Path) -> None:
    own = tmp_path / "Models"
    shutil.copytree(models / DEV, own / "mine")
    write_single(own / "mine", own / "mine.safetensors", verify="header")
    base = find_base("mine.safetensors", own, cache)
    assert (base.model.kind, base.training.name) == ("checkpoint", "flux")
    ours, theirs = base.load_denoiser().state_dict(), find_base(DEV, models, cache).load_denoiser().state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)

    for kind, channels, what in (
        ("FluxPipeline", 24, "reads 24 channels"),
        ("FluxFillPipeline", 16, "is a FluxFillPipeline"),
        ("FluxKontextPipeline", 16, "is a FluxKontextPipeline"),
    ):
        for name, key, value in (
            ("transformer/config.json", "in_channels", channels),
            ("model_index.json", "_class_name", kind),
        ):
            document = json.loads((own / "mine" / name).read_text())
            (own / "mine" / name).write_text(json.dumps({**document, key: value}))
        with pytest.raises(Refusal, match=what):
            find_base("mine", own, cache)
