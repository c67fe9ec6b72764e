"""What the training scripts share: time as the budget, states that survive a kill, progress lines."""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from handlers.models import miniature
from sessions import files
from tools.miniature import muon

SAVE_SECONDS = 60.0
REPORT_SECONDS = 15.0
WARM_UP = 0.02
WEIGHTS_OF = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
}


class Budget:
    """Training by the clock: ``fraction`` runs from 0 to 1 while minutes pass, over all resumed parts together."""

    def __init__(self, minutes: float, spent: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = 60 * minutes
        self._clock = clock
        self._begin = clock() - spent

    @property
    def spent(self) -> float:
        """Seconds of training so far."""
        return self._clock() - self._begin

    @property
    def fraction(self) -> float:
        """The part of the budget that is spent, at most 1."""
        return min(self.spent / self._seconds, 1.0)


def learning_rate(highest: float, fraction: float) -> float:
    """A short linear warm-up, then a cosine to a hundredth."""
    if fraction < WARM_UP:
        return highest * (fraction + 1e-4) / (WARM_UP + 1e-4)
    return highest * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (fraction - WARM_UP) / (1 - WARM_UP))))


class Average:
    """An exponential moving average of weights; it forgets fast at first."""

    def __init__(self, modules: Iterable[torch.nn.Module], decay: float = 0.998) -> None:
        self.live = torch.nn.ModuleList(modules)
        self.mean = copy.deepcopy(self.live).requires_grad_(requires_grad=False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take in the live weights after a step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.mean.parameters()), list(self.live.parameters()), 1 - decay)


def run(
    state: Path,
    *,
    minutes: float,
    average: Average,
    optimizer: torch.optim.Optimizer | muon.Pair,
    step: Callable[[int, float], torch.Tensor],
    clip: float = 1.0,
) -> None:
    """Train until the minutes are spent, going on from ``state`` where it exists.

    Args:
        state: the file of weights, average, optimizer, step and time spent; saved every minute and at the end.
        minutes: of training in all, resumed parts included.
        average: the modules and their running mean.
        optimizer: its groups' learning rates at the time of the call are the highest.
        step: (number, fraction) → loss, a tensor to go backward from. Its data must follow from the number alone.
        clip: the gradient's largest norm.
    """
    count, spent = 0, 0.0
    highest = [group["lr"] for group in optimizer.param_groups]
    if state.is_file():
        saved = torch.load(state, weights_only=True)
        average.live.load_state_dict(saved["live"])
        average.mean.load_state_dict(saved["mean"])
        optimizer.load_state_dict(saved["optimizer"])
        count, spent, average.updates = saved["step"], saved["spent"], saved["updates"]
    budget = Budget(minutes, spent)
    losses: list[float] = []
    saved_at = told_at = time.monotonic()
    while budget.fraction < 1:
        for group, top in zip(optimizer.param_groups, highest, strict=True):
            group["lr"] = learning_rate(top, budget.fraction)
        loss = step(count, budget.fraction)
        if not torch.isfinite(loss):
            message = f"the loss is {loss.item()} at step {count}"
            raise RuntimeError(message)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(average.live.parameters(), clip)
        optimizer.step()
        average.update()
        count += 1
        losses.append(loss.item())
        now = time.monotonic()
        if now - told_at > REPORT_SECONDS:
            mean = sum(losses) / len(losses)
            print(f"{state.stem}: step {count}, {budget.spent / 60:.1f} of {minutes} min, loss {mean:.4f}", flush=True)
            losses.clear()
            told_at = now
        if now - saved_at > SAVE_SECONDS:
            _save(state, average, optimizer, count, budget.spent)
            saved_at = now
    _save(state, average, optimizer, count, budget.spent)


def _save(
    state: Path, average: Average, optimizer: torch.optim.Optimizer | muon.Pair, count: int, spent: float
) -> None:
    state.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_path(state) as temporary:
        torch.save(
            {
                "live": average.live.state_dict(),
                "mean": average.mean.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": count,
                "spent": spent,
                "updates": average.updates,
            },
            temporary,
        )


def load_mean(state: Path, modules: Iterable[torch.nn.Module]) -> dict[str, Any]:
    """Put a state's averaged weights into modules (in the order they were trained); gives its steps and minutes."""
    saved = torch.load(state, weights_only=True)
    torch.nn.ModuleList(modules).load_state_dict(saved["mean"])
    return {"step": saved["step"], "minutes": saved["spent"] / 60}


def load_shipped(module: torch.nn.Module, name: str, part: str) -> None:
    """Put the weights that the package ships of a miniature's part into a module, as float32."""
    weights = load_file(miniature.WEIGHTS / name / part / WEIGHTS_OF[part])
    module.load_state_dict({key: value.float() for key, value in weights.items()})


def arguments(description: str, minutes: float) -> argparse.ArgumentParser:
    """The options that every training script has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--state", type=Path, required=True, help="folder of resumable states")
    parser.add_argument("--minutes", type=float, default=minutes, help="of training in all (default %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--from-shipped", action="store_true", help="begin with the weights that the package has")
    parser.add_argument("--threads", type=int, default=None, help="of torch on the CPU")
    return parser


def set_up(options: argparse.Namespace) -> torch.device:
    """Apply ``--threads`` and ``--device``."""
    if options.threads:
        torch.set_num_threads(options.threads)
    return torch.device(options.device)
