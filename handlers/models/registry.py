"""The models that fastsd knows by name, and the files that people bring under ``Models/``.

Light to import: no torch, and huggingface_hub only when its cache has to be looked at. Nothing here uses the network.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from handlers.context import Waiting
from handlers.models import catalogue, inspect, miniature
from handlers.models.catalogue import Entry
from sessions.refusal import Refusal

SINGLE_FILES = (".safetensors", ".ckpt")
_BASES = frozenset({"checkpoint", "diffusers"})
_USUAL_RESOLUTION = 512
GPU_FOR_SDXL = 12 * 1024**3
_NOUNS = {"captioner": "captioner", "search": "search model", "translator": "translator", "vae": "VAE"}


@dataclass(frozen=True)
class Model:
    """A model on this machine, or one that could be.

    Attributes:
        name: the name people write in train.yaml and fastsd.yaml.
        family: sd1, sd2, sdxl, flux, kosmos2, blip2, florence2, clip, siglip, m2m100 or marian; "" where it cannot be
            told.
        kind: checkpoint (one file), diffusers (a folder), captioner, search, translator, lora, vae, controlnet,
            adapter, text-encoder, embedding or segment.
        path: the file or folder to load; where it would be put, if it is not present.
        resolution: the side in pixels that it draws or reads at; 0 where it has none of its own.
        bytes: size on disk; the size of the download, where known, if it is not present.
        origin: a hub id, an https address, ``built-in`` or ``Models/``.
        present: whether it can be loaded now, without the network.
    """

    name: str
    family: str
    kind: str
    path: Path
    resolution: int
    bytes: int
    origin: str
    present: bool

    def to_json(self) -> dict[str, Any]:
        """The row of ``fastsd models list --json``."""
        return {**asdict(self), "path": os.fspath(self.path)}


class MissingModel(Waiting):
    """A model that fastsd knows is not on this machine; the reason names the command that fetches it."""


def auto_base(gpu_bytes: int) -> str:
    """The base that ``base: auto`` means on a machine whose GPU has so much memory (0: no GPU)."""
    return "sdxl" if gpu_bytes >= GPU_FOR_SDXL else "sd15"


def list_models(models_folder: Path | None, cache: Path) -> list[Model]:
    """Every model known by name, and every one under ``Models/``, in that order. Nothing is built or fetched."""
    known = [_known(entry, cache) for entry in catalogue.ENTRIES.values()]
    return known + (list(_brought(models_folder)) if models_folder else [])


def find(name: str, kind: str, models_folder: Path | None, cache: Path) -> Model:
    """The model that a person named, ready to be loaded; a miniature that is not there yet is built (with torch).

    Arguments and errors are those of ``check``.
    """
    return _built(check(name, kind, models_folder, cache), cache)


def check(name: str, kind: str, models_folder: Path | None, cache: Path) -> Model:
    """The model that a person named, without building or loading anything: light enough for the daemon.

    Args:
        name: a registered name, ``auto``, or a name, file or folder under ``models_folder`` (with or without suffix).
        kind: ``checkpoint`` (or ``diffusers``: either is a base, file or folder), ``captioner``, ``search``,
            ``translator`` or ``vae``.
        models_folder: the tree's ``Models/``; None where there is none.
        cache: the folder of downloads and built miniatures.

    Raises:
        MissingModel: the name is known, and the model is not on this machine.
        Refusal: no such name is known, it is of another kind, or it leaves the tree.
    """
    wanted = _BASES if kind in _BASES | {"base"} else frozenset({kind})
    spoken = _without_auto(name.strip(), wanted)
    if wanted == _BASES and name.strip().lower() == "auto":
        spoken = _auto_base_here(cache) or spoken
    entry = catalogue.ENTRIES.get(spoken.lower())
    if entry and entry.kind in wanted:
        model = _known(entry, cache)
        if model.present:
            return model
        own = _under(spoken, models_folder, wanted)
        if own is None:
            raise MissingModel(_missing(entry), retry_after=60.0)
        return own
    own = _under(spoken, models_folder, wanted)
    if own is None:
        raise _unknown(spoken, wanted, models_folder)
    return own


def resolution_of(name: str, models_folder: Path | None, cache: Path) -> int:
    """The side in pixels that a base draws at, be it here or not; 512 where nobody knows.

    Args:
        name: as train.yaml has it.
        models_folder: the tree's ``Models/``; None where there is none.
        cache: the folder of downloads.
    """
    try:
        return check(name, "checkpoint", models_folder, cache).resolution or _USUAL_RESOLUTION
    except MissingModel:
        entry = catalogue.ENTRIES[_without_auto(name.strip(), _BASES).lower()]
        return entry.resolution
    except Refusal:
        return _USUAL_RESOLUTION


def _auto_base_here(cache: Path) -> str | None:
    """The smallest base that ``auto`` can mean and that is here; the worker knows whether it can train the larger."""
    names = (auto_base(0), auto_base(GPU_FOR_SDXL))
    return next((name for name in names if _known(catalogue.ENTRIES[name], cache).present), None)


def _without_auto(name: str, wanted: frozenset[str]) -> str:
    if "captioner" in wanted:
        return {"auto": "kosmos-2", "miniature": "miniature-captioner"}.get(name.lower(), name)
    if "search" in wanted:
        return {"auto": "siglip2-base", "miniature": "miniature-search"}.get(name.lower(), name)
    if wanted & {"translator", "vae"}:
        return name
    return auto_base(0) if name.lower() == "auto" else name


def _built(model: Model, cache: Path) -> Model:
    if model.origin != catalogue.BUILT_IN:
        return model
    folder = miniature.ensure(model.name, cache)
    return Model(**{**asdict(model), "path": folder, "bytes": size_of(folder)})


def _known(entry: Entry, cache: Path) -> Model:
    if entry.origin == catalogue.BUILT_IN:
        path, present = miniature.folder_of(entry.name, cache), entry.name in miniature.NAMES
    else:
        place = local_copy(entry, cache)
        path, present = place or cache / "models" / entry.name, place is not None
    size = (size_of(path) if present else 0) or entry.bytes
    return Model(entry.name, entry.family, entry.kind, path, entry.resolution, size, entry.origin, present)


def local_copy(entry: Entry, cache: Path) -> Path | None:
    """The folder of a download: where ``fastsd models get`` puts it, else the Hugging Face cache, if complete."""
    ours = cache / "models" / entry.name
    if is_complete(ours, entry):
        return ours
    if "://" in entry.origin:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(entry.origin, entry.index)
    if not isinstance(found, str):
        return None
    snapshot = Path(found).parent
    return snapshot if is_complete(snapshot, entry) else None


def is_complete(folder: Path, entry: Entry) -> bool:
    """Whether a downloaded folder has its index file and, for each part that the index names, some weights."""
    if not (folder / entry.index).is_file():
        return False
    return all(_has_weights(folder / part) for part in entry.parts)


def _has_weights(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "*.bin"))


def _missing(entry: Entry) -> str:
    noun = _NOUNS.get(entry.kind, "base")
    missing = f"The {noun} {entry.name} is not on this machine. Get it with: fastsd models get {entry.name}"
    if not entry.gated:
        return missing
    login = f"set {catalogue.LOGIN_VARIABLE} to a token of your account"
    return f"{missing} (first accept its licence on {entry.page}, and {login})"


def _brought(models_folder: Path) -> Iterator[Model]:
    """What lies in ``Models/``, at most two folders deep: single files, Diffusers and transformers folders."""
    top = os.path.realpath(models_folder)
    for parent, folders, names in os.walk(models_folder):
        here = Path(parent)
        for folder in sorted(folders):
            if folder.startswith(".") or not _inside(here / folder, top):
                folders.remove(folder)
            elif inspect.folder_kind(here / folder):
                folders.remove(folder)
                yield _own(here / folder, models_folder)
        if len(here.relative_to(models_folder).parts) >= 2:
            folders.clear()
        folders.sort()
        for name in sorted(names):
            path = here / name
            if path.suffix.lower() in SINGLE_FILES and not name.startswith(".") and _inside(path, top):
                yield _own(path, models_folder)


def _own(path: Path, models_folder: Path) -> Model:
    found = inspect.inspect(path)
    name = path.relative_to(models_folder)
    spoken = name.with_suffix("") if path.is_file() else name
    resolution = catalogue.RESOLUTIONS.get((found.family, found.prediction), 0)
    present = not found.problems and found.safe is not False
    kind, size = found.kind or "checkpoint", size_of(path)
    return Model(spoken.as_posix(), found.family or "", kind, path, resolution, size, "Models/", present)


def _under(name: str, models_folder: Path | None, wanted: frozenset[str]) -> Model | None:
    """The model of that name under ``Models/``, or None.

    Raises:
        Refusal: the name is a URL, or points outside, or the file there cannot be used.
    """
    if "://" in name:
        raise Refusal("model", f"{name} is a URL.", f"Fetch it first: fastsd models get {name}")
    if models_folder is None or not name:
        return None
    path = _existing(models_folder, name)
    if path is None:
        return None
    if not _inside(path, os.path.realpath(models_folder)):
        raise Refusal(
            "model", f"{name} lies outside the folder Models.", "Put the model into Models/ and write its name."
        )
    model = _own(path, models_folder)
    if not model.present:
        problems = " ".join(inspect.inspect(path).problems) or "It holds code that would run when it is opened."
        raise Refusal(
            "model", f"Models/{model.name} cannot be used. {problems}", "Bring the file again, or name another."
        )
    if model.kind not in wanted:
        raise Refusal("model", f"Models/{model.name} is a {model.kind}.", f"Name a {' or '.join(sorted(wanted))}.")
    return model


def _existing(models_folder: Path, name: str) -> Path | None:
    """The first of ``name``, ``name.safetensors``, ``name.ckpt`` that exists; ``Models/`` before it may be left out."""
    relative = name.removeprefix("Models/").strip("/") if not name.startswith("/") else name
    candidates = [models_folder / relative, *(models_folder / f"{relative}{suffix}" for suffix in SINGLE_FILES)]
    usable = (path for path in candidates if path.is_file() or (path.is_dir() and inspect.folder_kind(path)))
    return next(usable, None)


def _inside(path: Path, top: str) -> bool:
    """Whether a path, all links followed, lies below ``top`` (which is a real path)."""
    real = os.path.realpath(path)
    return real.startswith(top + os.sep)


def _unknown(name: str, wanted: frozenset[str], models_folder: Path | None) -> Refusal:
    names = [entry.name for entry in catalogue.ENTRIES.values() if entry.kind in wanted]
    noun = next((noun for kind, noun in _NOUNS.items() if kind in wanted), "base")
    where = " or under Models/" if models_folder else ""
    return Refusal("model", f"No {noun} called {name!r} is known{where}.", f"Known: {', '.join(names)}.")


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; 0 if it does not exist."""
    if path.is_file():
        return path.stat().st_size
    return sum(entry.stat().st_size for entry in path.rglob("*") if entry.is_file())
