"""The preview: a picture with the boxes of its caption drawn in."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from handlers.caption.clean import Entity

LONG_SIDE = 1024
# Distinct on any ground, the first ones most (Okabe and Ito's palette, which most colour-blind people can tell apart).
_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
_DARK = frozenset({"#0072B2", "#D55E00", "#009E73"})


def preview(image: Image.Image, entities: Sequence[Entity], caption: str) -> Image.Image:
    """The picture with each box and its phrase, and the caption below.

    Args:
        image: upright, RGB.
        entities: the boxes to draw; a phrase with several has one colour.
        caption: the line below the picture.

    Returns:
        The picture's part has a long side of at most ``LONG_SIDE`` pixels.
    """
    scale = min(1.0, LONG_SIDE / max(image.size))
    width, height = (max(1, round(length * scale)) for length in image.size)
    shown = image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=2.0)
    font = ImageFont.load_default(size=max(12, max(width, height) // 48))
    draw = ImageDraw.Draw(shown)
    line = max(2, max(width, height) // 300)
    phrases = list(dict.fromkeys(entity.phrase for entity in entities))
    labels = _Labels(draw, font, (width, height))
    for entity in entities:
        colour = _COLOURS[phrases.index(entity.phrase) % len(_COLOURS)]
        x0, y0, x1, y1 = entity.box
        box = (x0 * width, y0 * height, max(x1 * width, x0 * width + 1), max(y1 * height, y0 * height + 1))
        draw.rectangle(box, outline=colour, width=line)
        labels.add(entity.phrase, (box[0], box[1]), colour)
    labels.draw()
    return _with_caption(shown, caption, font)


_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


class _Labels:
    """The phrases on patches of their box's colour, drawn over all boxes, and not over each other."""

    def __init__(self, draw: ImageDraw.ImageDraw, font: _Font, size: tuple[int, int]) -> None:
        self._draw, self._font, self._size = draw, font, size
        self._placed: list[tuple[tuple[float, float, float, float], str, str]] = []

    def add(self, phrase: str, corner: tuple[float, float], colour: str) -> None:
        """Find a place: above the corner, below it where there is no room, lower still where another label lies."""
        left, top, right, bottom = self._draw.textbbox((0, 0), phrase, font=self._font)
        wide, high = right - left + 6, bottom - top + 6
        x = min(max(corner[0], 0), max(0, self._size[0] - wide))
        y = corner[1] - high if corner[1] >= high else corner[1]
        for other, _, _ in sorted(self._placed, key=lambda placed: placed[0][1]):
            if x < other[2] and other[0] < x + wide and y < other[3] and other[1] < y + high:
                y = other[3] + 1
        y = min(y, max(0, self._size[1] - high))
        self._placed.append(((x, y, x + wide, y + high), phrase, colour))

    def draw(self) -> None:
        """Draw them all."""
        for patch, phrase, colour in self._placed:
            self._draw.rectangle(patch, fill=colour)
            ink = "white" if colour in _DARK else "black"
            left, top, _, _ = self._draw.textbbox((0, 0), phrase, font=self._font)
            self._draw.text((patch[0] + 3 - left, patch[1] + 3 - top), phrase, font=self._font, fill=ink)


def _with_caption(image: Image.Image, caption: str, font: _Font) -> Image.Image:
    lines = _wrapped(caption, font, image.width - 12)
    height = round(font.getbbox("Äg")[3] * 1.25)
    sheet = Image.new("RGB", (image.width, image.height + height * len(lines) + 12), "white")
    sheet.paste(image, (0, 0))
    draw = ImageDraw.Draw(sheet)
    for index, line in enumerate(lines):
        draw.text((6, image.height + 6 + index * height), line, font=font, fill="black")
    return sheet


def _wrapped(text: str, font: _Font, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
