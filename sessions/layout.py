"""Where things lie in a tree: which session a path belongs to, what it is there, and what its outputs are called.

Everything here is a pure function of names, but ``find_session_folder``, which looks for a folder that was renamed.
Paths inside a tree are strings, relative to the root and separated by ``/``; bytes that are no UTF-8 are
surrogate-escaped, as ``os.fsdecode`` does.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

SESSIONS = "Sessions"
MODELS = "Models"
CAPTIONS = "captions"
CONCEPT_IMAGES = "concept_images"
INSTANCE_IMAGES = "instance_images"
CROPS = "crops"
PREVIEWS = "previews"
CHECKPOINTS = "checkpoints"
RUNS = "runs"
PRIVATE = ".fastsd"
FINISHED = f"{PRIVATE}/finished"
"""Where a run leaves its models, as folders, until their files are proven."""
KEPT_FACTS = "intermediate.json"
"""In the folder of an intermediate model: of which run and step it is, and what its file is to say."""
STATUS = "STATUS.txt"
SETTINGS = "fastsd.yaml"
EXAMPLE = "train.example.yaml"
SPEC_NAMES = ("train.yaml", "train.yml", "train.yaml.txt")
WISHES_NAMES = ("crop.txt", "crop.txt.txt")
SHEET = f"{PREVIEWS}/crops.jpg"
ERROR_SUFFIX = ".error.txt"
PIPELINE_INDEX = "model_index.json"
"""What makes a folder a model in Diffusers' layout."""

OWN_FOLDERS = frozenset({CROPS, PREVIEWS, CHECKPOINTS, RUNS, PRIVATE})
PICTURE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif", ".apng"},
)
MODEL_SUFFIXES = frozenset({".safetensors", ".ckpt"})
# What WebUIs want beside a model that predicts the velocity carries the model's name, which ends in its run's.
_MODEL_YAML = re.compile(r"-\d{6}-[0-9a-f]{4}(-step-\d+)?\.yaml$")
_NAME_BYTES = 255
# The longest ending that an output gets behind its stem, with room for the mark of a second stem ("~jpeg").
_STEM_BYTES = _NAME_BYTES - 32


class Role(StrEnum):
    """What a file is to its session."""

    PICTURE = "picture"
    CONCEPT = "concept"
    CAPTION = "caption"
    SPEC = "spec"
    WISHES = "wishes"
    MODEL = "model"
    PIPELINE = "pipeline"
    OWN = "own"
    OTHER = "other"


@dataclass(frozen=True)
class Shape:
    """What decides where sessions begin in a tree.

    Attributes:
        has_sessions: the root has a folder ``Sessions``.
        root_is_session: pictures, instance_images or a train.yaml lie in the root itself, and there is no ``Sessions``.
        nested: folders (relative paths) that hold a train.yaml of their own.
    """

    has_sessions: bool = False
    root_is_session: bool = False
    nested: frozenset[str] = frozenset()

    @classmethod
    def of(cls, top_folders: Collection[str], top_files: Collection[str], spec_folders: Collection[str]) -> Shape:
        """The shape of a tree, from the names in its root and the folders in which a train.yaml lies."""
        has_sessions = SESSIONS in top_folders
        root_is_session = not has_sessions and (
            INSTANCE_IMAGES in top_folders or any(is_picture_name(name) or is_spec_name(name) for name in top_files)
        )
        return cls(has_sessions, root_is_session, frozenset(folder for folder in spec_folders if folder))


@dataclass(frozen=True)
class Place:
    """Where a file belongs.

    Attributes:
        session: the session's folder, relative to the root; "" when the root itself is the session.
        relative: the file's path inside that folder.
        role: what it is there.
    """

    session: str
    relative: str
    role: Role


def is_picture_name(name: str) -> bool:
    """Whether a file of this name is taken for a picture."""
    return os.path.splitext(name)[1].lower() in PICTURE_SUFFIXES


def is_spec_name(name: str) -> bool:
    """Whether a file of this name starts training. Phones like to begin names with a capital."""
    return name.lower() in SPEC_NAMES


def is_wishes_name(name: str) -> bool:
    """Whether a file of this name, in a session's own folder, says what its crops shall show."""
    return name.lower() in WISHES_NAMES


def session_folder_of(path: str, shape: Shape) -> str | None:
    """The session that a file belongs to: its folder relative to the root, or None when it belongs to none."""
    parts = path.split("/")
    if shape.root_is_session:
        top = 0
    elif shape.has_sessions:
        if parts[0] != SESSIONS or len(parts) < 3:
            return None
        top = 2
    else:
        if len(parts) < 2:
            return None
        top = 1
    if parts[0] == MODELS:
        return None
    for depth in range(len(parts) - 1, top, -1):
        folder = "/".join(parts[:depth])
        if folder in shape.nested:
            return folder
    return "/".join(parts[:top])


def place_of(path: str, shape: Shape) -> Place | None:
    """What a file is and to which session it belongs; None when it lies in none.

    Pictures count wherever they lie in a session but in concept_images and in fastsd's own folders.
    """
    session = session_folder_of(path, shape)
    if session is None:
        return None
    relative = path[len(session) + 1 :] if session else path
    return Place(session, relative, role_in_session(relative))


