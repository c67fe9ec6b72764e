"""Diffusers folders of other trainers: taken once they are whole, once, and told where they are not."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon.refusals import standing_errors
from handlers.models import miniature
from tests.daemon.house import House

A = "Sessions/a"
INDEX = "model/model_index.json"
NOTE = "model/model_index.json.error.txt"


@pytest.fixture(scope="module")
def model(cache: Path) -> Path:
    return miniature.ensure("miniature", cache)


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    house = House(tmp_path, webui={"kind": "none"})
    (house.root / "Sessions").mkdir()
    yield house
    house.close()


def put(house: House, model: Path, path: str) -> Path:
    folder = house.root / path
    shutil.copytree(model, folder)
    return folder


def converted(house: House) -> list[str]:
    return [source for kind, source in house.made if kind == "convert"]


def work(house: House) -> None:
    house.look()
    house.work(kinds=("convert",))


def test_a_folder_without_pictures_or_train_yaml_makes_a_session_and_its_model(house: House, model: Path) -> None:
    folder = put(house, model, f"{A}/model")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    work(house)
    assert converted(house) == [INDEX]
    record = house.session(A).manifest.get("convert", INDEX)
    assert record is not None
    assert record["outputs"][0].startswith("a-model-")
    assert (house.root / A / record["outputs"][0]).is_file()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    house.restart()
    house.restart("index", "queue")
    work(house)
    assert converted(house) == [INDEX], "the manifest knows it"


def test_the_session_itself_may_be_the_folder(house: House, model: Path) -> None:
    put(house, model, A)
    work(house)
    assert converted(house) == ["model_index.json"]
    work(house)
    assert len(converted(house)) == 1, "what is made beside it changes nothing"


@pytest.mark.parametrize(
    "place", ["Models/model", f"{A}/Models/model", f"{A}/runs/1/model", f"{A}/checkpoints/x", f"{A}/x/checkpoints/y"]
)
def test_never_from_bases_checkpoints_or_runs(house: House, model: Path, place: str) -> None:
    house.pictures(A)
    put(house, model, place)
    work(house)
    assert converted(house) == []
    assert not list(house.root.rglob("model_index.json.error.txt"))


def test_in_whatever_order_its_files_come_it_is_taken_when_all_are_there(house: House, model: Path) -> None:
    files = sorted(path for path in model.rglob("*") if path.is_file())
    for file in reversed(files):
        assert converted(house) == []
        house.quiet, house.needed = 30.0, 60.0
        house.write(f"{A}/model/{file.relative_to(model).as_posix()}", file.read_bytes())
        house.now += 30.0
        work(house)
    house.quiet = 100.0
    house.now += 100.0
    house.router.plan(A)
    work(house)
    assert converted(house) == [INDEX]
    assert not (house.root / A / NOTE).exists()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda folder: (folder / "vae" / "config.json").unlink(), "Its vae's config.json is missing."),
        (lambda folder: (folder / "unet" / "config.json").write_text("{"), "Its unet's config.json is damaged"),
        (lambda folder: shutil.rmtree(folder / "text_encoder"), "Its text_encoder is missing."),
        (lambda folder: shutil.rmtree(folder / "scheduler"), "Its scheduler is missing."),
        (
            lambda folder: os.truncate(folder / "unet" / "diffusion_pytorch_model.safetensors", 4000),
            "unet's diffusion_pytorch_model.safetensors is damaged",
        ),
        (
            lambda folder: (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(
                folder / "unet" / "diffusion_pytorch_model-00001-of-00002.safetensors"
            ),
            "Its unet's index of shards is missing.",
        ),
        (lambda folder: os.truncate(folder / "model_index.json", 30), "Its model_index.json is damaged"),
        (
            lambda folder: (folder / "model_index.json").write_text('{"_class_name": "KandinskyPipeline"}'),
            "Its pipeline KandinskyPipeline is none that fastsd knows.",
        ),
    ],
)
def test_what_is_not_whole_waits_then_is_refused_and_taken_when_it_is_mended(
    house: House, model: Path, damage: object, told: str
) -> None:
    assert callable(damage)
    folder = put(house, model, f"{A}/model")
    damage(folder)
    house.needed, house.quiet = 60.0, 30.0
    house.look()
    house.now += 30.0
    house.router.plan(A)
    house.work(kinds=("convert",))
    note = house.root / A / NOTE
    assert not note.exists(), "the rest of it may be on its way"
    assert any(told in wait for wait in house.router.plan(A).waits)
    house.quiet = 61.0
    house.now += 61.0
    work(house)
    house.router.plan(A)
    assert told in note.read_text()
    assert [name for name, _ in standing_errors(house.session(A))] == [INDEX]
    manifest = (house.root / A / ".fastsd" / "manifest.jsonl").read_bytes()
    house.restart("index")
    work(house)
    assert (house.root / A / ".fastsd" / "manifest.jsonl").read_bytes() == manifest, "it is told once"
    shutil.rmtree(folder)
    put(house, model, f"{A}/model")
    work(house)
    house.quiet = 1000.0
    house.now += 1000.0
    house.router.plan(A)
    house.work(kinds=("convert",))
    assert converted(house) == [INDEX]
    assert not note.exists()
    assert standing_errors(house.session(A)) == []


def test_shards_are_awaited_until_the_last(house: House, model: Path) -> None:
    folder = put(house, model, f"{A}/model")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    names = [f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    table = {"weight_map": {"a": names[0], "b": names[1]}}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(table))
    weights.rename(folder / "unet" / names[0])
    house.look()
    note = house.root / A / NOTE
    assert f"Its unet's {names[1]} is missing." in note.read_text()
    shutil.copyfile(folder / "unet" / names[0], folder / "unet" / names[1])
    work(house)
    assert converted(house) == [INDEX]
    assert not note.exists()


def test_a_deleted_note_asks_for_another_look_and_a_deleted_folder_takes_it_along(house: House, model: Path) -> None:
    folder = put(house, model, f"{A}/model")
    (folder / "vae" / "config.json").unlink()
    house.pictures(A)
    house.look()
    house.look()  # now the note is known, too
    note = house.root / A / NOTE
    note.unlink()
    house.look()
    house.router.plan(A)
    assert note.exists()
    shutil.rmtree(folder)
    house.look()
    assert standing_errors(house.session(A)) == []


def test_what_the_trainer_writes_anew_is_another_model_and_a_job_for_the_old_one_is_dropped(
    house: House, model: Path
) -> None:
    folder = put(house, model, f"{A}/model")
    house.look()
    job = house.claim("convert")
    assert job is not None
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    os.utime(weights, (2_000_000_000, 2_000_000_000))
    assert not house.finish(job), "its files have changed since"
    work(house)
    assert converted(house) == [INDEX]
    first = house.session(A).manifest.get("convert", INDEX)
    os.utime(weights, (2_000_000_100, 2_000_000_100))
    work(house)
    second = house.session(A).manifest.get("convert", INDEX)
    assert first is not None
    assert second is not None
    assert first["run"] != second["run"]
    assert len(list((house.root / A).glob("a-model-*.safetensors"))) == 2, "names are never used twice"


def test_a_refusal_of_the_conversion_is_told_beside_the_folder_and_not_tried_again(house: House, model: Path) -> None:
    put(house, model, f"{A}/model")
    house.look()
    house.refuses_models = True
    house.work(kinds=("convert",))
    note = house.root / A / NOTE
    assert "Is it a model of another family?" in note.read_text()
    house.restart("index", "queue")
    work(house)
    assert house.open_jobs("convert") == []
    house.refuses_models = False
    note.unlink()
    work(house)
    house.router.plan(A)
    house.work(kinds=("convert",))
    assert converted(house)[-1] == INDEX
    assert house.session(A).manifest.get("convert", INDEX)
    assert not note.exists()
