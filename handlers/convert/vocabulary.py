"""CLIP's tokenizer, which SD 1, SD 2, SDXL and Flux share, from its list of merges.

``configs/clip-merges.txt.gz`` is OpenAI CLIP's byte-pair vocabulary (MIT), cut to the merges that CLIP uses. The
vocabulary follows from it: the 256 bytes, the same at the end of a word, the merged pairs, start and end.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from sessions import files

_MERGES = Path(__file__).parent / "configs" / "clip-merges.txt.gz"
_START, _END = "<|startoftext|>", "<|endoftext|>"
POSITIONS = 77


def write_clip(folder: Path, padding: str) -> None:
    """Write the files of a CLIP tokenizer.

    Args:
        folder: an existing folder.
        padding: the token that fills a text up: the end token, or "!" in OpenCLIP's.
    """
    merges = _merges()
    files.write_text(folder / "vocab.json", json.dumps(vocabulary(merges), ensure_ascii=False))
    files.write_text(folder / "merges.txt", "#version: 0.2\n" + "\n".join(merges) + "\n")
    special = {"bos_token": _START, "eos_token": _END, "pad_token": padding, "unk_token": _END}
    files.write_json(folder / "special_tokens_map.json", special)
    more = {"tokenizer_class": "CLIPTokenizer", "model_max_length": POSITIONS, "do_lower_case": True}
    files.write_json(folder / "tokenizer_config.json", {**special, **more, "add_prefix_space": False})


def _merges() -> list[str]:
    return gzip.decompress(_MERGES.read_bytes()).decode().splitlines()


def vocabulary(merges: list[str]) -> dict[str, int]:
    """Token → number."""
    letters = [chr(code) for code in _printable()]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair.split()) for pair in merges)]
    return {token: number for number, token in enumerate([*tokens, _START, _END])}


def _printable() -> list[int]:
    """A visible character for each of the 256 bytes, in GPT-2's order: those that are visible first."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [*visible, *(256 + number for number in range(256 - len(visible)))]