def role_in_session(relative: str) -> Role:
    """What a file is to its session, from its path in it."""
    *folders, name = relative.split("/")
    lower = name.lower()
    if folders and folders[0] in OWN_FOLDERS:
        return Role.OWN
    if not folders and is_spec_name(name):
        return Role.SPEC
    if not folders and is_wishes_name(name):
        return Role.WISHES  # also beside a picture that is called crop.jpg: then it is no caption
    if not folders and name in (STATUS, EXAMPLE, SETTINGS):
        return Role.OWN
    if lower.endswith(ERROR_SUFFIX):
        return Role.OWN
    if folders and folders[0] == CONCEPT_IMAGES and (is_picture_name(name) or lower.endswith(".txt")):
        return Role.CONCEPT  # with their prompts, which are nobody's captions
    if is_picture_name(name):
        if not folders and lower.endswith(".preview.png"):
            return Role.OWN
        return Role.PICTURE
    if lower.endswith(".txt"):
        return Role.CAPTION
    if name == PIPELINE_INDEX and not OWN_FOLDERS.union((MODELS,)).intersection(folders):
        return Role.PIPELINE
    if lower.endswith(".json") and (not folders or folders[0] == CAPTIONS):
        return Role.OWN  # sidecars of models and of captions
    if not folders and _MODEL_YAML.search(lower):
        return Role.OWN
    if not folders and os.path.splitext(lower)[1] in MODEL_SUFFIXES:
        return Role.MODEL
    return Role.OTHER


def is_own_folder(path: str) -> bool:
    """Whether a folder (relative to the root) holds nothing but fastsd's outputs, and need not be watched.

    A session may itself be called ``runs``: what lies directly under ``Sessions`` is people's.
    """
    parts = path.split("/")
    if parts[-1] == PRIVATE:
        return True
    return parts[-1] in OWN_FOLDERS and not (len(parts) == 2 and parts[0] == SESSIONS)


def same_stem(name: str) -> str:
    """What two file names share when people would call them the same stem: NFC, case folded, without the ending."""
    return unicodedata.normalize("NFC", os.path.splitext(name)[0]).casefold()


def output_stem(source: str, taken: Collection[str]) -> str:
    """The stem that the outputs of a picture are named by.

    Args:
        source: the picture's path in its session.
        taken: folded stems (``same_stem``) that outputs of other pictures of this session already have.

    Returns:
        The picture's own stem; ``stem~png`` for the second of a stem, ``stem~png-2`` … after that, and for "crops",
        whose preview would lie where the contact sheet does. Cut to fit 255 bytes, with eight hex digits of a hash of
        the whole name.
    """
    name = source.rsplit("/", 1)[-1]
    stem, suffix = os.path.splitext(name)
    short = _cut(stem, name)
    if same_stem(short + ".") not in taken and f"{PREVIEWS}/{same_stem(short + '.')}.jpg" != SHEET:
        return short
    marked = f"{short}~{suffix[1:].lower()}"
    count = 2
    candidate = marked
    while same_stem(candidate + ".") in taken:
        candidate = f"{marked}-{count}"
        count += 1
    return candidate


def _cut(stem: str, name: str) -> str:
    encoded = os.fsencode(stem)
    if len(encoded) <= _STEM_BYTES:
        return stem
    mark = hashlib.sha256(os.fsencode(name)).hexdigest()[:8]
    # Cut between characters: half of one would be another name on a file system that insists on UTF-8.
    kept = encoded[: _STEM_BYTES - 9].decode("utf-8", errors="ignore")
    return f"{kept}~{mark}"


def error_name(name: str) -> str:
    """The name of the error file of a file: ``<name>.error.txt``, shortened with a hash where that is too long."""
    full = name + ERROR_SUFFIX
    if len(os.fsencode(full)) <= _NAME_BYTES:
        return full
    mark = hashlib.sha256(os.fsencode(name)).hexdigest()[:8]
    kept = os.fsencode(name)[: _NAME_BYTES - len(ERROR_SUFFIX) - 9].decode("utf-8", errors="ignore")
    return f"{kept}~{mark}{ERROR_SUFFIX}"


def model_stem(session_name: str, run: str) -> str:
    """``<name>-<id>``: the stem of a finished model's file, safe on every file system and in a WebUI's list."""
    safe = re.sub(r'[\x00-\x1f<>:"/\\|?*]+', "_", session_name).strip(" .") or "model"
    return f"{_cut(safe, session_name)}-{run}"


def kept_name(run: str, step: int) -> str:
    """What the intermediate model of a run is known by: ``<run>-step-N``, N counted in stage 2."""
    return f"{run}-step-{step}"


def lora_prompt(stem: str, trigger: str) -> str:
    """What a prompt says to draw with a LoRA, in A1111's and Forge's words: the file's stem at full strength."""
    return f"<lora:{stem}:1> {trigger}".rstrip()


def find_session_folder(root: Path, session_id: str, hint: Path) -> Path:
    """The folder of a session, wherever it has been moved inside the tree.

    Args:
        root: the tree.
        session_id: what its ``.fastsd/session.json`` says.
        hint: where it was last.

    Raises:
        FileNotFoundError: no folder of the tree carries that id.
    """
    if read_session_id(hint) == session_id:
        return hint
    for folder in _candidates(root):
        if read_session_id(folder) == session_id:
            return folder
    message = f"the session that was in {hint} is no longer in {root}"
    raise FileNotFoundError(message)


def read_session_id(folder: Path) -> str | None:
    """The identity that a session's folder carries, or None."""
    try:
        value = json.loads((folder / PRIVATE / "session.json").read_bytes())
    except (OSError, ValueError):
        return None
    identity = value.get("id") if isinstance(value, dict) else None
    return identity if isinstance(identity, str) else None


def _candidates(root: Path, depth: int = 4) -> Iterator[Path]:
    yield root
    if depth == 0:
        return
    try:
        with os.scandir(root) as entries:
            folders = [
                Path(entry.path)
                for entry in entries
                if entry.is_dir(follow_symlinks=False)
                and not entry.name.startswith(".")
                and entry.name not in OWN_FOLDERS
            ]
    except OSError:
        return
    for folder in folders:
        yield from _candidates(folder, depth - 1)
