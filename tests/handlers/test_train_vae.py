"""Another VAE: what it encodes is what is trained on, and it is what the finished model contains."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from handlers.context import JobContext, Stopping, Waiting
from handlers.convert.job import convert
from handlers.models import miniature, registry
from handlers.train.job import TrainHandler
from sessions.refusal import Refusal
from tests.handlers.train_process import weights_of
from tests.handlers.train_session import make_session, payload_of

SPEC = """
text_encoder: {steps: 0}
unet: {steps: 3, learning_rate: 1e-3}
sample_every: 0
checkpoint_every: 1
instance: zwx
batch_size: 1
"""
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def models(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Models folder: the miniature's VAE with other weights, as a folder and as one file of the original names."""
    models = tmp_path_factory.mktemp("tree") / "Models"
    base = miniature.ensure("miniature", cache)
    shutil.copytree(base, models / "whole")
    own = models / "whole" / "vae" / WEIGHTS
    generator = torch.Generator().manual_seed(3)
    tensors = {
        name: tensor + 0.01 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        for name, tensor in load_file(own).items()
    }
    save_file(tensors, own, metadata={"format": "pt"})
    shutil.copytree(models / "whole" / "vae", models / "other")
    convert(models / "whole", models / "whole.safetensors")
    single = load_file(models / "whole.safetensors")
    prefix = "first_stage_model."
    bare = {name.removeprefix(prefix): value for name, value in single.items() if name.startswith(prefix)}
    save_file(bare, models / "single.safetensors")
    shutil.rmtree(models / "whole")
    (models / "whole.safetensors").unlink()
    return models


def train(session: Path, cache: Path, spec: str, models: Path, stop_after: int = 10**9) -> Path:
    steps = [0.0]
    context = JobContext(
        1,
        "train",
        payload_of(session, spec, models=str(models)),
        "cpu",
        cache,
        lambda done, _total, _note, facts: steps.append(done) if "loss" in facts else None,
        lambda: False,
        lambda: steps[-1] >= stop_after,
    )
    return Path(TrainHandler().run(context).facts["finished"])


def latents(session: Path) -> torch.Tensor:
    [file] = (session / ".fastsd" / "frozen" / "r1").glob("*.safetensors")
    return load_file(file)["mean"]


def test_it_encodes_it_is_in_the_result_and_a_resumed_run_ends_the_same(
    models: Path, cache: Path, tmp_path: Path
) -> None:
    session = make_session(tmp_path / "one" / "Sessions" / "dog")
    with pytest.raises(Stopping):
        train(session, cache, SPEC + "vae: other\n", models, stop_after=1)
    mine = latents(session)
    record = json.loads((session / "runs" / "r1" / "run.json").read_text())
    assert record["plan"]["vae"] == record["vae"]["name"] == "other"
    # Lost latents are encoded again, with the same VAE.
    shutil.rmtree(session / ".fastsd" / "frozen")
    finished = train(session, cache, SPEC + "vae: other\n", models)
    have, want = load_file(finished / "vae" / WEIGHTS), load_file(models / "other" / WEIGHTS)
    assert have.keys() == want.keys()
    assert all(torch.equal(have[name], want[name]) for name in want)
    assert all(have[name].dtype == want[name].dtype for name in want)

    # One file of the original names holds the same VAE: the same latents, the same weights, in one go.
    single = make_session(tmp_path / "two" / "Sessions" / "dog")
    assert weights_of(train(single, cache, SPEC + "vae: Models/single.safetensors\n", models)) == weights_of(finished)
    of_single = json.loads((single / "runs" / "r1" / "run.json").read_text())
    assert of_single["frozen"] == record["frozen"]
    assert of_single["vae"]["sha256"] == record["vae"]["sha256"]

    own = make_session(tmp_path / "three" / "Sessions" / "dog")
    with pytest.raises(Stopping):
        train(own, cache, SPEC, models, stop_after=1)
    difference = (latents(own) - mine).abs().mean() / mine.abs().mean()
    assert difference > 0.01
    assert "vae" not in json.loads((own / "runs" / "r1" / "run.json").read_text())
    convert(finished, tmp_path / "dog.safetensors", verify="forward")


def test_a_run_goes_on_only_with_the_vae_that_it_began_with(models: Path, cache: Path, tmp_path: Path) -> None:
    session = make_session(tmp_path / "Sessions" / "dog")
    mine = tmp_path / "Models"
    shutil.copytree(models, mine)
    with pytest.raises(Stopping):
        train(session, cache, SPEC + "vae: other\n", mine, stop_after=1)
    tensors = load_file(mine / "other" / WEIGHTS)
    tensors["quant_conv.bias"] += 1
    save_file(tensors, mine / "other" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(Refusal, match="The VAE other is another one than the run began with"):
        train(session, cache, SPEC + "vae: other\n", mine)
    shutil.rmtree(mine / "other")
    shutil.copytree(models / "other", mine / "other")
    train(session, cache, SPEC + "vae: other\n", mine)


def change(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def test_what_is_not_for_this_base_is_refused_and_what_is_missing_waits(
    models: Path, cache: Path, tmp_path: Path
) -> None:
    session = make_session(tmp_path / "Sessions" / "dog")
    mine = tmp_path / "Models"
    for name in ("scaled", "narrow", "deep"):
        shutil.copytree(models / "other", mine / name)
    change(mine / "scaled", scaling_factor=0.13025)
    tensors = load_file(mine / "narrow" / WEIGHTS)
    tensors["decoder.conv_out.bias"] = tensors["decoder.conv_out.bias"][:2].clone()
    save_file(tensors, mine / "narrow" / WEIGHTS)
    tensors = load_file(mine / "deep" / WEIGHTS)
    tensors["decoder.conv_in.weight"] = tensors["decoder.conv_in.weight"].repeat(1, 4, 1, 1)
    save_file(tensors, mine / "deep" / WEIGHTS)
    for name, what in (
        ("scaled", "scales its latents by 0.13025 where miniature knows them by 0.18215"),
        ("narrow", r"differs in shape from that of miniature, in decoder\.conv_out\.bias"),
        ("deep", "has 16 latent channels where miniature draws 4"),
        ("nothing", "No VAE called 'nothing' is known"),
    ):
        with pytest.raises(Refusal, match=what):
            train(session, cache, f"{SPEC}vae: {name}\n", mine)
    with pytest.raises(Waiting, match="fastsd models get sd-vae-ft-mse"):
        train(session, cache, SPEC + "vae: sd-vae-ft-mse\n", mine)
    with pytest.raises(Refusal, match="is a vae"):
        registry.check("scaled", "checkpoint", mine, cache)
    assert not (session / "runs").exists(), "refused before anything is written"
