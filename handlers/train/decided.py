"""What ``auto`` became, in a few lines that fit on a phone: told before the first step of a run. Pure; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from handlers.train.plan import Plan


def decided(spec: Mapping[str, Any], plan: Plan, pictures: int) -> list[str]:
    """Each key of train.yaml that was left to fastsd, with what it became; a line a theme.

    Args:
        spec: the train.yaml as JSON values (``TrainSpec.to_json``).
        plan: what came out of it.
        pictures: how many are trained on.
    """
    counted = [f"steps are for {pictures} pictures"] if _counts_pictures(spec) else []
    themes = (
        _model(spec, plan),
        _words(spec, plan),
        _steps(spec, plan),
        _how(spec, plan),
        [*_seen(spec, plan), *counted],
    )
    return [", ".join(words) for words in themes if words]


def _model(spec: Mapping[str, Any], plan: Plan) -> list[str]:
    found = {"base": plan.base, "method": plan.method, "resolution": plan.resolution}
    return [f"{key} {value}" for key, value in found.items() if spec.get(key) == "auto"]


def _words(spec: Mapping[str, Any], plan: Plan) -> list[str]:
    captions = {"all": "true", "none": "false", "person": "those that people wrote"}[plan.captions]
    found = {
        "instance": plan.instance,
        "class": plan.class_ or "(no word)",
        "concept": plan.concept,
        "captions": captions,
    }
    return [f"{key} {value}" for key, value in found.items() if spec.get(key) == "auto"]


def _steps(spec: Mapping[str, Any], plan: Plan) -> list[str]:
    parts = (
        ("text_encoder", plan.text_encoder_steps, plan.text_encoder_rate),
        ("unet", plan.unet_steps, plan.unet_rate),
    )
    found = []
    for key, steps, rate in parts:
        section = spec.get(key) or {}
        words = [f"{steps:,} steps"] if section.get("steps") == "auto" else []
        if section.get("learning_rate") == "auto" and steps:
            words.append(f"at {rate_text(rate)}")
        if words:
            found.append(f"{key} {' '.join(words)}")
    return found


def _how(spec: Mapping[str, Any], plan: Plan) -> list[str]:
    found = {
        "batch_size": plan.batch_size,
        "optimizer": plan.optimizer,
        "precision": plan.precision,
        "offset_noise": f"{plan.offset_noise:g}",
    }
    words = [f"{key} {value}" for key, value in found.items() if spec.get(key) == "auto"]
    if spec.get("min_snr") is None and plan.min_snr is not None:
        words.append(f"min_snr {plan.min_snr:g}")
    if plan.prior_images and (spec.get("prior") or {}).get("caption_dropout") == "auto":
        words.append(f"prior.caption_dropout {plan.prior_caption_dropout:g}")
    if plan.prior_images and (spec.get("prior") or {}).get("target") == "auto":
        words.append(f"prior.target {plan.prior_target}")
    if spec.get("memory") == "auto":
        words += [
            word
            for word, holds in (
                (f"{plan.at_once} at once", 0 < plan.at_once < plan.pictures_a_step),
                ("gradient checkpointing", plan.checkpointing),
                ("base in 4 bits", plan.quantised),
                ("fused backward pass", plan.fused_backward),
                ("base in the CPU's memory", plan.offload),
            )
            if holds
        ]
    return words


def _seen(spec: Mapping[str, Any], plan: Plan) -> list[str]:
    held_out = [f"{plan.validation} pictures held out"] if spec.get("validation") == "auto" and plan.validation else []
    return [*([f"samples every {plan.sample_every:,} steps"] if spec.get("sample_every") == "auto" else []), *held_out]


def _counts_pictures(spec: Mapping[str, Any]) -> bool:
    return any((spec.get(key) or {}).get("steps") == "auto" for key in ("text_encoder", "unet"))


def rate_text(rate: float) -> str:
    """A learning rate as people write it: "2e-6"."""
    mantissa, mark, exponent = f"{rate:g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if mark else mantissa
