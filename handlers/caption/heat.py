"""Heat maps as a sheet: the picture with its boxes, then one tile a word with what the model looked at, and its box."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from handlers.caption.attention import Attention
from handlers.caption.clean import Entity
from handlers.caption.draw import preview

TILE = 224
_COLUMNS = 4
_GAP = 8
_TITLE = 22
# From cold to hot: dark blue, purple, orange, yellow; its lightness rises all the way, so it reads without colours too.
_SCALE = np.array([(0, 0, 60), (110, 20, 120), (225, 90, 50), (255, 220, 80)], np.float64)


def sheet(picture: Image.Image, found: Attention) -> Image.Image:
    """Draw a sheet.

    Args:
        picture: upright, RGB.
        found: from ``attention.attend`` of the same picture.
    """
    entities = [Entity(item.phrase, None, box) for item in found.utterance.grounded for box in item.boxes]
    shown = preview(picture, entities, " ".join(found.utterance.text.split()))
    width = _COLUMNS * (TILE + _GAP) + _GAP
    shown = shown.resize((width, max(1, round(shown.height * width / shown.width))), Image.Resampling.LANCZOS)
    rows = -(-len(found.words) // _COLUMNS)
    canvas = Image.new("RGB", (width, shown.height + rows * (TILE + _TITLE + _GAP) + _GAP), "white")
    canvas.paste(shown, (0, 0))
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=16)
    small = picture.resize((TILE, TILE), Image.Resampling.LANCZOS)
    for index, word in enumerate(found.words):
        left = _GAP + index % _COLUMNS * (TILE + _GAP)
        top = shown.height + _GAP + index // _COLUMNS * (TILE + _TITLE + _GAP)
        draw.text((left, top), word.text, font=font, fill="black")
        canvas.paste(overlaid(small, found.heat[index]), (left, top + _TITLE))
        # Boxes belong to phrases; a phrase without one is not among the grounded.
        if word.phrase is not None and word.phrase < len(found.utterance.grounded):
            for x0, y0, x1, y1 in found.utterance.grounded[word.phrase].boxes:
                corners = (left + x0 * TILE, top + _TITLE + y0 * TILE, left + x1 * TILE, top + _TITLE + y1 * TILE)
                draw.rectangle(corners, outline="white", width=2)
    return canvas


def overlaid(picture: Image.Image, heat: np.ndarray) -> Image.Image:
    """A picture under a map [N, N]: the hottest patch is opaque for two thirds, the coldest for one third."""
    low, high = float(heat.min()), float(heat.max())
    scaled = (heat - low) / (high - low) if high > low else np.zeros_like(heat)
    grey = Image.fromarray((scaled * 255).astype(np.uint8))
    smooth = np.asarray(grey.resize(picture.size, Image.Resampling.BICUBIC), np.float64) / 255
    place = smooth * (len(_SCALE) - 1)
    step = np.minimum(place.astype(int), len(_SCALE) - 2)
    part = (place - step)[..., None]
    colours = _SCALE[step] * (1 - part) + _SCALE[step + 1] * part
    alpha = (1 + smooth[..., None]) / 3
    mixed = np.asarray(picture, np.float64) * (1 - alpha) + colours * alpha
    return Image.fromarray(mixed.astype(np.uint8))
