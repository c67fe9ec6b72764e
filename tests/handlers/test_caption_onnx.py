"""The captioner as ONNX: the same words as torch, in a loop without torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from handlers.caption.boxes import parse
from handlers.caption.model import Captioner
from handlers.caption.onnx_export import export, shrink
from handlers.caption.onnx_run import OnnxCaptioner, agreement
from handlers.caption.prompts import BRIEF
from handlers.caption.speaking import Ask, Spoken
from handlers.models import miniature
from handlers.models.miniature import world
from sessions.refusal import Refusal

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
PICTURES = 12


@pytest.fixture(scope="module")
def captioner(cache: Path) -> Captioner:
    return Captioner.load(miniature.ensure("miniature-captioner", cache), "cpu")


@pytest.fixture(scope="module")
def exported(captioner: Captioner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx") / "captioner"
    outputs = export(captioner, folder)
    assert {"eyes.onnx", "decoder.onnx", "embeddings.npy", "settings.json"} <= {path.name for path in outputs}
    return folder


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(PICTURES):
        scene = world.random_scene(np.random.default_rng((83, number)), 1 + number % 3)
        world.draw(scene).image.save(folder / f"{number:02}.png")
    return sorted(folder.iterdir())


def test_onnx_says_what_torch_says(captioner: Captioner, exported: Path, drawn: list[Path]) -> None:
    assert agreement(captioner, exported, drawn) == {"pictures": PICTURES, "same": PICTURES, "same_text": PICTURES}


def test_a_batch_says_what_singles_say(captioner: Captioner, exported: Path, drawn: list[Path]) -> None:
    from PIL import Image

    images = [Image.open(path).convert("RGB") for path in drawn[:5]]
    runner = OnnxCaptioner(exported, threads=1)
    together = runner.speak(images)
    assert together == [runner.speak([image])[0] for image in images]
    said = dict(captioner.speak(images, [Ask(index, BRIEF) for index in range(5)]))
    assert together == [answer.raw for _, answer in sorted(said.items()) if isinstance(answer, Spoken)]
    assert all(parse(raw).grounded for raw in together)


def test_int8_says_nearly_the_same(captioner: Captioner, exported: Path, drawn: list[Path], tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "int8"
    shutil.copytree(exported, folder)
    before = (folder / "decoder.onnx").stat().st_size
    shrink(folder)
    assert (folder / "decoder.onnx").stat().st_size < before / 2
    report = agreement(captioner, folder, drawn)
    print("int8", report)
    assert report["same_text"] >= 0.8 * PICTURES


def test_a_folder_that_exists_is_left_alone(captioner: Captioner, exported: Path) -> None:
    before = sorted(exported.iterdir())
    with pytest.raises(Refusal, match="exists"):
        export(captioner, exported)
    assert sorted(exported.iterdir()) == before
