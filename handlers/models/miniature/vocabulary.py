"""The miniatures' words, and their tokenizers' tables in the layouts of CLIP and Kosmos-2.

Both tables are functions of the word lists below, so the same bytes come out on every machine.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

_SHAPES = "circle square triangle diamond cross ring heart moon star hexagon rectangle oval"
_COLOURS = "red green blue yellow orange purple pink cyan white black gray brown"
_WORLD = """
    a an and the of on in at with image picture photo background small large medium big tiny plain striped dotted
    checkered textured left right top bottom center middle above below beside corner next to two three four one
    object shape thing
"""
# Whoever teaches a miniature something writes about more than shapes; these words stay whole then.
_COMMON = """
    is it that for as by from into over under near style painting drawing portrait person people man woman child
    boy girl face hand head eye hair dog cat bird horse animal flower tree leaf grass sky cloud sea water river
    mountain field road street city house building room window door wall table chair cup bottle plate food fruit
    apple car bus train bicycle boat sun light shadow dark bright night day color colour new old young long short
    high low wide round toy teddy bear book paper clock coin coffee motorcycle rocket space suit camera holding
    wearing standing sitting looking smiling
"""
WORDS = tuple(dict.fromkeys(f"{_SHAPES} {_COLOURS} {_WORLD} {_COMMON}".split()))

CLIP_START = "<|startoftext|>"
CLIP_END = "<|endoftext|>"
_WORD_END = "</w>"


def byte_alphabet() -> list[str]:
    """The 256 printable stand-ins that byte-level BPE uses for bytes, in CLIP's order (GPT-2's bytes_to_unicode)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(code) for code in printable] + [chr(256 + index) for index in range(len(rest))]


def byte_pair_merges(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Learn merges until every word is one token: the most frequent pair first, ties by the alphabet.

    The algorithm is byte pair encoding (Sennrich et al. 2016) run to its end on a word list.
    """
    pieces = [[*word[:-1], word[-1] + _WORD_END] for word in words]
    merges: list[tuple[str, str]] = []
    while True:
        counts = Counter(pair for word in pieces for pair in pairwise(word))
        if not counts:
            return merges
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        pieces = [_merge(word, best) for word in pieces]


def _merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The token table and merges of the miniature CLIP tokenizer: bytes, bytes at a word's end, merges, start, end."""
    merges = byte_pair_merges(WORDS)
    alphabet = byte_alphabet()
    tokens = [*alphabet, *(character + _WORD_END for character in alphabet), *("".join(pair) for pair in merges)]
    tokens = [*dict.fromkeys(tokens), CLIP_START, CLIP_END]
    return {token: index for index, token in enumerate(tokens)}, merges


def kosmos_vocabulary() -> list[tuple[str, float]]:
    """The pieces and log-scores of the miniature Kosmos-2 tokenizer, XLM-RoBERTa's layout: <s>, <pad>, </s>, <unk>.

    Whole words score above any spelling by letters; every printable ASCII character is a piece of its own.
    """
    special = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    cased = dict.fromkeys(variant for word in WORDS for variant in (word, word.capitalize()))
    words = [("▁" + word, -1.0) for word in cased if len(word) > 1]
    characters = [(chr(code), -10.0) for code in range(ord("!"), ord("~") + 1)]
    starts = [("▁" + letter, -3.0) for letter in "aA"]
    return [
        *special,
        (",", -2.0),
        (".", -2.0),
        *starts,
        *words,
        ("▁", -8.0),
        *(c for c in characters if c[0] not in ",."),
    ]
