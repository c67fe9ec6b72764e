"""Every family, both ways: the same tensors, the same outputs, the same picture."""

from __future__ import annotations

import inspect as python_inspect
import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.loaders import single_file_model, single_file_utils
from safetensors.torch import load_file, save_file

from handlers.context import JobContext
from handlers.convert.ask import Verify
from handlers.convert.families import FAMILIES
from handlers.convert.folder import convert_single
from handlers.convert.forward import compare_forward
from handlers.convert.job import ConvertHandler
from handlers.convert.quiet import quiet_libraries
from handlers.convert.single import convert, prove, read_folder
from handlers.convert.verify import Unproven
from handlers.models.inspect import inspect
from sessions import files
from sessions.refusal import Refusal
from tests.handlers import convert_models


@pytest.fixture(autouse=True, scope="module")
def tiny_flux() -> Iterator[None]:
    """diffusers' reader of Flux knows one width, 3072: the same reader for the tiny one's, nothing else changed."""
    original = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers
    text = python_inspect.getsource(original)
    assert text.count("inner_dim = 3072") == 1
    scope = dict(vars(single_file_utils))
    exec(text.replace("inner_dim = 3072", f"inner_dim = {convert_models.FLUX_WIDTH}"), scope)  # noqa: S102 - diffusers' own code
    entry = single_file_model.SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    entry["checkpoint_mapping_fn"] = scope[original.__name__]
    yield
    entry["checkpoint_mapping_fn"] = original


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    top = tmp_path_factory.mktemp("families")
    quiet_libraries()

    def get(family: str) -> Path:
        place = top / family
        return place if place.exists() else convert_models.build(family, place)

    return get


