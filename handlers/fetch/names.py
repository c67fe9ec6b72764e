"""Under which name a downloaded file may lie on this disk, and from where it may come."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

from sessions.refusal import Refusal

# What WebUIs load, and segment networks. Nothing that a desktop would open or run.
EXTENSIONS = (".safetensors", ".ckpt", ".pt", ".pth", ".onnx")
_LONGEST = 200
_LOCAL_HOSTS = frozenset({"127.0.0.1", "localhost", "::1"})


def check_address(url: str) -> str:
    """The host of an address that may be fetched.

    Raises:
        Refusal: it is not https (plain http is taken from this machine alone), has no host, or carries a password.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme != "https" and not (parts.scheme == "http" and host in _LOCAL_HOSTS):
        raise Refusal("download", f"{_shown(url)} is not fetched: it is not https.", "Give the file's https address.")
    if not host:
        raise Refusal("download", f"{_shown(url)} names no server.", "Give the file's whole https address.")
    if parts.username is not None:
        raise Refusal("download", "The address carries a password.", "Put tokens into the environment (CIVITAI_TOKEN).")
    return host


def _shown(url: str) -> str:
    """An address for messages: queries often carry tokens."""
    return url.split("?", 1)[0]


def file_name(url: str, headers: Mapping[str, str]) -> str:
    """The safe name for what came from ``url`` with these headers (lower-case keys).

    The server's Content-Disposition first (RFC 6266, with the encoded form of RFC 5987), then the one that a presigned
    address carries, then the address's last part. Folders are dropped.

    Raises:
        Refusal: no name with one of ``EXTENSIONS`` is among them.
    """
    presigned = parse_qs(urlsplit(url).query).get("response-content-disposition", [""])[0]
    candidates = [
        _disposition_name(headers.get("content-disposition", "")),
        _disposition_name(presigned),
        unquote(PurePosixPath(urlsplit(url).path).name),
    ]
    names = [cleaned for candidate in candidates if (cleaned := safe_name(candidate))]
    for name in names:
        if name.lower().endswith(EXTENSIONS):
            return name
    offered = f"{names[0]} is no model file" if names else "The server gives the file no name"
    raise Refusal("download", f"{offered}.", f"Files ending in {', '.join(EXTENSIONS)} are taken.")


def _disposition_name(value: str) -> str:
    encoded = re.search(r"filename\*\s*=\s*([\w-]+)'[^']*'([^;\s]+)", value, re.IGNORECASE)
    if encoded:
        try:
            return unquote(encoded[2], encoding=encoded[1], errors="replace")
        except LookupError:
            pass
    plain = re.search(r'filename\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^;\s]+))', value, re.IGNORECASE)
    if not plain:
        return ""
    return re.sub(r"\\(.)", r"\1", plain[1]) if plain[1] is not None else plain[2]


def safe_name(name: str) -> str:
    """A name without folders, control characters, what Windows forbids, leading dots, and more than 200 bytes."""
    last = re.split(r"[/\\]", name)[-1]
    cleaned = re.sub(r'[\x00-\x1f\x7f<>:"|?*]', "_", last).strip().lstrip(".").strip()
    stem, dot, suffix = cleaned.rpartition(".")
    if not dot:
        stem, suffix = cleaned, ""
    ending = f"{dot}{suffix}".encode()[:20].decode(errors="ignore")
    room = _LONGEST - len(ending.encode())
    return stem.encode()[:room].decode(errors="ignore") + ending if stem else ""
