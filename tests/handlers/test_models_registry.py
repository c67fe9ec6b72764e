"""Names of models: which are known, what lies in a tree's Models/, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from handlers.context import Waiting
from handlers.models import catalogue, miniature, registry
from sessions.refusal import Refusal

SD1_KEYS = (
    "model.diffusion_model.input_blocks.0.0.weight",
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
    "first_stage_model.decoder.conv_in.weight",
)


def single_file(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: torch.zeros(4, 4, dtype=torch.float16) for key in SD1_KEYS}, path)
    return path


def hub_folder(folder: Path, entry: catalogue.Entry) -> Path:
    for part in entry.parts:
        (folder / part).mkdir(parents=True, exist_ok=True)
        save_file({"a": torch.zeros(2)}, folder / part / "model.safetensors")
    (folder / entry.index).write_text("{}")
    return folder


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "tree" / "Models"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.mark.parametrize("name", ["sd15", "sd21", "sd21-768", "sdxl", "flux-dev", "flux-schnell"])
def test_a_base_that_is_not_here_says_which_command_helps(name: str, cache: Path) -> None:
    with pytest.raises(registry.MissingModel) as missing:
        registry.find(name, "checkpoint", None, cache)
    reason = missing.value.reason
    assert reason.startswith(f"The base {name} is not on this machine. Get it with: fastsd models get {name}")
    assert isinstance(missing.value, Waiting)


def test_auto_is_kosmos_2_and_by_the_gpu_sd15_or_sdxl(cache: Path) -> None:
    with pytest.raises(registry.MissingModel, match="The captioner kosmos-2 is not"):
        registry.find("auto", "captioner", None, cache)
    with pytest.raises(registry.MissingModel, match="sd15"):
        registry.find("auto", "checkpoint", None, cache)
    assert registry.auto_base(0) == "sd15"
    assert registry.auto_base(12 * 1024**3 - 1) == "sd15"
    assert registry.auto_base(12 * 1024**3) == "sdxl"


def test_miniatures_are_found_by_what_they_are_for(cache: Path) -> None:
    base = registry.find("miniature", "checkpoint", None, cache)
    captioner = registry.find("miniature", "captioner", None, cache)
    assert (base.name, base.family, base.kind, base.resolution) == ("miniature", "sd1", "diffusers", 64)
    assert (captioner.name, captioner.family, captioner.kind) == ("miniature-captioner", "kosmos2", "captioner")
    for model in (base, captioner):
        assert model.path == miniature.ensure(model.name, cache)
        assert model.bytes == registry.size_of(model.path) > 100_000


def test_checking_builds_nothing(cache: Path) -> None:
    assert registry.check("miniature", "checkpoint", None, cache).present
    assert not cache.exists()


@pytest.mark.parametrize("name", ["sd15", "sdxl", "kosmos-2"])
def test_a_download_is_found_once_it_is_whole(name: str, cache: Path) -> None:
    entry = catalogue.ENTRIES[name]
    folder = hub_folder(cache / "models" / name, entry)
    found = registry.find(name, entry.kind, None, cache)
    assert (found.path, found.present, found.resolution) == (folder, True, entry.resolution)
    weights = next(folder.rglob("*.safetensors"))
    weights.rename(weights.with_suffix(".part"))
    with pytest.raises(registry.MissingModel):
        registry.find(name, entry.kind, None, cache)


def test_auto_is_whichever_base_is_here(cache: Path) -> None:
    """A machine with only sdxl need not fetch sd15: the worker knows whether its GPU can train it."""
    with pytest.raises(registry.MissingModel, match="fastsd models get sd15"):
        registry.check("auto", "checkpoint", None, cache)
    hub_folder(cache / "models" / "sdxl", catalogue.ENTRIES["sdxl"])
    assert registry.check("auto", "checkpoint", None, cache).name == "sdxl"
    hub_folder(cache / "models" / "sd15", catalogue.ENTRIES["sd15"])
    assert registry.check("Auto", "checkpoint", None, cache).name == "sd15"


def test_the_hubs_own_cache_is_looked_at(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    entry = catalogue.ENTRIES["sd15"]
    repository = tmp_path / "hub" / f"models--{entry.origin.replace('/', '--')}"
    snapshot = hub_folder(repository / "snapshots" / "0123abc", entry)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    assert registry.find("sd15", "checkpoint", None, cache).path == snapshot


@pytest.mark.parametrize("spoken", ["mine", "mine.safetensors", "Models/mine", "Models/mine.safetensors"])
def test_a_file_under_models_is_named_with_or_without_suffix(models: Path, cache: Path, spoken: str) -> None:
    path = single_file(models / "mine.safetensors")
    found = registry.find(spoken, "checkpoint", models, cache)
    assert (found.name, found.path, found.family, found.kind) == ("mine", path, "sd1", "checkpoint")
    assert (found.resolution, found.origin, found.present) == (512, "Models/", True)


def test_files_in_folders_and_diffusers_folders_are_found_and_listed(models: Path, cache: Path) -> None:
    nested = single_file(models / "people" / "anna.v2.safetensors")
    folder = hub_folder(models / "trained", catalogue.ENTRIES["sd15"])
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    (models / "notes.txt").write_text("not a model")
    single_file(models / ".hidden.safetensors")
    assert registry.find("people/anna.v2", "checkpoint", models, cache).path == nested
    assert registry.find("trained", "checkpoint", models, cache).kind == "diffusers"
    listed = registry.list_models(models, cache)
    brought = [model.name for model in listed if model.origin == "Models/"]
    assert brought == ["trained", "people/anna.v2"]
    known = [model.name for model in listed if model.origin != "Models/"]
    assert known == list(catalogue.ENTRIES)
    row = listed[-1].to_json()
    assert list(row) == ["name", "family", "kind", "path", "resolution", "bytes", "origin", "present"]
    json.dumps(row)


def test_a_file_named_like_a_missing_base_stands_in_for_it(models: Path, cache: Path) -> None:
    path = single_file(models / "sd15.safetensors")
    assert registry.find("sd15", "checkpoint", models, cache).path == path


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "../outside.safetensors",
        "linked",
        "https://example.org/a.safetensors",
        "nothing",
        "",
        ".",
        "people/..",
    ],
)
def test_nothing_outside_the_tree_is_named(models: Path, cache: Path, name: str) -> None:
    outside = single_file(models.parent.parent / "outside.safetensors")
    (models / "linked.safetensors").symlink_to(outside)
    with pytest.raises(Refusal):
        registry.find(name, "checkpoint", models, cache)
    with pytest.raises(Refusal):
        registry.find(str(outside), "checkpoint", models, cache)
    assert [model for model in registry.list_models(models, cache) if model.origin == "Models/"] == []


def test_a_link_within_models_is_followed(models: Path, cache: Path) -> None:
    path = single_file(models / "mine.safetensors")
    (models / "current.safetensors").symlink_to(path)
    assert registry.find("current", "checkpoint", models, cache).family == "sd1"


def test_a_damaged_file_is_refused_and_listed_as_not_present(models: Path, cache: Path) -> None:
    path = single_file(models / "mine.safetensors")
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(Refusal, match="missing at its end"):
        registry.find("mine", "checkpoint", models, cache)
    assert [model.present for model in registry.list_models(models, cache) if model.name == "mine"] == [False]


def test_a_model_of_another_kind_is_refused(models: Path, cache: Path) -> None:
    save_file({"lora_unet_mid.lora_down.weight": torch.zeros(4, 4)}, models / "style.safetensors")
    with pytest.raises(Refusal, match="is a lora"):
        registry.find("style", "checkpoint", models, cache)


@given(name=st.text(max_size=30))
def test_any_name_is_found_missing_or_refused(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp() / "names"
    (folder / "Models").mkdir(parents=True, exist_ok=True)
    with pytest.raises((Refusal, registry.MissingModel)):
        registry.check(name, "checkpoint", folder / "Models", folder / "cache")
