"""A model of the hub: the files that are needed and no others, each checked by its hash."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from handlers.context import Waiting
from handlers.models import catalogue, registry
from handlers.models.catalogue import Entry
from sessions import files
from sessions.refusal import Refusal

_SETTINGS = ("*.json", "*.txt", "*.model", "*.spm", "LICENSE*")
_LEFT_OUT = ("*.fp16.*", "*non_ema*", "*ema_only*", "*.msgpack", "*flax*", "*openvino*", "*.onnx*", "*.fp16-*")
_FREE_AFTER = 1 << 30


@dataclass(frozen=True)
class HubFile:
    """A file of a repository: its path, its bytes (0: not known) and its SHA-256, which only large ones have."""

    path: str
    size: int
    sha256: str | None


def wanted(available: Iterable[HubFile], entry: Entry) -> list[HubFile]:
    """The files of a repository that loading the model needs: settings, tokenizers, and each part's weights.

    Weights come as safetensors where a part has them, in full precision.
    """
    kept = [file for file in available if not any(fnmatchcase(file.path, pattern) for pattern in _LEFT_OUT)]
    folders = {part for part in entry.parts if part}
    chosen = []
    for file in kept:
        folder, _, name = file.path.rpartition("/")
        if folder.count("/") or (folder and not _belongs(folder, folders)):
            continue
        if any(fnmatchcase(name, pattern) for pattern in _SETTINGS):
            chosen.append(file)
    for part in entry.parts:
        inside = [file for file in kept if file.path.rpartition("/")[0] == part]
        weights = [file for file in inside if file.path.endswith(".safetensors")]
        chosen += weights or [file for file in inside if file.path.endswith(".bin")]
    return sorted(set(chosen), key=lambda file: (file.size, file.path))


def _belongs(folder: str, parts: set[str]) -> bool:
    return folder in parts or folder in {"scheduler", "tokenizer", "tokenizer_2", "feature_extractor"}


def fetch(entry: Entry, folder: Path, progress: Callable[[float, float], None], endpoint: str | None = None) -> Path:
    """Fetch a model's files into a folder; files that are whole already stay.

    Args:
        entry: what to fetch.
        folder: where to; the model counts as present once its index file is there, which comes last.
        progress: called with bytes done and in all.
        endpoint: the hub's address, if it is not the usual one.

    Raises:
        Refusal: the disk has no room, or a file arrived damaged.
        Waiting: the hub cannot be reached, or wants its licence accepted first.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        about = HfApi(endpoint=endpoint).model_info(entry.origin, files_metadata=True)
        available = [_hub_file(sibling) for sibling in about.siblings or []]
        needed = wanted(available, entry)
        _check_room(folder, sum(file.size for file in needed))
        # The index last: with it the model counts as present.
        needed.sort(key=lambda file: file.path == entry.index)
        _fetch_all(entry, folder, needed, progress, revision=about.sha, endpoint=endpoint)
    except GatedRepoError:
        raise Waiting(_gated(entry), retry_after=600.0) from None
    except RepositoryNotFoundError:
        raise Waiting(f"The hub has no {entry.origin} any more, or hides it from this token.", 600.0) from None
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, HfHubHTTPError, ConnectionError, TimeoutError) as error:
        raise Waiting(
            f"The hub cannot be reached ({type(error).__name__}). Try again later; it goes on there."
        ) from error
    except Exception as error:
        if type(error).__module__.split(".")[0] in {"httpx", "httpx2", "httpcore", "httpcore2"}:
            raise Waiting(f"The hub cannot be reached ({error}). Try again later; it goes on there.") from error
        raise
    if not registry.is_complete(folder, entry):
        raise Refusal(
            "download", f"The hub's copy of {entry.name} lacks weights.", "Bring the model into Models/ instead."
        )
    return folder


def _gated(entry: Entry) -> str:
    """What helps where the hub wants a licence to be accepted: without a token it cannot know who has."""
    from huggingface_hub import get_token

    what = f"{entry.name} is given out only to who accepted its licence ({entry.licence})"
    accept = f"accept it on {entry.page}"
    if get_token():
        return f"{what}, and the account of this token has not: {accept}, and see that the token may read such models."
    return f"{what}: {accept}, make a token on {catalogue.LOGIN_PAGE}, and set it as {catalogue.LOGIN_VARIABLE}."


def _hub_file(sibling: Any) -> HubFile:
    lfs = getattr(sibling, "lfs", None)
    return HubFile(sibling.rfilename, int(sibling.size or 0), lfs.sha256 if lfs else None)


def _fetch_all(
    entry: Entry,
    folder: Path,
    needed: list[HubFile],
    progress: Callable[[float, float], None],
    *,
    revision: str | None,
    endpoint: str | None,
) -> None:
    from huggingface_hub import hf_hub_download

    total = sum(file.size for file in needed)
    done = 0
    progress(done, total)
    for file in needed:
        bar = _bar(partial(_tell, progress, done, total))
        path = Path(
            hf_hub_download(
                entry.origin, file.path, revision=revision, local_dir=folder, endpoint=endpoint, tqdm_class=bar
            )
        )
        if file.sha256 and files.sha256_of(path) != file.sha256:
            path.unlink()
            raise Refusal("download", f"{file.path} of {entry.name} arrived damaged.", "Fetch it again.")
        done += file.size
        progress(done, total)


def _tell(progress: Callable[[float, float], None], base: int, total: int, received: int) -> None:
    progress(base + received, total)


def _bar(received: Callable[[int], None]) -> Any:
    """A silent tqdm class that tells how far one file is."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    class Bar(tqdm):  # type: ignore[misc] # it has no types
        """Counts what tqdm is told, prints nothing."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            known = {key: value for key, value in options.items() if key != "name"}
            super().__init__(*arguments, **{**known, "disable": False, "file": _Nowhere()})

        def update(self, n: float | None = 1) -> bool | None:
            shown = bool(super().update(n))
            received(int(self.n))
            return shown

    return Bar


class _Nowhere:
    """A text file that keeps nothing."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        """Nothing to flush."""


def _check_room(folder: Path, needed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    have = registry.size_of(folder)
    free = shutil.disk_usage(folder).free
    if free < max(needed - have, 0) + _FREE_AFTER:
        raise Refusal(
            "disk",
            f"The download needs {needed / 1e9:.1f} GB, and {folder} has {free / 1e9:.1f} GB free.",
            "Make room (1 GB should stay free), then fetch again: it goes on where it was.",
        )
