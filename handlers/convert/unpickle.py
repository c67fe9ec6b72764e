"""Where the tensors of a torch checkpoint lie in its zip file, told without torch and without loading one.

Three gates, none of which has a switch. The pickle is scanned: whatever would import more than plain tensors need is
refused and named. Then it is read in a child process with little memory and little time. There, every name that it may
import is a stand-in that only takes notes, so even what passed the scan by a trick finds nothing to call.
"""

from __future__ import annotations

import io
import json
import pickle
import resource
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from handlers.models import pickles
from handlers.models.headers import BITS, TensorEntry
from handlers.models.pickles import LARGEST_PICKLE, STORAGES
from sessions.refusal import Refusal

_MEMORY = 1 << 30
_SECONDS = 60
_LOCAL_HEADER = 30


class _Storage(NamedTuple):
    key: str
    dtype: str
    size: int


class _View(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_tensors(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a zip checkpoint by name; those of ``state_dict`` where there is one.

    Raises:
        Refusal: ``unsafe``: it would run code, or nobody can tell; ``corrupt``: it is damaged, or its tensors do not
            lie in it as they are.
        OSError: the file cannot be read.
    """
    try:
        harmful = pickles.read_contents(path).harmful
    except pickles.ArchiveError as error:
        raise _corrupt(path, str(error)) from None
    if harmful:
        raise Refusal(
            "unsafe",
            f"{path.name} would run code when it is opened: {', '.join(harmful[:8])}.",
            "Get the model as .safetensors, from a place you trust.",
        )
    child = subprocess.run(
        [sys.executable, "-m", "handlers.convert.unpickle", str(path.absolute())],
        capture_output=True,
        check=False,
        timeout=2 * _SECONDS,
        cwd=Path(__file__).resolve().parents[2],
    )
    try:
        told = json.loads(child.stdout)
    except ValueError:
        raise _corrupt(path, "its pickle needs more memory or time than a checkpoint's does") from None
    if "error" in told:
        raise _corrupt(path, str(told["error"]))
    return {name: TensorEntry(dtype, tuple(shape), begin, end) for name, dtype, shape, begin, end in told["tensors"]}


def _corrupt(path: Path, why: str) -> Refusal:
    return Refusal("corrupt", f"{path.name} is no checkpoint that can be read: {why}.", "Copy or download it again.")


class _Reader(pickle.Unpickler):
    """Reads a checkpoint's pickle with stand-ins for all that it may name."""

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full == "collections.OrderedDict":
            return OrderedDict
        if full == "torch._utils._rebuild_tensor_v2":
            return _view
        if full == "torch._utils._rebuild_parameter":
            return _parameter
        if full == "torch.Size":
            return tuple
        if module == "torch" and name in STORAGES:
            return name
        raise pickle.UnpicklingError(f"it names {full}")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage, key, _place, count = pid
        if kind != "storage" or storage not in STORAGES or type(key) is not str or type(count) is not int:
            raise pickle.UnpicklingError("it has something besides tensors")
        return _Storage(key, STORAGES[storage], count)


def _view(storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any) -> _View:
    return _View(storage, offset, tuple(shape), tuple(strides))


def _parameter(data: _View, *_: Any) -> _View:
    return data


def _read(path: Path) -> list[tuple[str, str, tuple[int, ...], int, int]]:
    """What the child does: (name, dtype, shape, begin, end) of every tensor."""
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: member for member in archive.infolist()}
        main = next(name for name in members if name.endswith("data.pkl"))
        root = main.removesuffix("data.pkl")
        if f"{root}byteorder" in members and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("its numbers are big-endian")
        if members[main].file_size > LARGEST_PICKLE:
            raise ValueError("its pickle is too large")
        value = _Reader(io.BytesIO(archive.read(main))).load()
    rows = []
    with path.open("rb") as file:
        for name, view in _named(value).items():
            member = members.get(f"{root}data/{view.storage.key}")
            if member is None or member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"the storage of {name} is missing, or packed")
            rows.append((name, view.storage.dtype, view.shape, *_extent(name, view, _start(file, member), member)))
    return rows


def _named(value: Any) -> dict[str, _View]:
    if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
        value = value["state_dict"]
    if not isinstance(value, dict):
        raise ValueError("it holds no table of tensors")  # noqa: TRY004 - it is the file that is wrong
    return {name: view for name, view in value.items() if isinstance(name, str) and isinstance(view, _View)}


def _start(file: io.BufferedReader, member: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: its local header has names and extras of its own length."""
    file.seek(member.header_offset)
    local = file.read(_LOCAL_HEADER)
    if local[:4] != b"PK\3\4":
        raise ValueError(f"{member.filename} is not where the archive says")
    return (
        member.header_offset
        + _LOCAL_HEADER
        + int.from_bytes(local[26:28], "little")
        + int.from_bytes(local[28:30], "little")
    )


def _extent(name: str, view: _View, start: int, member: zipfile.ZipInfo) -> tuple[int, int]:
    if not all(type(number) is int and number >= 0 for number in (view.offset, *view.shape, *view.strides)):
        raise ValueError(f"{name} has numbers that are no sizes")
    numbers, expected = prod(view.shape), 1
    for side, stride in zip(reversed(view.shape), reversed(view.strides), strict=True):
        if side != 1 and stride != expected and numbers:
            raise ValueError(f"the numbers of {name} do not lie in order; save it as .safetensors")
        expected *= side
    size = BITS[view.storage.dtype] // 8
    begin, length = view.offset * size, numbers * size
    if begin + length > member.file_size:
        raise ValueError(f"{name} is longer than its storage")
    return start + begin, start + begin + length


def main(path: str) -> Mapping[str, Any]:
    """The child: limits first, then the table, or why there is none."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
    try:
        return {"tensors": _read(Path(path))}
    except MemoryError:
        return {"error": "its pickle needs more memory than a checkpoint's does"}
    except Exception as error:
        return {"error": str(error) or type(error).__name__}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
