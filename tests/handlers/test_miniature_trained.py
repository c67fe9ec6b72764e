"""What the shipped weights can do, on fresh seeds; the bounds lie under the model card's figures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from transformers import Kosmos2ForConditionalGeneration, Kosmos2Processor

from handlers.models import miniature
from handlers.search.model import Embedder
from tools.miniature import evaluate


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.skipif(not miniature.is_trained("miniature"), reason="the drawing miniature ships no trained weights yet")
# diffusers hands a torch tensor to numpy the old way.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_the_drawing_miniature_draws_the_colours_that_a_prompt_names(cache: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(miniature.ensure("miniature", cache), local_files_only=True)
    assert pipeline.unet.dtype == pipeline.text_encoder.dtype == torch.float32
    assert evaluate.vae_figures(pipeline.vae, 24)["psnr"] >= 26
    figures = evaluate.drawing_figures(pipeline, 50, None)
    # The bounds that the miniature promises; its figures on 200 prompts are in the model card.
    assert figures["background_right"] >= 0.9
    assert figures["colour_right"] >= 0.9
    assert figures["shape_right"] >= 0.85


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_the_miniature_of_sd2_draws_what_a_prompt_names(cache: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(miniature.ensure("miniature-sd2", cache), local_files_only=True)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    figures = evaluate.drawing_figures(pipeline, 50, None)
    # Its figures on 200 prompts are in the model card.
    assert figures["background_right"] >= 0.9
    assert figures["colour_right"] >= 0.9
    assert figures["shape_right"] >= 0.7


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_the_miniature_of_sdxl_draws_what_a_prompt_names(cache: Path) -> None:
    folder = miniature.ensure("miniature-sdxl", cache)
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True, add_watermarker=False)
    figures = evaluate.drawing_figures(pipeline, 50, None)
    # Its figures on 200 prompts are in the model card.
    assert figures["background_right"] >= 0.9
    assert figures["colour_right"] >= 0.88
    assert figures["shape_right"] >= 0.7


@pytest.mark.skipif(
    not miniature.is_trained("miniature-captioner"), reason="the captioner ships no trained weights yet"
)
def test_the_captioner_names_and_boxes_what_it_sees(cache: Path) -> None:
    folder = miniature.ensure("miniature-captioner", cache)
    model = Kosmos2ForConditionalGeneration.from_pretrained(folder).eval()
    figures = evaluate.caption_figures(model, Kosmos2Processor.from_pretrained(folder), 60)
    # The bounds that the miniature promises; its figures on 200 pictures are in the model card.
    assert figures["colour_right"] >= 0.95
    assert figures["shape_right"] >= 0.95
    assert figures["count_right"] >= 0.95
    assert figures["background_right"] >= 0.95
    assert figures["iou_1"] >= 0.7
    assert figures["iou_3"] >= 0.6


def test_the_search_model_finds_the_right_picture_first(cache: Path) -> None:
    figures = evaluate.search_figures(Embedder.load(miniature.ensure("miniature-search", cache), "cpu"), 50)
    # The bound that the miniature promises; its figures on 200 queries are in the model card.
    assert figures["first_right"] >= 0.9
    assert figures["bare_right"] >= 0.9
    assert figures["copies_right"] >= 0.9
