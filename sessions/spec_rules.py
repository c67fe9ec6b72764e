"""Which values of ``train.yaml`` make no sense together, and what to write instead."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sessions.refusal import Refusal
from sessions.spec_model import TrainSpec
from sessions.spec_text import Lines

_OUTSIDE = re.compile(r"://|\\|^/|^~|^[A-Za-z]:|(^|/)\.\.(/|$)")
# Base names the registry knows → side lengths (pixels) that its architecture was made for.
RESOLUTIONS: dict[str, tuple[int, int]] = {
    "miniature": (64, 128),
    "miniature-sd2": (64, 128),
    "miniature-sdxl": (64, 128),
    "sd15": (256, 768),
    "sd21": (256, 768),
    "sd21-768": (512, 1024),
    "sdxl": (512, 1536),
    "flux-dev": (256, 1536),
    "flux-schnell": (256, 1536),
}
# GB of GPU memory without which all of a base cannot be trained, by the smallest of the presets.
_LEAST_MEMORY = {"sd21-768": 12, "sdxl": 24}
FLUX = ("flux-dev", "flux-schnell")


def kept_steps(save_every: int, save_from: int, unet_steps: int) -> range:
    """The steps of stage 2 after which an intermediate model is kept; that of the last step is the result.

    As in fast-stable-diffusion: the first at ``save_from``, then every ``save_every``.
    """
    return range(save_from or save_every, unet_steps, save_every) if save_every else range(0)


def refuse_combinations(spec: TrainSpec, lines: Lines) -> None:
    """Refuse the first combination that cannot be.

    Raises:
        Refusal: code ``spec``: with the line, the reason and the fix.
    """
    for key, name in (("base", spec.base), ("vae", spec.vae)):
        if _OUTSIDE.search(name):
            raise Refusal(
                "spec",
                f"{key}: {name} points outside of the tree.",
                "Put the file or folder under Models/ and write its name.",
                lines.of(key),
            )
    smallest, largest = RESOLUTIONS.get(spec.base, (64, 2048))
    if isinstance(spec.resolution, int) and not smallest <= spec.resolution <= largest:
        raise Refusal(
            "spec",
            f"{spec.base} cannot be trained at {spec.resolution} pixels.",
            f"Write a resolution from {smallest} to {largest}, or auto.",
            lines.of("resolution"),
        )
    if spec.method not in ("auto", "dreambooth") and spec.unet.steps == 0:
        raise Refusal(
            "spec",
            f"method: {spec.method} trains the UNet, and unet.steps is 0.",
            "Give it steps, leave them out, or use dreambooth to train the text encoder alone.",
            lines.of("unet", "steps"),
        )
    least = _LEAST_MEMORY.get(spec.base, 0)
    if spec.method in ("dreambooth", "finetune") and spec.memory != "auto" and int(spec.memory[:-2]) < least:
        raise Refusal(
            "spec",
            f"All of {spec.base} cannot be trained in memory: {spec.memory}; it takes a GPU of {least} GB or more.",
            "Use method: lora.",
            lines.of("memory"),
        )
    problem = flux_problem(spec, spec.method, spec.base) if spec.base in FLUX else None
    if problem:
        raise Refusal("spec", problem.what, problem.advice, lines.of(*problem.key))
    if spec.continue_ is not None and spec.base != "auto":
        raise Refusal(
            "spec",
            f"continue: {spec.continue_} starts from a model of this session, and base: {spec.base} from another.",
            "Leave one of them out.",
            lines.of("base"),
        )
    if spec.text_encoder.steps == 0 and spec.unet.steps == 0:
        raise Refusal(
            "spec",
            "With text_encoder.steps and unet.steps both 0 there is nothing to train.",
            "Give one of them steps, or leave them out.",
            lines.of("unet", "steps"),
        )
    _refuse_keeping_nothing(spec, lines)


def _refuse_keeping_nothing(spec: TrainSpec, lines: Lines) -> None:
    if spec.save_from and not spec.save_every:
        raise Refusal(
            "spec",
            f"save_from: {spec.save_from} says from when on intermediate models are kept, and save_every keeps none.",
            "Write a number of steps for save_every, or leave save_from out.",
            lines.of("save_from"),
        )
    if isinstance(spec.unet.steps, int):
        require_kept(spec, spec.unet.steps, lines.of("save_from" if spec.save_from else "save_every"))


def require_kept(spec: TrainSpec, unet_steps: int, line: int | None = None) -> None:
    """Refuse to keep intermediate models of a run that ends before the first of them.

    Args:
        spec: the train.yaml.
        unet_steps: what its run has.
        line: of the key at fault, where it is known.

    Raises:
        Refusal: code ``spec``.
    """
    if spec.save_every and not kept_steps(spec.save_every, spec.save_from, unet_steps):
        first = spec.save_from or spec.save_every
        raise Refusal(
            "spec",
            f"The first intermediate model would be that of step {first}, and the run has {unet_steps} unet steps.",
            f"Write a {'save_from' if spec.save_from else 'save_every'} below {unet_steps}, or leave it out.",
            line,
        )


@dataclass(frozen=True)
class Problem:
    """Something that cannot be: the key at fault, what is wrong, and what to write instead."""

    key: tuple[str, ...]
    what: str
    advice: str


def flux_problem(spec: TrainSpec, method: str, base: str) -> Problem | None:
    """What a train.yaml asks of a Flux base that it does not do; None where nothing.

    Args:
        spec: the file.
        method: as written, or what ``auto`` means.
        base: the base's name.
    """
    if method in ("dreambooth", "finetune"):
        return Problem(
            ("method",),
            f"All of {base} cannot be trained: 12 billion numbers, their gradients and moments fit no single GPU.",
            "Use method: lora, or dora.",
        )
    if spec.text_encoder.steps not in ("auto", 0):
        return Problem(
            ("text_encoder", "steps"),
            f"The text encoders of {base} are not trained.",
            "Leave text_encoder out, or write steps: 0.",
        )
    if spec.lora.convolutions is True:
        return Problem(
            ("lora", "convolutions"),
            f"{base} has no convolutions: its LoRA is in the linear layers of its blocks.",
            "Leave convolutions out.",
        )
    if spec.min_snr is not None:
        return Problem(
            ("min_snr",),
            f"min_snr weighs the noise schedules of Stable Diffusion; {base} learns a flow, which has none.",
            "Leave min_snr out.",
        )
    if spec.offset_noise not in ("auto", 0):
        return Problem(
            ("offset_noise",),
            f"offset_noise mends schedules that never come to pure noise; {base} learns a flow, which does.",
            "Leave offset_noise out.",
        )
    return None
