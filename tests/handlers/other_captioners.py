"""Tiny captioners of the real classes with the real processors' layout: they talk, and what they say means nothing."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    BartConfig,
    BartTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    GPT2Tokenizer,
    OPTConfig,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from handlers.models.miniature.seeded import seeded

_SENTENCES = (
    "a photo of a small green heart and a large red star on a grey ground",
    "a dog runs behind a cat in front of a house, the sun shines",
    "Question: what is it? Answer: a blue circle beside a yellow moon.",
    "What does the image describe? Locate the phrases in the caption: Describe with a paragraph what is shown.",
)
SIDE = 32


def _pieces(folder: Path, special: list[str]) -> tuple[str, str]:
    """vocab.json and merges.txt of a byte-level BPE, trained on a few sentences."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(_SENTENCES * 20, vocab_size=420, special_tokens=special, show_progress=False)
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = trained.save_model(str(folder))
    return vocabulary, merges


def blip2(folder: Path) -> Path:
    """BLIP-2 with OPT, as a transformers folder."""
    vocabulary, merges = _pieces(folder.with_name(f"{folder.name}-pieces"), ["<s>", "<pad>", "</s>", "<unk>"])
    tokenizer = GPT2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        bos_token="</s>",
        eos_token="</s>",
        unk_token="</s>",
        pad_token="<pad>",
        add_bos_token=True,
    )
    size = {"height": SIDE, "width": SIDE}
    processor = Blip2Processor(BlipImageProcessorPil(size=size), tokenizer, num_query_tokens=4)
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    configuration = Blip2Config(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": 8,
            "initializer_range": 0.5,
        },
        qformer_config={
            "vocab_size": 64,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "initializer_range": 0.5,
        },
        text_config=OPTConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=256,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            init_std=0.5,
        ).to_dict(),
        num_query_tokens=4,
        image_token_index=image_token,
        initializer_range=0.5,
    )
    with seeded(3):
        model = Blip2ForConditionalGeneration(configuration)
        torch.nn.init.normal_(model.query_tokens)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def florence2(folder: Path) -> Path:
    """Florence-2 with its 1000 places, as a transformers folder."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    vocabulary, merges = _pieces(folder.with_name(f"{folder.name}-pieces"), special)
    tokenizer = BartTokenizer(vocab=vocabulary, merges=merges, extra_special_tokens={"image_token": "<image>"})
    tokenizer.add_tokens([f"<loc_{place}>" for place in range(1000)])
    size = {"height": SIDE, "width": SIDE}
    pictures = CLIPImageProcessorPil(size=size, do_center_crop=False, default_to_square=True)
    pictures.image_seq_length = (SIDE // 8) ** 2 + 1
    processor = Florence2Processor(pictures, tokenizer)
    configuration = Florence2Config(
        vision_config={
            "depths": (1, 1),
            "patch_size": (7, 3),
            "patch_stride": (4, 2),
            "patch_padding": (3, 1),
            "patch_prenorm": (False, True),
            "embed_dim": (16, 32),
            "num_heads": (2, 2),
            "num_groups": (2, 2),
            "window_size": 4,
            "drop_path_rate": 0.0,
            "projection_dim": 32,
            "initializer_range": 0.5,
        },
        text_config=BartConfig(
            vocab_size=len(tokenizer),
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            max_position_embeddings=512,
            dropout=0.0,
            init_std=0.5,
            bos_token_id=0,
            pad_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=2,
            forced_bos_token_id=None,
            forced_eos_token_id=2,
        ).to_dict(),
        image_token_id=tokenizer.image_token_id,
    )
    with seeded(4):
        model = Florence2ForConditionalGeneration(configuration)
        for name, weights in model.named_parameters():
            if weights.dim() > 1 and "language_model" in name:
                torch.nn.init.normal_(weights, std=0.5)
        # A thousand places would leave the words no chance.
        shared = model.get_input_embeddings().weight.data
        shared[tokenizer.convert_tokens_to_ids("<loc_0>") : tokenizer.convert_tokens_to_ids("<loc_999>") + 1] *= 0.6
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
