"""``fastsd doctor``: what this machine has and lacks, and what to do about it."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import handlers
from daemon.cli import DONE, FAILED
from daemon.commands.roots import WrongUse, print_json, state_for
from daemon.config import BadSettings, Settings, load_settings
from daemon.state import cache_home, state_home
from handlers.models import registry, segments
from handlers.models.headers import HeaderError
from sessions.layout import MODELS
from sessions.refusal import Refusal
from sessions.status import size

_PARTS = {
    "crop": ("Pillow", "numpy", "opencv-python-headless"),
    "caption": ("torch", "transformers", "safetensors", "accelerate"),
    "train": ("diffusers", "peft", "matplotlib"),
}
_DEVICE_PROBE = """
import json, torch
found = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
print(json.dumps({"torch": torch.__version__, "gpus": [[p.name, p.total_memory] for p in found]}))
"""
_MARKS = {"ok": "ok  ", "note": "note", "fail": "FAIL"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: its name.
        state: ``ok``; ``note``: works without it, and this is what it would bring; ``fail``: fastsd cannot work so.
        says: what was found, and what to do.
    """

    what: str
    state: Literal["ok", "note", "fail"]
    says: str


def doctor(arguments: argparse.Namespace) -> int:
    """Look at everything; exit code 1 if something keeps fastsd from working."""
    failed = False
    for finding in examine(arguments.root):
        failed = failed or finding.state == "fail"
        if arguments.json:
            print_json(asdict(finding))
        else:
            print(f"{_MARKS[finding.state]}  {finding.what:<12} {finding.says}", flush=True)
    return FAILED if failed else DONE


def examine(root: Path | None) -> Iterator[Finding]:
    """Everything that is looked at, one after the other."""
    version = ".".join(str(part) for part in sys.version_info[:3])
    yield Finding("python", "ok" if sys.version_info >= (3, 11) else "fail", f"{version} (3.11 or newer is needed)")
    yield from _packages()
    yield from _croppers()
    yield _state_folder()
    yield from _watches()
    settings = Settings()
    if root is None:
        try:
            root = state_for(None).root
        except WrongUse:
            yield Finding("tree", "note", "no tree has been watched yet: fastsd init ROOT, then fastsd up ROOT")
    if root is not None:
        try:
            settings = load_settings(root)
            yield _tree(root, settings)
        except BadSettings as error:
            yield Finding("settings", "fail", str(error))
    yield from _models(root, settings)
    yield _segments(root)
    if settings.webui.kind != "none":
        yield _webui(settings)


def _packages() -> Iterator[Finding]:
    for extra, names in _PARTS.items():
        missing = []
        for name in names:
            try:
                metadata.version(name)
            except metadata.PackageNotFoundError:
                missing.append(name)
        if missing:
            advice = f"{', '.join(missing)} not installed: pip install 'fastsd[{extra}]'"
            yield Finding(extra, "note", advice)
        elif extra == "caption":
            yield _device()
        else:
            yield Finding(extra, "ok", ", ".join(f"{name} {metadata.version(name)}" for name in names))


def _croppers() -> Iterator[Finding]:
    """The networks that come with fastsd: an installation may have lost them."""
    folder = Path(handlers.__file__).parent / "crop"
    for label, place, what in (
        ("faces", "yunet/face_detection_yunet_2023mar.onnx", "YuNet finds faces"),
        ("foreground", "selfie/selfie_segmentation_landscape.tflite", "a small network tells what stands in front"),
    ):
        file = folder / place
        if file.is_file():
            yield Finding(label, "ok", f"{what} ({file.name}, {file.stat().st_size // 1000} kB, built in)")
        else:
            yield Finding(label, "fail", f"{file} is missing: install fastsd again")


def _segments(root: Path | None) -> Finding:
    """The salient-object network: nothing needs one."""
    network = segments.find(root / MODELS if root is not None else None, cache_home(os.environ))
    if network is None:
        says = "no salient-object network: pictures without a face are cropped around what stands out."
        return Finding("segment", "note", f"{says} {segments.ADVICE}")
    try:
        side = segments.read_interface(network.path).side
    except (HeaderError, OSError) as error:
        why = getattr(error, "strerror", None) or str(error)
        return Finding("segment", "note", f"{network.path} cannot be used: {why}. Get one with: {segments.GET}")
    told = f"{network.path} ({size(network.bytes)}, reads {side} × {side} pixels)"
    return Finding("segment", "ok", f"{told} is asked where no face and no grounded box is known")


def _device() -> Finding:
    # In a process of its own: torch takes seconds and hundreds of megabytes, and a broken driver may end it.
    try:
        done = subprocess.run(
            [sys.executable, "-c", _DEVICE_PROBE], capture_output=True, text=True, timeout=120, check=False
        )
        found = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        return Finding("torch", "fail", "torch is installed and does not start: reinstall it for this machine")
    gpus = ", ".join(f"{name} ({size(total)})" for name, total in found["gpus"])
    slowly = "no GPU: captioning and training run on the CPU, slowly"
    return Finding("torch", "ok", f"{found['torch']}, {gpus or slowly}")


def _state_folder() -> Finding:
    folder = state_home(os.environ)
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not os.access(existing, os.W_OK):
        return Finding("state", "fail", f"{folder} cannot be written: set FASTSD_STATE to a folder on a local disk")
    free = shutil.disk_usage(existing).free
    return Finding("state", "ok", f"{folder} ({size(free)} free)")


def _watches() -> Iterator[Finding]:
    limit = Path("/proc/sys/fs/inotify/max_user_watches")
    if limit.exists():
        most = int(limit.read_text())
        yield Finding("events", "ok", f"up to {most:,} folders can be watched by events, more by scans")


def _tree(root: Path, settings: Settings) -> Finding:
    if not root.is_dir():
        return Finding("tree", "fail", f"{root} is no folder: is it mounted? Make one with: fastsd init {root}")
    if not os.access(root, os.W_OK):
        return Finding("tree", "fail", f"{root} cannot be written by this user, and outputs lie beside the pictures")
    free = shutil.disk_usage(root).free
    if free < settings.limits.disk_reserve:
        return Finding("tree", "note", f"{root} has {size(free)} free: training will not start (limits.disk_reserve)")
    return Finding("tree", "ok", f"{root} ({size(free)} free)")


def _models(root: Path | None, settings: Settings) -> Iterator[Finding]:
    folder = root / MODELS if root is not None and (root / MODELS).is_dir() else None
    for label, name, kind in (("captioner", settings.captioner, "captioner"), ("base", settings.base, "checkpoint")):
        try:
            model = registry.check(name, kind, folder, cache_home(os.environ))
            yield Finding(label, "ok", f"{model.name} ({model.origin})")
        except registry.MissingModel as missing:
            yield Finding(label, "note", missing.reason)
        except Refusal as refusal:
            yield Finding(label, "fail", str(refusal))


def _webui(settings: Settings) -> Finding:
    from handlers.publish.ask import WebUIError
    from handlers.publish.connect import connect, probe

    try:
        probe(connect(settings.webui.model_dump(mode="json")))
    except (WebUIError, ValueError) as error:
        return Finding("webui", "note", f"{error} A finished model waits for it (or set webui.kind: none).")
    return Finding("webui", "ok", f"answers at {settings.webui.url}")
