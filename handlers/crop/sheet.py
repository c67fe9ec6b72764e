"""The contact sheet: every picture of a session, reduced, with its window drawn in and the word for what was found.

One look shows whether the crops keep what matters. What lies outside of a window is dimmed. The same pictures and
windows always give the same sheet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageEnhance, ImageFont

from handlers.context import JobContext, JobResult
from handlers.crop.decode import PIXEL_LIMIT, OpenPicture, read_source
from handlers.crop.render import write_picture
from sessions.refusal import Refusal

_TILES = ((24, 288), (80, 208), (200, 148))
"""Up to so many pictures → pixels of a tile's side; the more there are, the smaller."""
_GAP = 8
_GROUND = "#FFFFFF"
_INK = "#303030"
_DIMMED = 0.38
# Okabe and Ito's palette, which most colour-blind people can tell apart.
_COLOURS = {
    "face": "#009E73",
    "grounded": "#0072B2",
    "saliency": "#E69F00",
    "segment": "#CC79A7",
    "centre": "#D55E00",
}
_OTHER = "#56B4E9"


@dataclass(frozen=True)
class Shown:
    """One picture of a sheet.

    Attributes:
        source: the picture.
        box: its window, (x0, y0, x1, y1) in upright source pixels.
        finding: what its crop was made around: ``face``, ``grounded`` …; ``fixed`` where a person said where it is.
        wished: whether a person asked for it.
    """

    source: Path
    box: tuple[int, int, int, int]
    finding: str
    wished: bool

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> Shown:
        """Read an entry of the payload."""
        x0, y0, x1, y1 = (int(edge) for edge in value["box"])
        return cls(
            Path(value["source"]), (x0, y0, x1, y1), str(value.get("subject") or "centre"), bool(value.get("wished"))
        )

    @property
    def label(self) -> str:
        """The word under the picture."""
        if self.finding == "fixed":
            return "as wished"
        return f"{self.finding}, as wished" if self.wished else self.finding


class SheetHandler:
    """Draws contact sheets."""

    def run(self, context: JobContext) -> JobResult:
        """Draw one sheet. A picture that cannot be read leaves an empty tile: its own job has told why.

        Payload: ``output``; ``pictures`` [{``source``, ``box``, ``subject``, ``wished``}]; ``more``: how many pictures
        there are besides; ``pixel_limit``.
        """
        payload = context.payload
        pictures = [Shown.of(value) for value in payload["pictures"]]
        limit = int(payload.get("pixel_limit") or PIXEL_LIMIT)
        side = tile_side(len(pictures))
        tiles: list[Image.Image | None] = []
        for number, picture in enumerate(pictures, 1):
            tiles.append(tile_of(picture, side, limit))
            context.progress(number, len(pictures), "contact sheet")
        output = Path(payload["output"])
        write_picture(sheet(pictures, tiles, side, int(payload.get("more") or 0)), output)
        return JobResult({"pictures": len(pictures), "unread": tiles.count(None)}, [output])


def tile_side(count: int) -> int:
    """Pixels of the side of a tile on a sheet of so many pictures."""
    return next((side for most, side in _TILES if count <= most), _TILES[-1][1])


def tile_of(picture: Shown, side: int, pixel_limit: int = PIXEL_LIMIT) -> Image.Image | None:
    """A picture within ``side`` × ``side`` pixels, its window drawn in; None where it cannot be read."""
    try:
        opened = OpenPicture(read_source(picture.source), pixel_limit)
        decoded = opened.decode(side / opened.longer_side)
    except (Refusal, OSError):
        return None
    return with_window(decoded.image, decoded.size, picture, side)


def with_window(image: Image.Image, size: tuple[int, int], picture: Shown, side: int) -> Image.Image:
    """A decoded picture within ``side`` × ``side`` pixels, dimmed outside of its window.

    Args:
        image: RGB, upright, of any scale.
        size: (width, height) of the source, to which the window's pixels belong.
        picture: its window and finding.
        side: pixels.
    """
    scale = side / max(size)
    width, height = (max(1, round(length * scale)) for length in size)
    small = image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=2.0)
    x0, y0, x1, y1 = (round(edge * scale) for edge in picture.box)
    x0, y0 = min(max(x0, 0), width - 1), min(max(y0, 0), height - 1)
    x1, y1 = min(max(x1, x0 + 1), width), min(max(y1, y0 + 1), height)
    shown = Image.blend(Image.new("RGB", small.size, _GROUND), ImageEnhance.Color(small).enhance(0.4), _DIMMED)
    shown.paste(small.crop((x0, y0, x1, y1)), (x0, y0))
    line = max(2, side // 72)
    ImageDraw.Draw(shown).rectangle((x0, y0, x1 - 1, y1 - 1), outline=colour_of(picture.finding), width=line)
    return shown


def colour_of(finding: str) -> str:
    """The colour of a finding."""
    return _COLOURS.get(finding, _OTHER)


def sheet(pictures: Sequence[Shown], tiles: Sequence[Image.Image | None], side: int, more: int = 0) -> Image.Image:
    """The tiles in rows, each with its name and finding, and below them how many pictures are not on the sheet."""
    columns = max(1, min(len(pictures), round(math.sqrt(len(pictures) * 1.3))))
    rows = math.ceil(len(pictures) / columns)
    font = ImageFont.load_default(size=max(11, side // 17))
    line = round(font.getbbox("Äg")[3] * 1.15)
    cell = (side + _GAP, side + 2 * line + _GAP)
    width, height = columns * cell[0] + _GAP, rows * cell[1] + _GAP
    page = Image.new("RGB", (width, height + (line + _GAP if more else 0)), _GROUND)
    draw = ImageDraw.Draw(page)
    for number, (picture, tile) in enumerate(zip(pictures, tiles, strict=True)):
        left, top = _GAP + number % columns * cell[0], _GAP + number // columns * cell[1]
        if tile is not None:
            page.paste(tile, (left + (side - tile.width) // 2, top + (side - tile.height) // 2))
        else:
            draw.rectangle((left, top, left + side - 1, top + side - 1), outline="#C0C0C0")
        name = _cut(_printable(picture.source.name), font, side)
        draw.text((left, top + side + 1), name, font=font, fill=_INK)
        word = picture.label if tile is not None else "cannot be read"
        draw.text((left, top + side + 1 + line), word, font=font, fill=colour_of(picture.finding))
    if more:
        text = f"and {more} older picture{'' if more == 1 else 's'}"
        draw.text((_GAP, height), text, font=font, fill=_INK)
    return page


_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def _printable(name: str) -> str:
    """A name without what no font draws: bytes that are no UTF-8, line ends."""
    clean = name.encode("utf-8", errors="replace").decode("utf-8")
    return "".join(character if character.isprintable() else "?" for character in clean)


def _cut(name: str, font: _Font, width: int) -> str:
    """A name cut in its middle to fit a width: its end tells it from its neighbours."""
    if font.getlength(name) <= width:
        return name
    for kept in range(len(name) - 1, 1, -1):
        short = f"{name[: kept // 2]}…{name[len(name) - (kept - kept // 2) :]}"
        if font.getlength(short) <= width:
            return short
    return name[:1]
