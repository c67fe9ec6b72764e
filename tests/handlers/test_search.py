"""The search's jobs on real files and real models: the trained CLIP miniature, SigLIP with random weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SiglipConfig, SiglipModel, SiglipProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from handlers.context import JobContext, JobResult, Stopping, Waiting
from handlers.models import inspect, miniature, registry
from handlers.models.miniature import drawing, vocabulary, world
from handlers.models.miniature.seeded import seeded
from handlers.search import job as jobs
from handlers.search.find import Matrix, nearest, to_bytes
from handlers.search.job import EmbedHandler, SearchHandler, width_of
from handlers.search.model import Embedder
from handlers.search.store import Picture, Store, digest_of, twins_of
from handlers.search.walk import pictures_of
from sessions.files import sha256_of
from sessions.refusal import Refusal


def drawn(number: int) -> world.Picture:
    return world.draw(world.random_scene(np.random.default_rng((77, number)), 1 + number % 3), 96)


def fill(folder: Path, count: int, first: int = 0) -> list[Path]:
    """Write pictures of the world, all different."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        drawn(number).image.save(folder / f"{number}.png")
    return [folder / f"{number}.png" for number in range(first, first + count)]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return tmp_path / "tree"


@pytest.fixture
def context(tmp_path: Path, tree: Path, cache: Path) -> Callable[..., JobContext]:
    def make(stopping: Callable[[], bool] = lambda: False, **payload: Any) -> JobContext:
        usual = {"index": str(tmp_path / "index"), "search": "miniature", "root": str(tree), "count": 3}
        return JobContext(1, "search", usual | payload, "cpu", cache, lambda *_: None, lambda: False, stopping)

    return make


Make = Callable[..., JobContext]


