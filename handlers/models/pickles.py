"""What a torch checkpoint (a zip with pickles in it) would import when it is opened. Nothing is ever unpickled."""

from __future__ import annotations

import errno
import pickletools
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

LARGEST_PICKLE = 64 << 20
STORAGES = {
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "DoubleStorage": "F64",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
# All that plain tensors need. Everything else is refused, however harmless it looks.
HARMLESS = frozenset(
    {
        "collections.OrderedDict",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter",
        "torch.Size",
        *(f"torch.{storage}" for storage in STORAGES),
    }
)
_STRINGS = frozenset(
    {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE", "STRING", "BINSTRING", "SHORT_BINSTRING"}
)
_PUTS = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
_GETS = frozenset({"GET", "BINGET", "LONG_BINGET"})
_EXTENSIONS = frozenset({"EXT1", "EXT2", "EXT4"})


class ArchiveError(ValueError):
    """The file is no torch checkpoint that can be looked into; the message says why."""


@dataclass
class PickleContents:
    """What the pickles of a checkpoint name.

    Attributes:
        imports: every global, ``module.name``; ``?`` for one that is put together at run time.
        strings: every string, keys of tensors among them.
    """

    imports: set[str] = field(default_factory=set)
    strings: set[str] = field(default_factory=set)

    @property
    def harmful(self) -> list[str]:
        """The imports that plain tensors do not need."""
        return sorted(self.imports - HARMLESS)

    @property
    def dtypes(self) -> set[str]:
        """The dtypes of its storages."""
        return {dtype for storage, dtype in STORAGES.items() if f"torch.{storage}" in self.imports}


def read_contents(path: Path) -> PickleContents:
    """List what a zip checkpoint's pickles would import.

    Raises:
        ArchiveError: it is no zip, a member is damaged, a pickle is too large or no pickle.
        OSError: the file cannot be read.
    """
    contents = PickleContents()
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [member for member in archive.infolist() if member.filename.endswith(".pkl")]
            if not pickles:
                raise ArchiveError("it holds no pickle, so it is no torch checkpoint")
            for member in pickles:
                if member.file_size > LARGEST_PICKLE:
                    raise ArchiveError(f"its {member.filename} is {member.file_size:,} bytes large")
                _collect(archive.read(member), contents)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise ArchiveError("it is no whole zip archive: it points before its own beginning") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        if isinstance(error, ArchiveError):
            raise
        # Packed or encrypted in a way that zipfile does not know is damage too: torch never does so.
        raise ArchiveError(f"it is no whole zip archive: {error}") from None
    return contents


def _collect(code: bytes, contents: PickleContents) -> None:
    """Walk a pickle's opcodes; a global whose name is not two plain strings right before it counts as unknown."""
    recent: list[str | None] = []
    memo: dict[int, str | None] = {}
    try:
        for opcode, argument, _position in pickletools.genops(code):
            name = opcode.name
            if name in _STRINGS:
                recent.append(str(argument))
                contents.strings.add(str(argument))
            elif name == "MEMOIZE":
                memo[len(memo)] = recent[-1] if recent else None
            elif name in _PUTS:
                memo[int(str(argument))] = recent[-1] if recent else None
            elif name in _GETS:
                recent.append(memo.get(int(str(argument))))
            elif name in {"GLOBAL", "INST"}:
                contents.imports.add(str(argument).replace(" ", "."))
                recent.append(None)
            elif name == "STACK_GLOBAL":
                module, attribute = recent[-2:] if len(recent) >= 2 else (None, None)
                contents.imports.add(f"{module}.{attribute}" if module and attribute else "?")
                recent.append(None)
            else:
                if name in _EXTENSIONS:
                    contents.imports.add("?")
                recent.append(None)
    except (ValueError, IndexError, OverflowError) as error:
        raise ArchiveError(f"its pickle is damaged: {error}") from None
