"""The picture that stands for a model: beside its file, and small in its header."""

from __future__ import annotations

from base64 import b64encode
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from sessions import files

if TYPE_CHECKING:
    from PIL.Image import Image

_SIDE = 1024
# modelspec advises a JPEG of at most 256 x 256 (modelspec.thumbnail): some 10 kB in the header.
_SMALL_SIDE = 256
_QUALITY = 80


def read_picture(path: str | None) -> Image | None:
    """A picture in RGB, at most 1024 pixels a side; None where none is named or it cannot be read.

    A picture that cannot be read is no reason to lose the model.
    """
    if not path:
        return None
    import PIL.Image

    try:
        with PIL.Image.open(path) as image:
            image.thumbnail((_SIDE, _SIDE))
            return image.convert("RGB")
    except (OSError, ValueError, PIL.Image.DecompressionBombError):
        return None


def thumbnail_of(picture: Image) -> str:
    """The picture as a data URI, for ``modelspec.thumbnail``."""
    small = picture.copy()
    small.thumbnail((_SMALL_SIDE, _SMALL_SIDE))
    content = BytesIO()
    small.save(content, "JPEG", quality=_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + b64encode(content.getvalue()).decode()


def write_preview(picture: Image, output: Path) -> Path:
    """Write ``<model>.preview.png`` beside a model.

    Raises:
        OSError: writing failed.
    """
    preview = output.with_name(f"{output.stem}.preview.png")
    content = BytesIO()
    picture.save(content, "PNG")
    files.write_bytes(preview, content.getvalue())
    return preview
