"""Pictures of a training: the loss curve and grids of samples."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from sessions import files
from sessions.layout import PREVIEWS

_TEXT = 12
_MARGIN = 4


def smooth(values: Sequence[float], weight: float = 0.95) -> list[float]:
    """The exponential moving average, corrected for its start (Adam's correction, Kingma & Ba 2014)."""
    smoothed, average = [], 0.0
    for count, value in enumerate(values, 1):
        average = weight * average + (1 - weight) * value
        smoothed.append(average / (1 - weight**count))
    return smoothed


def write_loss_curve(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw loss over steps and the learning rate below it, a colour a stage, as PNG.

    Args:
        path: where to write.
        rows: those of ``metrics.jsonl``: ``step``, ``stage``, ``loss``, ``learning_rate``, and where it was
            measured ``validation_loss``, which gets a line of its own.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for stage in sorted({int(row["stage"]) for row in rows}):
        own = [row for row in rows if row["stage"] == stage]
        steps, values = [row["step"] for row in own], [float(row["loss"]) for row in own]
        losses.plot(steps, values, color=f"C{stage - 1}", alpha=0.2, linewidth=0.7)
        losses.plot(steps, smooth(values), color=f"C{stage - 1}", label=f"stage {stage}")
        measured = [row for row in own if row.get("validation_loss") is not None]
        if measured:
            losses.plot(
                [row["step"] for row in measured],
                [float(row["validation_loss"]) for row in measured],
                color="black",
                marker=".",
                linewidth=1.0,
                label=f"held-out pictures, stage {stage}",
            )
        rates.plot(steps, [float(row["learning_rate"]) for row in own], color=f"C{stage - 1}")
    losses.set_ylabel("loss")
    rates.set_ylabel("learning rate")
    rates.set_xlabel("step")
    if rows:
        losses.legend(loc="upper right")
    with files.atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def grid(pictures: Sequence[Image.Image], prompts: Sequence[str], columns: int) -> Image.Image:
    """Pictures side by side, each with its prompt below.

    Args:
        pictures: of one size.
        prompts: one a picture.
        columns: pictures a row.
    """
    width, height = pictures[0].size
    cell = max(width, 128)
    font = ImageFont.load_default(_TEXT)
    wrapped = [textwrap.wrap(prompt, max(12, cell // 7))[:3] for prompt in prompts]
    text_height = max(map(len, wrapped)) * (_TEXT + 3) + _MARGIN
    rows = -(-len(pictures) // columns)
    columns = min(columns, len(pictures))
    sheet = Image.new(
        "RGB", (columns * (cell + _MARGIN) + _MARGIN, rows * (height + text_height + _MARGIN) + _MARGIN), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for index, (picture, lines) in enumerate(zip(pictures, wrapped, strict=True)):
        x = _MARGIN + index % columns * (cell + _MARGIN)
        y = _MARGIN + index // columns * (height + text_height + _MARGIN)
        sheet.paste(picture, (x + (cell - width) // 2, y))
        draw.multiline_text((x, y + height + 2), "\n".join(lines), fill="black", font=font, spacing=2)
    return sheet


def write_grid(path: Path, sheet: Image.Image) -> None:
    """Write a grid as JPEG."""
    with files.atomic_path(path) as temporary:
        sheet.save(temporary, format="JPEG", quality=92)


def sample_name(total: int) -> str:
    """The name of the sample grid of a step."""
    return f"samples-step-{total}.jpg"


def last_sample(session: Path, total: int) -> Path | None:
    """The sample grid of the last step, if one was drawn."""
    path = session / PREVIEWS / sample_name(total)
    return path if path.is_file() else None
