"""The miniature of Kosmos-2: its classes, processor and token layout at tiny widths, for 64 px pictures."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Kosmos2Config, Kosmos2ForConditionalGeneration, Kosmos2Processor, XLMRobertaTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from handlers.models.miniature import vocabulary
from handlers.models.miniature.seeded import seeded

SEED = 2
RESOLUTION = 64
PATCH = 8
LATENT_QUERIES = 64
PATCH_INDEX_TOKENS = 1024


def processor() -> Kosmos2Processor:
    """Kosmos-2's own processor; it stretches the whole picture to ``RESOLUTION`` squared, as the real one does."""
    side = {"height": RESOLUTION, "width": RESOLUTION}
    # `use_square_size` would set 224 whatever `size` says, so the square is spelt out.
    image_processor = CLIPImageProcessorPil(size=side, crop_size=side, default_to_square=True)
    # The processor adds 11 tags and 1024 patch indices.
    tokenizer = XLMRobertaTokenizer(vocab=vocabulary.kosmos_vocabulary(), mask_token=None, model_max_length=512)
    return Kosmos2Processor(image_processor, tokenizer, PATCH_INDEX_TOKENS)


def model(vocabulary_size: int) -> Kosmos2ForConditionalGeneration:
    """Kosmos-2 with 3 text layers and 4 vision layers of 128."""
    configuration = Kosmos2Config(
        text_config={
            "vocab_size": vocabulary_size,
            "max_position_embeddings": 512,
            "embed_dim": 128,
            "layers": 3,
            "ffn_dim": 512,
            "attention_heads": 4,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": RESOLUTION,
            "patch_size": PATCH,
        },
        latent_query_num=LATENT_QUERIES,
    )
    return Kosmos2ForConditionalGeneration(configuration)


def build(target: Path) -> None:
    """Write the transformers folder with random weights, the same every time."""
    tools = processor()
    with seeded(SEED):
        made = model(len(tools.tokenizer))
    save(made, tools, target)


def save(
    made: Kosmos2ForConditionalGeneration,
    tools: Kosmos2Processor,
    target: Path,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write model and processor as a transformers folder in ``dtype``."""
    made.to(dtype=dtype).save_pretrained(target)
    tools.save_pretrained(target)
