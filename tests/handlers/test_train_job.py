"""The train handler as a whole, on the miniature's classes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from handlers.context import Cancelled, JobContext, JobResult, Waiting
from handlers.convert.adapter import ADAPTER_FILE
from handlers.convert.job import ConvertHandler, convert
from handlers.models import miniature
from handlers.train.job import TrainHandler
from sessions.refusal import Refusal
from tests.handlers.train_session import make_session, payload_of


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    miniature.ensure("miniature", folder)
    return folder


def train(payload: dict[str, Any], cache: Path, cancel_after: int = 10**9) -> tuple[JobResult, list[tuple[float, Any]]]:
    seen: list[tuple[float, Any]] = []
    context = JobContext(
        1,
        "train",
        payload,
        "cpu",
        cache,
        lambda done, _total, _note, facts: seen.append((done, facts)),
        lambda: bool(seen) and "loss" in seen[-1][1] and seen[-1][0] >= cancel_after,
        lambda: False,
    )
    return TrainHandler().run(context), seen


def weights(folder: Path, part: str) -> dict[str, torch.Tensor]:
    stem = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
    return {
        key.removeprefix("text_model."): value
        for key, value in load_file(folder / part / f"{stem}.safetensors").items()
    }


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_a_run_leaves_what_people_and_machines_read(cache: Path, tmp_path: Path) -> None:
    session = make_session(tmp_path / "Sessions" / "dog")
    (session / "zwx (9).png").write_bytes(b"broken")
    spec = "unet: {steps: 6, learning_rate: 1e-3}\ntext_encoder: {steps: 2}\nsample_every: 3\nclass: shape\n"
    payload = payload_of(session, spec)
    result, seen = train(payload, cache)
    facts = result.facts
    assert (facts["run"], facts["state"], facts["steps"], facts["pictures"]) == ("r1", "finished", 8, 3)
    assert [left["source"] for left in facts["left_out"]] == ["zwx (9).png"]
    assert facts["metadata"]["trigger_phrase"] == "zwx shape"
    json.dumps(dict(facts))
    record = json.loads((session / "runs" / "r1" / "run.json").read_text())
    assert (record["state"], record["spec"], record["spec_record"]) == (
        "finished",
        payload["spec"],
        payload["spec_record"],
    )
    assert [entry["source"] for entry in record["inputs"]] == ["zwx (0).png", "zwx (1).png", "zwx (2).png"]
    assert {entry["prompt"] for entry in record["inputs"]} == {"a zwx shape"}, "a miniature knows no photos"
    assert record["libraries"]["torch"] == torch.__version__
    for name in ("loss.png", "samples-step-5.jpg", "samples-step-8.jpg"):
        with Image.open(session / "previews" / name) as picture:
            picture.load()
    assert facts["preview"] == str(session / "previews" / "samples-step-8.jpg")
    steps = [(done, entry) for done, entry in seen if "loss" in entry]
    assert [done for done, _ in steps] == list(range(1, 9))
    assert all(entry["seconds_per_step"] > 0 and entry["eta"] >= 0 for _, entry in steps)
    finished = Path(facts["finished"])
    for path in finished.rglob("*.json"):
        assert str(cache) not in path.read_text(), "a model that travels does not say where its base lay"
    made = convert(finished, tmp_path / "dog.safetensors", verify="forward")
    assert made.pipeline.family == "sd1"
    assert not (session / ".fastsd" / "frozen" / "r1").exists()


def test_each_stage_trains_what_it_should(cache: Path, tmp_path: Path) -> None:
    """Stage 1 keeps the text encoder alone; stage 2 changes the UNet alone; a frozen UNet is another algorithm."""
    base = miniature.folder_of("miniature", cache)
    quick = "sample_every: 0\n"
    specs = {
        "text": quick + "text_encoder: {steps: 3, learning_rate: 1e-3}\nunet: {steps: 0}\n",
        "frozen": quick + "text_encoder: {steps: 3, learning_rate: 1e-3, unet: frozen}\nunet: {steps: 0}\n",
        "unet": quick + "text_encoder: {steps: 0}\nunet: {steps: 3, learning_rate: 1e-3}\n",
    }
    made = {}
    for name, spec in specs.items():
        session = make_session(tmp_path / name / "Sessions" / "dog")
        made[name] = Path(train(payload_of(session, spec), cache)[0].facts["finished"])
        assert same(weights(made[name], "vae"), weights(base, "vae"))
    for name in ("text", "frozen"):
        assert same(weights(made[name], "unet"), weights(base, "unet"))
        assert not same(weights(made[name], "text_encoder"), weights(base, "text_encoder"))
    assert not same(weights(made["text"], "text_encoder"), weights(made["frozen"], "text_encoder"))
    assert same(weights(made["unet"], "text_encoder"), weights(base, "text_encoder"))
    assert not same(weights(made["unet"], "unet"), weights(base, "unet"))


def test_the_miniature_of_sd2_trains_and_becomes_one_file(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    session = make_session(tmp_path / "Sessions" / "dog")
    spec = "base: miniature-sd2\ntext_encoder: {steps: 2}\nunet: {steps: 2, learning_rate: 1e-3}\nsample_every: 2\n"
    spec += "prompts: [zwx]\n"
    result, _ = train(payload_of(session, spec, base="miniature-sd2"), cache)
    finished = Path(result.facts["finished"])
    base = miniature.folder_of("miniature-sd2", cache)
    for part in ("unet", "text_encoder"):
        assert not same(weights(finished, part), weights(base, part))
    made = convert(finished, session / "dog.safetensors", verify="forward")
    assert (made.pipeline.family, made.pipeline.prediction) == ("sd2", "v")


def test_the_miniature_of_sdxl_trains_both_encoders_and_becomes_one_file(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    session = make_session(tmp_path / "Sessions" / "dog")
    spec = "base: miniature-sdxl\ntext_encoder: {steps: 2}\nunet: {steps: 2, learning_rate: 1e-3}\nsample_every: 2\n"
    spec += "prompts: [zwx]\n"
    spec += "prior: {images: 3}\n"
    result, _ = train(payload_of(session, spec, base="miniature-sdxl"), cache)
    finished = Path(result.facts["finished"])
    base = miniature.folder_of("miniature-sdxl", cache)
    for part in ("unet", "text_encoder", "text_encoder_2"):
        assert not same(weights(finished, part), weights(base, part))
    assert same(weights(finished, "vae"), weights(base, "vae"))
    assert (session / "previews" / "samples-step-4.jpg").is_file()
    made = convert(finished, session / "dog.safetensors", verify="forward")
    assert (made.pipeline.family, made.pipeline.prediction) == ("sdxl", "epsilon")


@pytest.mark.parametrize(
    ("name", "method"), [("miniature-sdxl", "lora"), pytest.param("miniature", "dora", marks=pytest.mark.soak)]
)
# diffusers hands a torch tensor to numpy the old way.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_an_adapter_draws_in_diffusers_as_it_was_trained(name: str, method: str, cache: Path, tmp_path: Path) -> None:
    folder = miniature.ensure(name, cache)
    before = {part: weights(folder, part) for part in ("unet", "text_encoder")}
    session = make_session(tmp_path / "Sessions" / "dog")
    spec = f"method: {method}\nlora: {{rank: 4, alpha: 8}}\ntext_encoder: {{steps: 3}}\nunet: {{steps: 4}}\n"
    result, seen = train(payload_of(session, spec + "sample_every: 2\nprompts: [zwx]\n", base=name), cache)
    assert result.facts["steps"] == len([entry for _, entry in seen if "loss" in entry]) == 4
    for part, tensors in before.items():
        assert same(tensors, weights(folder, part)), "the base stays as it is"
    finished = Path(result.facts["finished"])
    assert json.loads((finished / "adapter.json").read_text())["rank"] == 4
    with safe_open(finished / ADAPTER_FILE, "pt") as file:
        assert str(cache) not in str(file.metadata()), "an adapter that travels does not say where its base lay"
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    prompt = {"prompt": "a zwx triangle", "num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np"}

    def drawn() -> Any:
        generator = torch.Generator().manual_seed(3)
        return pipeline(**prompt, width=64, height=64, generator=generator).images[0]

    plain = drawn()
    pipeline.load_lora_weights(finished)
    taught = drawn()
    assert abs(taught - plain).max() > 0.01
    # What diffusers reads counts as it was trained: alpha / rank twice, of both modules.
    adapters = pipeline.unet.peft_config
    [config] = adapters.values()
    assert (config.r, config.lora_alpha, config.use_dora) == (4, 8, method == "dora")
    assert pipeline.text_encoder.peft_config


@pytest.mark.parametrize(("steps", "encoder_changes"), [(0, False), (3, True)])
def test_fine_tuning_trains_both_together(steps: int, encoder_changes: bool, cache: Path, tmp_path: Path) -> None:
    session = make_session(tmp_path / "Sessions" / "dog")
    spec = f"text_encoder: {{steps: {steps}, learning_rate: 1e-3}}\nunet: {{steps: 4}}\nsample_every: 0\n"
    spec += "method: finetune\n"
    result, _ = train(payload_of(session, spec), cache)
    finished, base = Path(result.facts["finished"]), miniature.folder_of("miniature", cache)
    assert result.facts["steps"] == 4
    assert not same(weights(finished, "unet"), weights(base, "unet"))
    assert same(weights(finished, "text_encoder"), weights(base, "text_encoder")) is not encoder_changes


def test_more_steps_from_a_finished_run(cache: Path, tmp_path: Path) -> None:
    """It begins with the finished weights, and what train.yaml leaves open is as it was."""
    session = make_session(tmp_path / "Sessions" / "dog")
    spec = "instance: qqq\nclass: shape\nsample_every: 0\nunet: {steps: 3, learning_rate: 1e-3}\n"
    first, _ = train(payload_of(session, spec + "text_encoder: {steps: 2, learning_rate: 1e-3}\n"), cache)
    finished = Path(first.facts["finished"])
    file = session / "dog-r1.safetensors"
    convert(finished, file)
    former = {part: weights(finished, part) for part in ("unet", "text_encoder", "vae")}
    shutil.rmtree(finished)
    continued = {"run": "r1", "model": file.name}
    still = "continue: last\nsample_every: 0\nunet: {steps: 1, learning_rate: 1e-30}\n"
    second, _ = train(payload_of(session, still, run="r2", continued=continued), cache)
    for part, tensors in former.items():
        assert same(weights(Path(second.facts["finished"]), part), tensors)
    record = json.loads((session / "runs" / "r2" / "run.json").read_text())
    plan = record["plan"]
    assert (plan["instance"], plan["class_"], plan["text_encoder_steps"]) == ("qqq", "shape", 0)
    assert record["continued"] == continued
    more, _ = train(payload_of(session, still.replace("1e-30", "1e-3"), run="r3", continued=continued), cache)
    assert not same(weights(Path(more.facts["finished"]), "unet"), former["unet"])
    file.unlink()
    with pytest.raises(Refusal, match=r"dog-r1\.safetensors is gone"):
        train(payload_of(session, still, run="r4", continued=continued), cache)


def test_an_inpainting_base_is_refused(cache: Path, tmp_path: Path) -> None:
    models = tmp_path / "Models"
    shutil.copytree(miniature.folder_of("miniature", cache), models / "painter")
    config = models / "painter" / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "in_channels": 9}))
    session = make_session(tmp_path / "Sessions" / "dog")
    with pytest.raises(Refusal, match=r"reads 9 channels.*inpainting"):
        train({**payload_of(session, "", base="painter"), "models": str(models)}, cache)


def test_it_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From random weights, so that the loss begins at that of a model that knows nothing."""
    monkeypatch.setattr(miniature, "shipped", lambda _name: None)
    cache = tmp_path / "cache"
    session = make_session(tmp_path / "Sessions" / "dog")
    spec = "text_encoder: {steps: 0}\nunet: {steps: 40, learning_rate: 2e-3}\nsample_every: 0\nbatch_size: 2\n"
    train(payload_of(session, spec), cache)
    rows = [json.loads(line) for line in (session / "runs" / "r1" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows]
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    assert rows[0]["learning_rate"] == 2e-3
    assert rows[-1]["learning_rate"] == pytest.approx(2e-3 / 40)


def test_a_diverging_run_stops_and_says_so(cache: Path, tmp_path: Path) -> None:
    session = make_session(tmp_path / "Sessions" / "dog")
    spec = "text_encoder: {steps: 0}\nunet: {steps: 60, learning_rate: 0.99}\nsample_every: 0\nschedule: constant\n"
    broken = make_base_with_a_hole(miniature.folder_of("miniature", cache), tmp_path / "Models" / "broken")
    with pytest.raises(Refusal, match="diverged") as caught:
        train(payload_of(session, spec + "resolution: 256\n", base="broken", models=str(broken.parent)), cache)
    assert caught.value.code == "diverged"
    assert "learning_rate" in caught.value.advice
    record = json.loads((session / "runs" / "r1" / "run.json").read_text())
    assert record["state"] == "failed"
    assert "diverged" in record["reason"]
    assert not (session / ".fastsd" / "finished").exists()


def make_base_with_a_hole(base: Path, to: Path) -> Path:
    """A base whose UNet computes NaN: what a VAE or UNet in half precision does to a training."""
    from safetensors.torch import save_file

    shutil.copytree(base, to)
    path = to / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_out.bias"][0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    return to


def test_a_cancelled_run_is_cleaned_up(cache: Path, tmp_path: Path) -> None:
    session = make_session(tmp_path / "Sessions" / "dog")
    spec = "text_encoder: {steps: 2}\nunet: {steps: 6}\ncheckpoint_every: 1\nsample_every: 0\n"
    with pytest.raises(Cancelled):
        train(payload_of(session, spec), cache, cancel_after=4)
    assert list((session / "checkpoints").iterdir()) == []
    assert not (session / ".fastsd" / "frozen" / "r1").exists()
    assert json.loads((session / "runs" / "r1" / "run.json").read_text())["state"] == "cancelled"


def test_a_deleted_session_ends_its_run(cache: Path, tmp_path: Path) -> None:
    session = make_session(tmp_path / "Sessions" / "dog")
    spec = "text_encoder: {steps: 0}\nunet: {steps: 6}\ncheckpoint_every: 1\nsample_every: 0\n"

    def report(done: float, _total: float, _note: str, facts: Any) -> None:
        if "loss" in facts and session.exists():
            shutil.rmtree(session)

    context = JobContext(1, "train", payload_of(session, spec), "cpu", cache, report, lambda: False, lambda: False)
    with pytest.raises(Cancelled):
        TrainHandler().run(context)
    assert not session.exists()


def test_refused_before_anything_is_written(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = make_session(tmp_path / "Sessions" / "dog")
    before = sorted(session.rglob("*"))
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000_000))
        with pytest.raises(Refusal, match=r"needs 0\.\d\d GB of disk .* 0\.01 GB are free"):
            train(payload_of(session, ""), cache)
    reserve = usage.free
    with pytest.raises(Refusal, match="must stay free"):
        train(payload_of(session, "", disk_reserve=reserve), cache)
    with pytest.raises(Waiting, match="fastsd models get sd15"):
        train(payload_of(session, "", base="sd15"), cache)
    with pytest.raises(Refusal, match="known"):
        train(payload_of(session, "", base="nothing"), cache)
    with pytest.raises(Refusal, match="GPU"):
        train(payload_of(session, "precision: fp16"), cache)
    (session / "zwx (0).png").unlink()
    before.remove(session / "zwx (0).png")
    with pytest.raises(Refusal, match="2 readable pictures"):
        train(payload_of(session, ""), cache)
    assert sorted(session.rglob("*")) == before


