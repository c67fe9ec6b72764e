"""The miniatures: the real classes, built or shipped, loaded as whoever uses them loads them."""

from __future__ import annotations

import json
import multiprocessing
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, CLIPTextConfig, CLIPTextModel, CLIPTokenizer, Kosmos2ForConditionalGeneration

from handlers.models import miniature
from handlers.models.inspect import inspect
from handlers.models.miniature import captioner, drawing, sd2, sdxl, vocabulary
from handlers.models.miniature.expand import borrow, expand
from tests import pictures

GIVEN = ("pixel_values", "input_ids", "attention_mask", "image_embeds_position_mask")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both miniatures of random weights, whatever is shipped."""
    folder = tmp_path_factory.mktemp("built")
    drawing.build(folder / "drawing")
    captioner.build(folder / "captioner")
    return folder


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.relative_to(folder)}:{name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def test_the_same_weights_come_out_every_time(built: Path, tmp_path: Path) -> None:
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    drawing.build(tmp_path / "again")
    assert torch.equal(before, torch.random.get_rng_state())
    first, again = weights_of(built / "drawing"), weights_of(tmp_path / "again")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_the_drawing_miniature_has_the_blocks_and_names_of_sd1(built: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(built / "drawing", local_files_only=True)
    unet, vae = pipeline.unet, pipeline.vae
    assert unet.config.down_block_types == ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    assert unet.config.up_block_types == ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
    assert (unet.config.layers_per_block, len(unet.config.block_out_channels)) == (2, 4)
    assert unet.config.attention_head_dim == 8
    with torch.device("meta"):
        real_unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        real_vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
        )
        real_text = CLIPTextModel(CLIPTextConfig(num_hidden_layers=pipeline.text_encoder.config.num_hidden_layers))
    assert set(unet.state_dict()) == set(real_unet.state_dict())
    assert set(vae.state_dict()) == set(real_vae.state_dict())
    assert set(pipeline.text_encoder.state_dict()) == set(real_text.state_dict())
    assert pipeline.text_encoder.config.max_position_embeddings == 77
    assert vae.config.scaling_factor == 0.18215
    latents = vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mean
    assert latents.shape == (1, 4, 8, 8)
    betas = pipeline.scheduler.betas
    assert (betas[0].item(), betas[-1].item()) == (pytest.approx(0.00085), pytest.approx(0.012))
    assert pipeline.scheduler.config.prediction_type == "epsilon"


def _sd2(folder: Path) -> StableDiffusionPipeline:
    drawing.save(sd2.pipeline(), folder / "sd2")
    return StableDiffusionPipeline.from_pretrained(folder / "sd2", local_files_only=True)


def test_the_second_miniature_has_the_structure_of_sd2(tmp_path: Path) -> None:
    pipeline = _sd2(tmp_path)
    with torch.device("meta"):
        real = UNet2DConditionModel(
            cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
        )
    assert set(pipeline.unet.state_dict()) == set(real.state_dict())
    assert {name: tensor.ndim for name, tensor in pipeline.unet.state_dict().items()} == {
        name: tensor.ndim for name, tensor in real.state_dict().items()
    }
    assert pipeline.text_encoder.config.hidden_act == "gelu"
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    facts = inspect(tmp_path / "sd2")
    assert (facts.family, facts.prediction) == ("sd2", "v")


# diffusers hands a torch tensor to numpy the old way.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_the_third_miniature_has_the_structure_of_sdxl(tmp_path: Path) -> None:
    sdxl.save(sdxl.pipeline(), tmp_path / "sdxl")
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        tmp_path / "sdxl", local_files_only=True, add_watermarker=False
    )
    with torch.device("meta"):
        real = UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            attention_head_dim=(5, 10, 20),
            transformer_layers_per_block=(1, 2, 10),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )

    def names(unet: UNet2DConditionModel) -> set[tuple[str, int]]:
        # The last level has fewer transformer blocks; what they are called and made of is the same.
        deep = re.compile(r"transformer_blocks\.\d+")
        return {(deep.sub("transformer_blocks.N", name), tensor.ndim) for name, tensor in unet.state_dict().items()}

    assert names(pipeline.unet) == names(real)
    assert pipeline.vae.config.scaling_factor == 0.13025
    assert pipeline.text_encoder_2.config.hidden_act == "gelu"
    assert pipeline.tokenizer_2.pad_token_id == 0
    facts = inspect(tmp_path / "sdxl")
    assert (facts.family, facts.prediction) == ("sdxl", "epsilon")
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline("a red circle", num_inference_steps=2, height=64, width=64).images[0]
    assert drawn.size == (64, 64)


def test_what_is_lent_fills_gaps_and_replaces_nothing(tmp_path: Path) -> None:
    lender = miniature.WEIGHTS / "miniature"
    shipped = tmp_path / "shipped"
    (shipped / "text_encoder").mkdir(parents=True)
    (shipped / "text_encoder" / "config.json").write_text("its own")
    expand(shipped, tmp_path / "second")
    borrow(lender, tmp_path / "second")
    assert (tmp_path / "second" / "text_encoder" / "config.json").read_text() == "its own"
    lent = load_file(tmp_path / "second" / "vae" / "diffusion_pytorch_model.safetensors")
    narrow = load_file(lender / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(lent[name], tensor.float()) for name, tensor in narrow.items())
    assert (tmp_path / "second" / "tokenizer" / "vocab.json").is_file()
    assert not (tmp_path / "second" / "unet").exists()


def test_the_drawing_miniature_draws_from_a_prompt(built: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(built / "drawing", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)

    def draw(prompt: str) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        generator = torch.Generator().manual_seed(3)
        made = pipeline(prompt, num_inference_steps=2, height=64, width=64, generator=generator).images[0]
        return np.asarray(made)

    first = draw("a red circle")
    assert first.shape == (64, 64, 3)
    assert np.array_equal(first, draw("a red circle"))
    assert not np.array_equal(first, draw("a blue square on a white background"))


def test_the_captioner_speaks_through_its_real_processor(built: Path) -> None:
    processor = AutoProcessor.from_pretrained(built / "captioner")
    model = Kosmos2ForConditionalGeneration.from_pretrained(built / "captioner").eval()
    size = processor.image_processor.size
    assert (size["height"], size["width"]) == (captioner.RESOLUTION, captioner.RESOLUTION)
    image = Image.open(pictures.photograph("chelsea.png"))
    inputs = processor(images=image, text="<grounding>An image of", return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, captioner.RESOLUTION, captioner.RESOLUTION)
    assert inputs["image_embeds_position_mask"].sum() == captioner.LATENT_QUERIES
    said = model.generate(**{key: inputs[key] for key in GIVEN}, max_new_tokens=8, do_sample=False)
    assert said.shape[1] > inputs["input_ids"].shape[1]
    text = processor.batch_decode(said, skip_special_tokens=True)[0]
    assert "<grounding> An image of" in text


def test_grounding_goes_there_and_back_through_the_tokenizer(built: Path) -> None:
    processor = AutoProcessor.from_pretrained(built / "captioner")
    grounded = (
        "<grounding>An image of<phrase> a small red circle</phrase>"
        "<object><patch_index_0044><patch_index_0863></object> on a blue background."
    )
    ids = processor.tokenizer(grounded, add_special_tokens=False).input_ids
    assert processor.tokenizer.unk_token_id not in ids
    caption, entities = processor.post_process_generation(processor.tokenizer.decode(ids))
    assert caption == "An image of a small red circle on a blue background."
    assert [(phrase, boxes) for phrase, _span, boxes in entities] == [
        ("a small red circle", [(0.390625, 0.046875, 0.984375, 0.828125)])
    ]


@pytest.mark.parametrize("name", miniature.NAMES)
def test_ensure_gives_a_folder_that_loads(name: str, tmp_path: Path) -> None:
    folder = miniature.ensure(name, tmp_path)
    assert folder == miniature.folder_of(name, tmp_path) == miniature.ensure(name, tmp_path)
    index = "config.json" if name in ("miniature-captioner", "miniature-search") else "model_index.json"
    assert (folder / index).is_file()
    assert miniature.is_trained(name) == (not folder.name.endswith("-random"))
    assert {tensor.dtype for tensor in weights_of(folder).values()} == {torch.float32}
    assert not inspect(folder).problems
    assert list(tmp_path.rglob(".fastsd-tmp-*")) == []


def test_unfolding_keeps_every_number(built: Path, tmp_path: Path) -> None:
    narrow = {name: tensor.half() for name, tensor in load_file(built / "captioner" / "model.safetensors").items()}
    narrow["scalar"] = torch.tensor(0.5, dtype=torch.float16)
    (tmp_path / "shipped").mkdir()
    save_file(narrow, tmp_path / "shipped" / "model.safetensors", {"format": "pt"})
    (tmp_path / "shipped" / "config.json").write_text("{}")
    expand(tmp_path / "shipped", tmp_path / "unfolded")
    wide = load_file(tmp_path / "unfolded" / "model.safetensors")
    assert wide.keys() == narrow.keys()
    assert all(wide[name].dtype == torch.float32 for name in wide)
    assert all(torch.equal(wide[name], narrow[name].float()) for name in wide)
    assert (tmp_path / "unfolded" / "config.json").read_text() == "{}"


def test_there_is_no_other_miniature(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no miniature"):
        miniature.ensure("miniature-video", tmp_path)


def _ensure_random(cache: Path) -> None:
    miniature.WEIGHTS = cache / "nothing-is-shipped"
    miniature.ensure("miniature-captioner", cache)


def test_two_processes_that_build_at_once_leave_one_whole_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")  # torch is loaded already
    builders = [context.Process(target=_ensure_random, args=(tmp_path,)) for _ in range(2)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join(120)
    assert [builder.exitcode for builder in builders] == [0, 0]
    assert [path.name for path in (tmp_path / "miniature").iterdir()] == [
        f"miniature-captioner-{miniature.VERSION}-random"
    ]
    assert len(weights_of(tmp_path / "miniature")) > 100


def test_naming_a_miniature_loads_no_torch() -> None:
    code = (
        "import sys; from pathlib import Path; from handlers.models import miniature, registry, inspect\n"
        "registry.list_models(None, Path('/nonexistent'))\n"
        "print([name for name in ('torch', 'diffusers', 'transformers', 'numpy', 'PIL') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout.strip() == "[]"


def test_every_word_is_one_token_and_the_vocabulary_stays_small() -> None:
    table, merges = vocabulary.clip_vocabulary()
    assert len(table) <= 2000
    tokenizer = drawing.tokenizer()
    for word in vocabulary.WORDS:
        assert tokenizer.tokenize(word) == [f"{word}</w>"]
    assert len(merges) == len(set(merges))


def test_the_tokenizer_loads_from_its_old_and_its_new_files(built: Path, tmp_path: Path) -> None:
    text = "A small RED circle, zwx & naïve 猫!"
    folder = built / "drawing" / "tokenizer"
    new = CLIPTokenizer.from_pretrained(folder)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    old = CLIPTokenizer.from_pretrained(tmp_path)
    assert new(text).input_ids == old(text).input_ids == drawing.tokenizer()(text).input_ids
    assert json.loads((folder / "vocab.json").read_text(encoding="utf-8"))["circle</w>"] in new(text).input_ids


@cache
def one_tokenizer() -> CLIPTokenizer:
    return drawing.tokenizer()


@settings(deadline=None, max_examples=50)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_is_tokens_between_start_and_end(text: str) -> None:
    tokenizer = one_tokenizer()
    ids = tokenizer(text, truncation=True).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    assert len(ids) <= 77