def embed(make: Make, tree: Path, scope: str, digest: str = "d", **options: Any) -> JobResult:
    """Run the daemon's job for a session as it lies there."""
    pictures = [
        asdict(found) | {"sha256": sha256_of(tree / found.path)}
        for found in pictures_of(tree)
        if found.path.startswith(f"{scope}/")
    ]
    return EmbedHandler().run(make(scope=scope, pictures=pictures, digest=digest, **options))


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures each call of the model was given."""
    calls: list[int] = []
    before = Embedder.pictures

    def count(self: Embedder, images: Sequence[Image.Image]) -> Any:
        calls.append(len(images))
        return before(self, images)

    monkeypatch.setattr(Embedder, "pictures", count)
    return calls


def found(result: JobResult) -> list[str]:
    return [row["path"] for row in result.facts["found"]]


def test_words_and_pictures_find_pictures_and_nothing_is_looked_at_twice(
    tree: Path, context: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch)
    fill(tree / "Sessions/a/instance_images", 20)
    handler = SearchHandler()
    right = 0
    for number in range(20):
        result = handler.run(context(query=world.caption(drawn(number).scene)))
        right += found(result)[0] == f"Sessions/a/instance_images/{number}.png"
        assert len(found(result)) == 3
    assert right >= 18
    assert sum(calls) == 20
    # A picture that is moved, one that is renamed, a whole session that is: none of them is computed again.
    (tree / "Sessions/a/instance_images/3.png").rename(tree / "Sessions/a/other.png")
    (tree / "Sessions/a").rename(tree / "Sessions/b")
    result = handler.run(context(query=world.caption(drawn(3).scene), count=100))
    assert "Sessions/b/other.png" in found(result)[:2]
    assert len(found(result)) == 20
    (tree / "Sessions/b/other.png").unlink()
    assert "Sessions/b/other.png" not in found(handler.run(context(query="a heart", count=100)))
    assert sum(calls) == 20


def test_a_picture_finds_its_likes_and_not_itself(tree: Path, context: Make, tmp_path: Path) -> None:
    fill(tree / "Sessions/a", 12)
    copy = tree / "Sessions/b/passed on.jpg"
    copy.parent.mkdir()
    drawn(5).image.resize((80, 80)).save(copy, quality=85)
    own = tree / "Sessions/a/5.png"
    assert found(SearchHandler().run(context(like=str(own))))[0] == "Sessions/b/passed on.jpg"
    outside = tmp_path / "outside.png"
    drawn(5).image.save(outside)
    assert found(SearchHandler().run(context(like=str(outside))))[0] == "Sessions/a/5.png"
    with pytest.raises(Refusal, match="picture"):
        SearchHandler().run(context(like=str(_written(tmp_path / "text.png", b"no picture"))))


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_only_the_pictures_of_people_are_found(tree: Path) -> None:
    for place in ("Sessions/a/1.png", "Sessions/a/instance_images/2.png", "Sessions/a/deep/er/3.png"):
        fill((tree / place).parent, 1)
        (tree / place).parent.joinpath("0.png").rename(tree / place)
    for place in ("crops", "previews", "concept_images", "runs/1", ".fastsd/trash", "@eaDir"):
        fill(tree / "Sessions/a" / place, 1)
    fill(tree / "Models", 1)
    (tree / "Sessions/a/link.png").symlink_to(tree / "Sessions/a/1.png")
    assert sorted(picture.path for picture in pictures_of(tree, ["er"])) == [
        "Sessions/a/1.png",
        "Sessions/a/instance_images/2.png",
    ]


def test_an_empty_tree_finds_nothing(tree: Path, context: Make) -> None:
    tree.mkdir()
    assert SearchHandler().run(context(query="a red circle")).facts["found"] == []


def test_what_cannot_be_read_costs_only_itself_and_is_tried_once(
    tree: Path, context: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tree / "Sessions/a", 3)
    (tree / "Sessions/a/text.jpg").write_bytes(b"no picture")
    (tree / "Sessions/a/half.png").write_bytes((tree / "Sessions/a/0.png").read_bytes()[:200])
    assert len(found(SearchHandler().run(context(query="a heart", count=9)))) == 3
    calls = counted(monkeypatch)
    assert len(found(SearchHandler().run(context(query="a heart", count=9)))) == 3
    assert calls == []


def test_the_daemons_job_notes_what_it_knows_and_which_pictures_are_alike(
    tree: Path, context: Make, tmp_path: Path
) -> None:
    fill(tree / "Sessions/a", 6)
    drawn(2).image.resize((84, 84), Image.Resampling.LANCZOS).save(tree / "Sessions/a/again.png")
    (tree / "Sessions/a/copy.png").write_bytes((tree / "Sessions/a/4.png").read_bytes())
    result = embed(context, tree, "Sessions/a")
    assert result.facts == {"pictures": 8, "left": 0, "search": "miniature-search"}
    assert digest_of(tmp_path / "index", "Sessions/a") == "d"
    pairs = {
        (pair.one.rpartition("/")[2], pair.other.rpartition("/")[2])
        for pair in twins_of(tmp_path / "index", "Sessions/a")
    }
    assert ("2.png", "again.png") in pairs
    assert ("4.png", "copy.png") not in pairs, "the same file is told by its hash"


def test_a_large_session_is_looked_at_in_parts(
    tree: Path, context: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "_MOST", 4)
    calls = counted(monkeypatch)
    fill(tree / "Sessions/a", 9)
    lefts = []
    while digest_of(tmp_path / "index", "Sessions/a") is None:
        lefts.append(embed(context, tree, "Sessions/a").facts["left"])
    assert lefts == [5, 1, 0]
    assert sum(calls) == 9


def test_a_stop_keeps_what_was_looked_at(
    tree: Path, context: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "BATCH", 2)
    calls = counted(monkeypatch)
    fill(tree / "Sessions/a", 5)
    with pytest.raises(Stopping):
        embed(context, tree, "Sessions/a", stopping=lambda: len(calls) == 2)
    assert digest_of(tmp_path / "index", "Sessions/a") is None
    assert embed(context, tree, "Sessions/a").facts["left"] == 0
    assert sum(calls) == 5


def test_weights_that_are_missing_or_damaged_are_told(tree: Path, context: Make, tmp_path: Path) -> None:
    fill(tree / "Sessions/a", 1)
    with pytest.raises(registry.MissingModel, match="fastsd models get siglip2-base"):
        SearchHandler().run(context(query="a heart", search="siglip2-base"))
    with pytest.raises(Refusal, match="No search model called 'nobody'"):
        registry.check("nobody", "search", None, tmp_path)
    with pytest.raises(Refusal, match="No search model"):
        registry.check("kosmos-2", "search", None, tmp_path)
    with pytest.raises(Waiting, match="cannot be loaded"):
        Embedder.load(tmp_path, "cpu")


def test_siglip_reads_padded_lower_case_and_is_found_under_models(tree: Path, context: Make, cache: Path) -> None:
    folder = siglip(tree / "Models" / "mine")
    assert (inspect.inspect(folder).kind, inspect.inspect(folder).family) == ("search", "siglip")
    model = registry.check("mine", "search", tree / "Models", cache)
    assert (model.path, model.kind, model.origin) == (folder, "search", "Models/")
    embedder = Embedder.load(folder, "cpu")
    texts = embedder.texts(["a red circle", "A Red CIRCLE", "a blue heart on a white background"])
    assert texts.shape == (3, width_of(folder)) == (3, 48)
    np.testing.assert_allclose(texts[0], texts[1], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(texts, axis=1), 1, atol=1e-5)
    # Alone or in company, a text means the same, as it is padded to one length.
    np.testing.assert_allclose(embedder.texts(["a red circle"])[0], texts[0], atol=1e-5)
    fill(tree / "Sessions/a", 3)
    result = SearchHandler().run(context(query="a heart", search="mine", models=str(tree / "Models")))
    assert (len(found(result)), result.facts["search"]) == (3, "mine")


def siglip(folder: Path) -> Path:
    """A SigLIP of random weights with the layout of its files."""
    table, _merges = vocabulary.clip_vocabulary()
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    end = table[vocabulary.CLIP_END]
    configuration = SiglipConfig(
        text_config=sizes
        | {"vocab_size": len(table), "max_position_embeddings": 64, "pad_token_id": end, "bos_token_id": end - 1}
        | {"eos_token_id": end},
        vision_config=sizes | {"image_size": 32, "patch_size": 8},
    )
    with seeded(5):
        model = SiglipModel(configuration)
    model.save_pretrained(folder)
    side = {"height": 32, "width": 32}
    SiglipProcessor(SiglipImageProcessorPil(size=side), drawing.tokenizer()).save_pretrained(folder)
    return folder


def test_a_batch_sees_what_each_picture_alone_shows(cache: Path) -> None:
    embedder = Embedder.load(miniature.ensure("miniature-search", cache), "cpu")
    images = [drawn(number).image for number in range(5)]
    together = embedder.pictures(images)
    alone = np.concatenate([embedder.pictures([image]) for image in images])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert together.dtype == np.float32
    assert together.shape == (5, width_of(miniature.ensure("miniature-search", cache)))
    assert torch.is_grad_enabled()


def test_a_tree_of_50000_pictures_is_asked_at_once(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(50_000, 512)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    with closing(Store(tmp_path, "m", 512)) as store:
        store.add({f"{number:05}": to_bytes(row) for number, row in enumerate(rows)})
        pictures = [Picture(f"Sessions/a/{number:05}.png", 1, 1, f"{number:05}") for number in range(50_000)]
        store.replace_all(pictures)
        file, known = store.rows()
        scores = Matrix(file, 512).cosines(rows[12_345], [row for _path, row in known])
        assert known[nearest(scores, 1)[0]][0] == "Sessions/a/12345.png"
