"""Whether a downloaded file is what it is taken for."""

from __future__ import annotations

from pathlib import Path

from handlers.models import headers, onnx_header, pickles
from sessions import files
from sessions.refusal import Refusal

_PAGES = frozenset({"text/html", "application/xhtml+xml", "application/json"})


def check_start(start: bytes, content_type: str) -> None:
    """Refuse what is no model from its type and first bytes, before the rest is fetched.

    Raises:
        Refusal: it is a web page or an error message.
    """
    kind = content_type.partition(";")[0].strip().lower()
    # A safetensors file begins with its header's length, whose first byte may be anything.
    header_follows = start[4:9] == b"\0\0\0\0{"
    if kind in _PAGES or (start[:1] in {b"<", b"{"} and not header_follows):
        raise Refusal(
            "download",
            "The server sent a page, not a file.",
            "Open the address in a browser: it may want a login, a token or a click; then give the file's own address.",
        )


def check_file(path: Path, name: str, sha256: str | None = None) -> str:
    """Refuse a file that is not whole, not safe, or not the one expected; gives its SHA-256.

    Raises:
        Refusal: a header that does not fit, a pickle that would run code, another hash than ``sha256``.
    """
    try:
        if name.lower().endswith(".safetensors"):
            headers.read_header(path)
        elif name.lower().endswith(".onnx"):
            onnx_header.read_header(path)
        else:
            harmful = pickles.read_contents(path).harmful
            if harmful:
                listed = ", ".join(harmful[:8])
                raise Refusal(
                    "unsafe", f"{name} would run code when it is opened: {listed}.", "Look for it as .safetensors."
                )
    except (headers.HeaderError, pickles.ArchiveError) as error:
        raise Refusal("download", f"{name} is no whole model file: {error}.", "Fetch it again, or elsewhere.") from None
    digest = files.sha256_of(path)
    if sha256 is not None and digest != sha256:
        raise Refusal(
            "download", f"{name} is not the file it should be (SHA-256 {digest}).", "Fetch it again, or elsewhere."
        )
    return digest
