"""Tiny translators of the real classes with real sentencepiece tokenizers: what they say means nothing."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path

import sentencepiece
import torch
from transformers import (
    M2M100Config,
    M2M100ForConditionalGeneration,
    M2M100Tokenizer,
    MarianConfig,
    MarianMTModel,
    MarianTokenizer,
)

from handlers.models.miniature.seeded import seeded

_SENTENCES = (
    "a small green heart and a large red star on a grey ground",
    "a dog runs behind a cat in front of a house, the sun shines",
    "ein kleines grünes Herz und ein großer roter Stern auf grauem Grund",
    "ein Hund läuft hinter einer Katze vor einem Haus, die Sonne scheint",
    "un petit coeur vert et une grande étoile rouge sur un fond gris",
)
_TINY = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 512,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "init_std": 0.6,
}


def _pieces(file: Path) -> list[str]:
    """Train a sentencepiece model on a few sentences; its pieces."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_SENTENCES * 10), model_writer=written, vocab_size=70, minloglevel=2
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(written.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    return [pieces.id_to_piece(number) for number in range(3, pieces.get_piece_size())]


def m2m100(folder: Path) -> Path:
    """M2M100 with its hundred language codes, as a transformers folder."""
    raw = folder.with_name(f"{folder.name}-pieces")
    pieces = ["<s>", "<pad>", "</s>", "<unk>", *_pieces(raw / "spm.model")]
    (raw / "vocab.json").write_text(json.dumps({piece: number for number, piece in enumerate(pieces)}))
    tokenizer = M2M100Tokenizer(str(raw / "vocab.json"), str(raw / "spm.model"))
    settings = M2M100Config(
        **_TINY,
        vocab_size=len(pieces) + 100 + 8,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
    )
    with seeded(5):
        model = M2M100ForConditionalGeneration(settings)
        for weights in model.parameters():
            if weights.dim() > 1:
                torch.nn.init.normal_(weights, std=0.6)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def marian(folder: Path) -> Path:
    """opus-mt's kind, as a transformers folder."""
    raw = folder.with_name(f"{folder.name}-pieces")
    pieces = ["</s>", "<unk>", *_pieces(raw / "source.spm"), "<pad>"]
    (raw / "target.spm").write_bytes((raw / "source.spm").read_bytes())
    (raw / "vocab.json").write_text(json.dumps({piece: number for number, piece in enumerate(pieces)}))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Recommended: pip install sacremoses")
        tokenizer = MarianTokenizer(str(raw / "source.spm"), str(raw / "target.spm"), str(raw / "vocab.json"))
    settings = MarianConfig(
        **_TINY,
        vocab_size=len(pieces),
        eos_token_id=0,
        pad_token_id=len(pieces) - 1,
        decoder_start_token_id=len(pieces) - 1,
        forced_eos_token_id=0,
    )
    with seeded(6):
        model = MarianMTModel(settings)
        for name, weights in model.named_parameters():
            if weights.dim() > 1 and "embed_positions" not in name:
                torch.nn.init.normal_(weights, std=0.6)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
