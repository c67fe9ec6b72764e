"""Resumable state: ``checkpoints/step-N/`` with weights, optimizer and ``state.json``, whole or not there.

``state.json`` names the size and SHA-256 of every other file; a folder that does not agree with it is damaged, and the
next older one counts. Temp folder, fsync, rename; the newest two of a run are kept.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from handlers.train.place import folder_in
from sessions import files
from sessions.layout import CHECKPOINTS

_NAME = re.compile(r"^step-(\d+)$")
KEPT = 2

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on the disk.

    Attributes:
        folder: where it lies.
        step: steps done, over both stages.
        state: what ``state.json`` says besides sizes and hashes.
    """

    folder: Path
    step: int
    state: Mapping[str, Any]

    def has(self, part: str) -> bool:
        """Whether it holds a part: ``unet``, ``text_encoder``, ``optimizer``."""
        return (self.folder / f"{part}.safetensors").is_file()

    def load(self, part: str) -> dict[str, torch.Tensor]:
        """The tensors of a part, on the CPU."""
        return load_file(self.folder / f"{part}.safetensors")

    def is_finite(self) -> bool:
        """Whether every number in it is one."""
        parts = [path.name.removesuffix(".safetensors") for path in sorted(self.folder.glob("*.safetensors"))]
        return all(bool(torch.isfinite(tensor).all()) for part in parts for tensor in self.load(part).values())


def save(session: Path, step: int, parts: Mapping[str, Tensors], state: Mapping[str, Any]) -> Path:
    """Write ``step-N`` and remove what is older than the newest two of the same run.

    Args:
        session: the session's folder.
        step: N, steps done over both stages.
        parts: name → tensors; each becomes ``<name>.safetensors``.
        state: JSON values; ``run`` must be among them.

    Returns:
        The folder.

    Raises:
        OSError: there is no room, or the folder is gone.
    """
    parent = folder_in(session, CHECKPOINTS)
    files.sweep_temporaries(parent)
    final = parent / f"step-{step}"
    temporary = files.temporary_name(final)
    temporary.mkdir()
    try:
        table = {}
        for name, tensors in parts.items():
            path = temporary / f"{name}.safetensors"
            save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, path)
            with path.open("rb") as file:
                files.sync_file(file)
            table[path.name] = {"bytes": path.stat().st_size, "sha256": files.sha256_of(path)}
        files.write_json(temporary / "state.json", {**state, "step": step, "files": table})
        files.sync_folder(temporary)
        _replace(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    prune(session, str(state["run"]), KEPT)
    return final


def _replace(temporary: Path, final: Path) -> None:
    """Rename a folder over what may be there: a damaged one, or one of another run."""
    if not final.exists():
        files.publish(temporary, final)
        return
    aside = files.temporary_name(final)
    final.rename(aside)
    files.publish(temporary, final)
    shutil.rmtree(aside, ignore_errors=True)


def newest(
    session: Path, run: str, damaged: Callable[[Path, str], None], at_most: int | None = None
) -> Checkpoint | None:
    """The newest whole checkpoint of a run, or None.

    Args:
        session: the session's folder.
        run: only this run's count.
        damaged: told of each newer one that is not whole, and why.
        at_most: only those of so many steps count; None: all.
    """
    for step, folder in _folders(session):
        if at_most is not None and step > at_most:
            continue
        state = _state(folder)
        if state is not None and state.get("run") != run:
            continue
        problem = "state.json cannot be read" if state is None else _problem(folder, step, state)
        if state is not None and problem is None:
            return Checkpoint(folder, step, state)
        damaged(folder, problem or "it is not whole")
    return None


def prune(session: Path, run: str, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints of a run."""
    mine = [folder for _, folder in _folders(session) if (_state(folder) or {}).get("run") == run]
    for folder in mine[keep:]:
        shutil.rmtree(folder, ignore_errors=True)


def _folders(session: Path) -> list[tuple[int, Path]]:
    """``step-N`` folders, newest first."""
    try:
        folders = list((session / CHECKPOINTS).iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    numbered = [(int(match[1]), folder) for folder in folders if (match := _NAME.match(folder.name))]
    return sorted(numbered, reverse=True)


def _state(folder: Path) -> dict[str, Any] | None:
    try:
        value = json.loads((folder / "state.json").read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) and isinstance(value.get("files"), dict) else None


def _problem(folder: Path, step: int, state: Mapping[str, Any]) -> str | None:
    if state.get("step") != step:
        return "it was renamed"
    for name, facts in state["files"].items():
        path = folder / Path(name).name
        try:
            if path.stat().st_size != facts["bytes"]:
                return f"{name} has another size than it was written with"
            if files.sha256_of(path) != facts["sha256"]:
                return f"{name} holds other bytes than were written"
        except OSError:
            return f"{name} cannot be read"
    return None