@pytest.fixture(scope="module")
def singles(folders: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    top = tmp_path_factory.mktemp("singles")

    def get(family: str) -> Path:
        place = top / f"{family}.safetensors"
        if not place.exists():
            convert(folders(family), place, verify="header")
        return place

    return get


def family_of(name: str) -> Any:
    return FAMILIES[name.removesuffix("-inpainting")]


def same_tensors(left: Path, right: Path) -> None:
    have, want = load_file(left), load_file(right)
    assert have.keys() == want.keys()
    assert all(torch.equal(have[key], want[key]) for key in want)


@pytest.mark.parametrize("name", convert_models.FAMILIES)
def test_diffusers_reads_the_same_model(folders: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    made = convert(folders(name), tmp_path / "m.safetensors", verify="forward")
    assert made.pipeline.family == family_of(name).name
    found = inspect(made.output)
    assert (found.kind, found.problems) == ("checkpoint", [])
    assert found.family == name.split("-", maxsplit=1)[0]
    assert found.prediction == {"sd2": "v", "flux": "flow"}.get(name, "epsilon")
    assert found.variant == (name.partition("-")[2] or "base")
    assert made.pipeline.spoken == (found.family, found.variant)


@pytest.mark.parametrize("name", convert_models.FAMILIES)
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_single_to_diffusers_to_single_is_identical(
    folders: Callable[[str], Path], singles: Callable[[str], Path], tmp_path: Path, name: str, suffix: str
) -> None:
    first = singles(name)
    if suffix == ".ckpt":
        first = convert(folders(name), tmp_path / "first.ckpt", verify="all").output
    like = folders(name)
    made = convert_single(first, tmp_path / "folder", cache=tmp_path, like=like, verify="all")
    assert made.pipeline.family == family_of(name).name
    second = convert(tmp_path / "folder", tmp_path / "second.safetensors", verify="all").output
    same_tensors(second, singles(name))


def picture(pipeline: Any, name: str) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()  # diffusers leaves T5 in training, where it drops values at random
            for parameter in part.parameters():
                # Where a weight lies in memory decides which kernel multiplies it: give all fresh places.
                parameter.data = parameter.data.clone()
    settings: dict[str, Any] = {
        "prompt": "a red circle",
        "num_inference_steps": 2,
        "generator": torch.Generator().manual_seed(1),
        "output_type": "np",
    }
    if name == "flux":
        settings |= {"height": 64, "width": 64, "max_sequence_length": 16}
    elif name == "sdxl-refiner":
        settings |= {"image": torch.zeros(1, 3, 64, 64), "strength": 1.0}
    elif name == "sd1-inpainting":
        settings |= {"image": torch.zeros(1, 3, 64, 64), "mask_image": torch.ones(1, 1, 64, 64)}
        settings |= {"height": 64, "width": 64}
    else:
        settings |= {"height": 64, "width": 64}
    return pipeline(**settings).images[0]


def loaded(load: Any, *arguments: Any, **settings: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load(*arguments, local_files_only=True, **settings)


@pytest.mark.parametrize("name", convert_models.FAMILIES)
def test_from_single_file_draws_the_identical_picture(
    folders: Callable[[str], Path], singles: Callable[[str], Path], name: str
) -> None:
    folder, single = folders(name), singles(name)
    kind = getattr(diffusers, json.loads((folder / "model_index.json").read_bytes())["_class_name"])
    absent = {"safety_checker": None} if name in ("sd1", "sd2", "sd1-inpainting") else {}
    if name == "sdxl-refiner":
        absent = {"text_encoder": None, "tokenizer": None}
    ours = loaded(kind.from_single_file, str(single), config=str(folder), **absent)
    theirs = loaded(kind.from_pretrained, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        have, want = picture(ours, name), picture(theirs, name)
    assert np.isfinite(want).all()
    assert np.array_equal(have, want)
    assert want.std() > 0


def swap_halves(tensors: dict[str, Any]) -> None:
    name = "model.diffusion_model.final_layer.adaLN_modulation.1.weight"
    tensors[name] = torch.cat(tensors[name].chunk(2)[::-1])


def swap_q_and_k(tensors: dict[str, Any]) -> None:
    name = next(name for name in tensors if name.endswith(("attn.in_proj_weight", "img_attn.qkv.weight")))
    q, k, v = tensors[name].chunk(3)
    tensors[name] = torch.cat([k, q, v])


def turn_the_projection(tensors: dict[str, Any]) -> None:
    name = "conditioner.embedders.1.model.text_projection"
    tensors[name] = tensors[name].T.contiguous()


def zero_the_encoder(tensors: dict[str, Any]) -> None:
    for name, tensor in tensors.items():
        if name.startswith(("conditioner.embedders.0", "text_encoders.clip_l", "cond_stage_model")):
            tensors[name] = torch.zeros_like(tensor)


def drop_a_part(tensors: dict[str, Any]) -> None:
    del tensors[next(name for name in tensors if name.endswith(("attn.in_proj_bias", "img_attn.qkv.bias")))]


MUTATIONS = [
    ("flux", swap_halves),
    *((name, change) for name in ("sd2", "sdxl", "flux") for change in (swap_q_and_k, zero_the_encoder, drop_a_part)),
    ("sdxl", turn_the_projection),
]


@pytest.mark.parametrize(("name", "mutate"), MUTATIONS, ids=lambda value: getattr(value, "__name__", value))
def test_mutations_are_caught_by_reading_and_by_loading(
    folders: Callable[[str], Path],
    singles: Callable[[str], Path],
    tmp_path: Path,
    name: str,
    mutate: Callable[[dict[str, Any]], None],
) -> None:
    family, folder, broken = FAMILIES[name], folders(name), tmp_path / "m.safetensors"
    tensors = load_file(singles(name))
    mutate(tensors)
    save_file(tensors, broken, metadata={"format": "pt"})
    with pytest.raises(Unproven):
        prove(broken, family, read_folder(folder, family), "sample")
    with pytest.raises(Unproven):
        compare_forward(broken, folder, family)


def test_the_second_layout_of_sd2s_file_has_what_webuis_look_for(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    made = convert(folders("sd2"), tmp_path / "m.safetensors")
    assert made.beside == (tmp_path / "m.yaml",)
    assert 'parameterization: "v"' in (tmp_path / "m.yaml").read_text()
    tensors = load_file(made.output)
    source = load_file(folders("sd2") / "text_encoder" / "model.safetensors")
    layer = "encoder.layers.1.self_attn"
    packed = torch.cat([source[f"{layer}.{part}_proj.weight"] for part in "qkv"])
    assert torch.equal(tensors["cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight"], packed)


def test_v_prediction_of_sdxl_is_marked(folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(folders("sdxl"), folder)
    path = folder / "scheduler" / "scheduler_config.json"
    more = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
    made = convert(folder, tmp_path / "m.safetensors", verify="all")
    assert {"v_pred", "ztsnr"} <= load_file(made.output).keys()
    assert inspect(made.output).prediction == "v"
    again = convert_single(made.output, tmp_path / "again", cache=tmp_path, like=folder, verify="all")
    assert (again.pipeline.prediction, again.pipeline.zero_snr) == ("v", True)


def test_the_familys_own_configuration_is_refused_where_the_shapes_are_others(
    singles: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(Refusal, match="block_out_channels"):
        convert_single(singles("sd1"), tmp_path / "out", cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_a_file_lacks_is_lent_or_named(
    folders: Callable[[str], Path], singles: Callable[[str], Path], tmp_path: Path
) -> None:
    pruned = tmp_path / "pruned.safetensors"
    tensors = {
        name: tensor for name, tensor in load_file(singles("sd1")).items() if not name.startswith("first_stage_model.")
    }
    save_file(tensors, pruned)
    with pytest.raises(Refusal, match=r"no vae.*sd15.*fastsd models get sd15"):
        convert_single(pruned, tmp_path / "out", cache=tmp_path, like=folders("sd1"))
    shutil.copytree(folders("sd1"), tmp_path / "models" / "sd15")
    convert_single(pruned, tmp_path / "out", cache=tmp_path, like=folders("sd1"), verify="all")
    lent = tmp_path / "out" / "vae" / "diffusion_pytorch_model.safetensors"
    same_tensors(lent, folders("sd1") / "vae" / "diffusion_pytorch_model.safetensors")


def test_schedules_and_averages_of_a_training(
    folders: Callable[[str], Path], singles: Callable[[str], Path], tmp_path: Path
) -> None:
    fat = tmp_path / "fat.safetensors"
    tensors = load_file(singles("sd1"))
    unet = {name: tensor for name, tensor in tensors.items() if name.startswith("model.diffusion_model.")}
    averages = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): tensor + 1 for name, tensor in unet.items()
    }
    more = {"betas": torch.zeros(1000), "sqrt_alphas_cumprod": torch.zeros(1000), "model_ema.decay": torch.zeros(1)}
    save_file({**tensors, **averages, **more}, fat)
    for weights, shift in (("trained", 0), ("ema", 1)):
        convert_single(
            fat,
            tmp_path / weights,
            cache=tmp_path,
            like=folders("sd1"),
            weights="ema" if weights == "ema" else "trained",
            verify="all",
        )
        have = load_file(tmp_path / weights / "unet" / "diffusion_pytorch_model.safetensors")
        want = load_file(folders("sd1") / "unet" / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(have[key], want[key] + shift) for key in want)


@pytest.mark.parametrize("change", ["alien", "lora", "torn"])
def test_what_is_no_checkpoint_is_refused(singles: Callable[[str], Path], tmp_path: Path, change: str) -> None:
    path = tmp_path / "m.safetensors"
    tensors = load_file(singles("sd1"))
    if change == "alien":
        tensors["model.diffusion_model.unheard.weight"] = torch.zeros(2)
    elif change == "lora":
        tensors = {"lora_unet_x.lora_down.weight": torch.zeros(2, 2)}
    save_file(tensors, path)
    if change == "torn":
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - 100)
    with pytest.raises(Refusal, match={"alien": "unheard", "lora": "a lora", "torn": "missing"}[change]):
        convert_single(path, tmp_path / "out", cache=tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.safetensors"]


def test_neither_way_of_copying_imports_torch(folders: Callable[[str], Path], tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from handlers.convert.job import convert, convert_single;"
        "source, there, back = map(Path, sys.argv[1:]);"
        "convert(source, there, verify='all'); convert_single(there, back, cache=back, like=source, verify='all');"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    there, back = tmp_path / "m.ckpt", tmp_path / "back"
    subprocess.run([sys.executable, "-c", program, str(folders("sd1")), str(there), str(back)], check=True)


_LIMITED = """
import resource, signal, sys
from pathlib import Path
from handlers.convert.job import convert, convert_single
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))
source, target, like = map(Path, sys.argv[1:])
try:
    if source.is_dir():
        convert(source, target)
    else:
        convert_single(source, target, cache=target.parent, like=like)
except OSError as error:
    print(error.strerror)
"""


@pytest.mark.parametrize("target", ["m.safetensors", "m.ckpt", "folder"])
def test_a_write_that_fails_half_way_leaves_nothing(
    folders: Callable[[str], Path], singles: Callable[[str], Path], tmp_path: Path, target: str
) -> None:
    source = singles("sd1") if target == "folder" else folders("sd1")
    command = [sys.executable, "-c", _LIMITED, str(source), str(tmp_path / target), str(folders("sd1"))]
    told = subprocess.run(command, capture_output=True, check=True, text=True)
    assert told.stdout.strip() == "File too large"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["pipeline", "folder", "diffusers file", "original file"])
def test_another_vae_is_put_in(
    folders: Callable[[str], Path], singles: Callable[[str], Path], tmp_path: Path, form: str
) -> None:
    own, other = singles("sd1"), tmp_path / "other"
    shutil.copytree(folders("sd1"), other)
    weights = other / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights)
    want = load_file(convert(other, tmp_path / "other.safetensors").output)
    vae = {"pipeline": other, "folder": other / "vae", "diffusers file": weights}.get(
        form, tmp_path / "vae.safetensors"
    )
    if form == "original file":
        prefix = "first_stage_model."
        save_file({name.removeprefix(prefix): value for name, value in want.items() if name.startswith(prefix)}, vae)
    verify: Verify = "forward" if form == "folder" else "all"
    have = load_file(convert(folders("sd1"), tmp_path / "m.safetensors", vae=vae, verify=verify).output)
    assert have.keys() == want.keys()
    assert all(torch.equal(have[name], want[name]) for name in want)
    assert not torch.equal(
        have["first_stage_model.quant_conv.bias"], load_file(own)["first_stage_model.quant_conv.bias"]
    )


def test_the_vae_may_be_left_out_and_one_of_another_shape_is_refused(
    folders: Callable[[str], Path], singles: Callable[[str], Path], tmp_path: Path
) -> None:
    made = convert(folders("sd2"), tmp_path / "m.safetensors", vae="none", verify="forward")
    left = {name for name in load_file(singles("sd2")) if not name.startswith("first_stage_model.")}
    assert load_file(made.output).keys() == left
    assert inspect(made.output).problems == ["It has no VAE."]
    with pytest.raises(Refusal, match="differs from the model's own VAE"):
        convert(folders("sd1"), tmp_path / "n.safetensors", vae=folders("flux"))
    with pytest.raises(Refusal, match="no VAE of this family"):
        convert(folders("sd1"), tmp_path / "n.safetensors", vae=singles("sd1"))


_PAUSED = """
import sys
from pathlib import Path
from handlers.convert.job import convert_single
def progress(done, total, note):
    if done > total // 2:
        print(note, flush=True)
        sys.stdin.readline()
source, target, like = map(Path, sys.argv[1:])
convert_single(source, target, cache=target.parent, like=like, progress=progress)
"""


def test_killed_mid_write_no_folder_exists_and_the_handler_tries_again(
    folders: Callable[[str], Path], singles: Callable[[str], Path], tmp_path: Path
) -> None:
    target, like = tmp_path / "folder", folders("sd2")
    command = [sys.executable, "-c", _PAUSED, str(singles("sd2")), str(target), str(like)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout
    with process:
        assert process.stdout.readline() == b"writing\n"
        process.kill()
    assert [path.name.startswith(files.TEMPORARY_PREFIX) for path in tmp_path.iterdir()] == [True]
    payload = {"source": str(singles("sd2")), "output": str(target), "dtype": "fp16", "like": str(like)}
    context = JobContext(1, "convert", payload, "cpu", tmp_path, lambda *_: None, lambda: False, lambda: False)
    result = ConvertHandler().run(context)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert list(result.outputs) == [target]
    told = {key: result.facts[key] for key in ("family", "prediction", "verified", "sha256")}
    assert told == {"family": "sd2", "prediction": "v", "verified": "forward", "sha256": None}
    assert inspect(target).dtype == "F16"
    assert inspect(target).problems == []


def test_a_depth_model_goes_there_and_back_with_the_estimator_of_a_folder_like_it(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = folders("sd2-depth")
    made = convert(folder, tmp_path / "m.safetensors", verify="forward")
    assert made.pipeline.spoken == ("sd2", "depth")
    tensors = load_file(made.output)
    # As in the original file: MiDaS under names of its own, and nothing in the header.
    original = tmp_path / "original.safetensors"
    save_file({**tensors, "depth_model.model.pretrained.model.cls_token": torch.zeros(1, 1, 8)}, original)
    found = inspect(original)
    assert (found.family, found.variant, found.prediction, found.problems) == ("sd2", "depth", "epsilon", [])
    with pytest.raises(Refusal, match=r"is a depth model of the family sd2.*--like"):
        convert_single(original, tmp_path / "none", cache=tmp_path)
    back = convert_single(original, tmp_path / "back", cache=tmp_path, like=folder, verify="all")
    assert back.pipeline.variant == "depth"
    same_tensors(convert(back.output, tmp_path / "again.safetensors", verify="all").output, made.output)

    drawn = []
    for place in (folder, back.output):
        pipeline = diffusers.DiffusionPipeline.from_pretrained(place, local_files_only=True)
        assert type(pipeline).__name__ == "StableDiffusionDepth2ImgPipeline"
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(3)
        depth, start = torch.rand(1, 64, 64, generator=generator), torch.rand(1, 3, 64, 64, generator=generator)
        drawn.append(
            pipeline(
                "a red star",
                image=start,
                depth_map=depth,
                num_inference_steps=4,
                strength=0.5,
                generator=torch.Generator().manual_seed(5),
                output_type="np",
            ).images
        )
    np.testing.assert_allclose(drawn[0], drawn[1], atol=1e-5)


def test_a_folder_like_it_that_names_a_safety_checker_it_has_not_gives_a_pipeline_that_loads(
    folders: Callable[[str], Path], singles: Callable[[str], Path], tmp_path: Path
) -> None:
    like = tmp_path / "like"
    shutil.copytree(folders("sd1"), like)
    index = json.loads((like / "model_index.json").read_bytes())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (like / "model_index.json").write_text(json.dumps(index))
    made = convert_single(singles("sd1"), tmp_path / "out", cache=tmp_path, like=like)
    assert inspect(made.output).problems == []
    diffusers.DiffusionPipeline.from_pretrained(made.output, local_files_only=True)


def test_t5s_tokenizer_is_lent_by_whichever_flux_is_here(
    folders: Callable[[str], Path], singles: Callable[[str], Path], tmp_path: Path
) -> None:
    like = tmp_path / "like"
    shutil.copytree(folders("flux"), like)
    shutil.rmtree(like / "tokenizer_2")
    (like / "tokenizer_2").mkdir()
    with pytest.raises(Refusal, match=r"no tokenizer_2.*fastsd models get flux-dev"):
        convert_single(singles("flux"), tmp_path / "out", cache=tmp_path, like=like)
    shutil.copytree(folders("flux"), tmp_path / "models" / "flux-schnell")
    made = convert_single(singles("flux"), tmp_path / "out", cache=tmp_path, like=like)
    names = sorted(path.name for path in (folders("flux") / "tokenizer_2").iterdir())
    assert sorted(path.name for path in (made.output / "tokenizer_2").iterdir()) == names