@pytest.mark.parametrize(("name", "resolution"), [("miniature", 256), ("miniature-sd2", 256), ("miniature-sdxl", 512)])
def test_a_single_file_as_base(name: str, resolution: int, cache: Path, tmp_path: Path) -> None:
    models = tmp_path / "Models"
    models.mkdir()
    convert(miniature.ensure(name, cache), models / "mine.safetensors")
    session = make_session(tmp_path / "Sessions" / "dog")
    spec = f"resolution: {resolution}\nmethod: dreambooth\nsample_every: 0\n"
    spec += "text_encoder: {steps: 1}\nunet: {steps: 1}\n"
    result, _ = train(payload_of(session, spec, base="mine", models=str(models)), cache)
    finished = Path(result.facts["finished"])
    for part in ("unet", "vae", "text_encoder"):
        assert {tensor.dtype for tensor in weights(finished, part).values()} == {torch.float16}
    convert(finished, tmp_path / "dog.safetensors", verify="forward")
    [unpacked] = (cache / "bases").glob("mine-*")
    shutil.rmtree(unpacked)


@pytest.mark.parametrize("method", ["lora", pytest.param("dora", marks=pytest.mark.soak)])
def test_more_steps_from_a_finished_adapter(method: str, cache: Path, tmp_path: Path) -> None:
    """It begins with the finished factors, those of the text encoder as well, which are not trained on."""
    session = make_session(tmp_path / "Sessions" / "dog")
    spec = f"method: {method}\nlora: {{rank: 3, alpha: 6}}\ninstance: qqq\nclass: shape\nsample_every: 0\n"
    spec += "text_encoder: {steps: 2, learning_rate: 1e-3}\nunet: {steps: 2, learning_rate: 1e-3}\n"
    first, _ = train(payload_of(session, spec), cache)
    finished = Path(first.facts["finished"])
    former = load_file(finished / ADAPTER_FILE)
    file = session / "dog-r1.safetensors"
    payload: dict[str, Any] = {"source": str(finished), "output": str(file), "dtype": None, "metadata": {}, "run": "r1"}
    ConvertHandler().run(JobContext(1, "convert", payload, "cpu", cache, lambda *_: None, lambda: False, lambda: False))
    shutil.rmtree(finished)
    continued = {"run": "r1", "model": file.name}
    still = "continue: last\nsample_every: 0\nunet: {steps: 1, learning_rate: 1e-30}\n"
    second, _ = train(payload_of(session, still, run="r2", continued=continued), cache)
    same_as = load_file(Path(second.facts["finished"]) / ADAPTER_FILE)
    assert former.keys() == same_as.keys()
    assert any(key.startswith("text_encoder.") for key in former)
    assert all(torch.allclose(former[key], same_as[key], rtol=0, atol=1e-20) for key in former)
    more, _ = train(payload_of(session, still.replace("1e-30", "1e-3"), run="r3", continued=continued), cache)
    changed = load_file(Path(more.facts["finished"]) / ADAPTER_FILE)
    assert any(not torch.equal(former[key], changed[key]) for key in former if key.startswith("unet."))
    assert all(torch.equal(former[key], changed[key]) for key in former if key.startswith("text_encoder."))
    for other in ("lora: {rank: 5}\n", "method: dreambooth\n"):
        with pytest.raises(Refusal, match=r"of rank 3 and alpha 6, and .* asks for another"):
            train(payload_of(session, still + other, run="r4", continued=continued), cache)


def test_more_steps_from_an_old_sessions_model(cache: Path, tmp_path: Path) -> None:
    """A pickled file of another program, in the session: its weights, and all else as train.yaml says."""
    session = make_session(tmp_path / "Sessions" / "dog")
    base = miniature.folder_of("miniature", cache)
    convert(base, session / "dog.ckpt")
    spec = "continue: last\nsample_every: 0\ninstance: qqq\nunet: {steps: 1, learning_rate: 1e-30}\nresolution: 256\n"
    continued = {"run": "", "model": "dog.ckpt"}
    done, _ = train(payload_of(session, spec, continued=continued), cache)
    for part in ("unet", "text_encoder", "vae"):
        assert same(weights(Path(done.facts["finished"]), part), weights(base, part))
    plan = json.loads((session / "runs" / "r1" / "run.json").read_text())["plan"]
    assert (plan["instance"], plan["text_encoder_steps"], plan["base"]) == ("qqq", 0, "dog")
