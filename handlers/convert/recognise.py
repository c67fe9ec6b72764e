"""What one file is: its family, prediction and variant, and the tensors of it that are the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from handlers.convert.ask import Weights
from handlers.convert.families import AVERAGES, BUFFERS, FOREIGN, V_MARK, ZERO_SNR_MARK
from handlers.convert.header import Header, read_header
from handlers.convert.plan import Located
from handlers.convert.source import tensors_of
from handlers.models.inspect import prediction_of
from handlers.models.probe import UNET, probe
from sessions.refusal import Refusal


@dataclass(frozen=True)
class Single:
    """One file, recognised.

    Attributes:
        path: where it lies.
        family: a name of ``families.FAMILIES``.
        prediction, variant: as in ``source.Pipeline``.
        zero_snr: whether it says that its noise schedule ends without signal.
        weights: which of its weights are taken.
        tensors: those of the model: no schedule, no averages, no marks.
    """

    path: Path
    family: str
    prediction: str
    variant: str
    zero_snr: bool
    weights: Weights
    tensors: Mapping[str, Located]


def read_single(path: Path, weights: Weights) -> Single:
    """Recognise a file.

    Raises:
        Refusal: it is damaged, unsafe, no checkpoint, of no family that is known, or its prediction cannot be told.
        OSError: it cannot be read.
    """
    located = tensors_of(path)
    foreign = [name for name in located if name.startswith(FOREIGN)]
    if foreign:
        raise Refusal(
            "source",
            f"{path.name} holds {foreign[0]}: a schedule or a part that fastsd cannot put into a Diffusers folder.",
            "Use the Diffusers folder of the same model, if its authors give one.",
        )
    found = probe({name: entry.tensor.shape for name, entry in located.items()})
    if found.kind != "checkpoint" or found.family is None:
        what = f"a {found.kind}" if found.kind and found.kind != "checkpoint" else "no checkpoint that fastsd knows"
        raise Refusal("source", f"{path.name} is {what}.", "SD 1, SD 2, SDXL and Flux checkpoints are converted.")
    header = Header({name: entry.tensor for name, entry in located.items()}, _metadata(path), 0)
    prediction = prediction_of(path, header, found)
    if prediction is None:
        raise Refusal(
            "source",
            f"Whether {path.name} predicts the noise or the velocity cannot be told.",
            f'Put a {path.stem}.yaml beside it with the line "parameterization: v" (or eps).',
        )
    variant = found.variant or "base"
    family = "sdxl-refiner" if (found.family, variant) == ("sdxl", "refiner") else found.family
    return Single(
        path,
        family,
        prediction,
        "base" if variant == "refiner" else variant,
        ZERO_SNR_MARK in located,
        weights,
        _model(path, located, weights),
    )


def _metadata(path: Path) -> Mapping[str, str]:
    return read_header(path).metadata if path.suffix == ".safetensors" else {}


def _model(path: Path, located: Mapping[str, Located], weights: Weights) -> dict[str, Located]:
    """The model's own tensors; the averages in place of the UNet's where they are asked for."""
    kept = {
        name: entry
        for name, entry in located.items()
        if not name.startswith((*BUFFERS, AVERAGES)) and name not in (V_MARK, ZERO_SNR_MARK)
    }
    if weights == "trained":
        return kept
    for name in kept:
        if name.startswith(UNET):
            # The averages' names are the parameters' without their dots.
            average = located.get(AVERAGES + name.removeprefix("model.").replace(".", ""))
            if average is None:
                raise Refusal("source", f"{path.name} holds no averaged weights.", "Convert it without --weights ema.")
            kept[name] = average
    return kept
