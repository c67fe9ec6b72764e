"""The miniature of CLIP: its classes, processor and file layout at tiny widths, for 64 px pictures.

Its tokenizer is the drawing miniature's. Like CLIP's own, its processor looks at the middle of what is no square.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel, CLIPProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from handlers.models.miniature import drawing, vocabulary
from handlers.models.miniature.seeded import seeded

SEED = 3
RESOLUTION = 64
PATCH = 8
WIDTH = 64
"""Numbers of an embedding."""
_VISION_WIDTH = 96
_TEXT_WIDTH = 64


def processor() -> CLIPProcessor:
    """CLIP's own processor for pictures of ``RESOLUTION`` pixels."""
    side = {"height": RESOLUTION, "width": RESOLUTION}
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": RESOLUTION}, crop_size=side)
    return CLIPProcessor(image_processor, drawing.tokenizer())


def model() -> CLIPModel:
    """CLIP with 3 vision layers of 96 and 2 text layers of 64."""
    table, _merges = vocabulary.clip_vocabulary()
    configuration = CLIPConfig(
        text_config={
            "vocab_size": len(table),
            "hidden_size": _TEXT_WIDTH,
            "intermediate_size": 3 * _TEXT_WIDTH,
            "projection_dim": WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": drawing.POSITIONS,
            "bos_token_id": table[vocabulary.CLIP_START],
            "eos_token_id": table[vocabulary.CLIP_END],
            "pad_token_id": table[vocabulary.CLIP_END],
        },
        vision_config={
            "hidden_size": _VISION_WIDTH,
            "intermediate_size": 256,
            "projection_dim": WIDTH,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": RESOLUTION,
            "patch_size": PATCH,
        },
        projection_dim=WIDTH,
    )
    return CLIPModel(configuration)


def build(target: Path) -> None:
    """Write the transformers folder with random weights, the same every time."""
    with seeded(SEED):
        made = model()
    save(made, processor(), target)


def save(made: CLIPModel, tools: CLIPProcessor, target: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write model and processor as a transformers folder in ``dtype``."""
    made.to(dtype=dtype).save_pretrained(target)
    tools.save_pretrained(target)
