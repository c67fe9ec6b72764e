"""One file by http: resumed where it was cut, checked, then renamed into place."""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import json
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from handlers.context import Waiting
from handlers.fetch.check import check_file, check_start
from handlers.fetch.names import check_address, file_name
from sessions import files
from sessions.refusal import Refusal

_BLOCK = 1 << 20
_TIMEOUT = 30.0
# So many requests in a row that bring nothing end the attempt; the part stays for the next one.
_FRUITLESS = 4
_FREE_AFTER = 1 << 30
_TOKENS = {"civitai.com": "CIVITAI_TOKEN", "civitai.red": "CIVITAI_TOKEN"}


class _Cut(Exception):  # noqa: N818 - no error yet: it is tried again
    """The connection ended before the file did."""


@dataclass
class _Part:
    """A download that is under way: the bytes so far, and what the server called that version of the file."""

    path: Path
    note: Path
    validator: str = ""

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def restart(self, validator: str) -> None:
        self.path.write_bytes(b"")
        self.validator = validator
        files.write_json(self.note, {"validator": validator})

    def forget(self) -> None:
        for path in (self.path, self.note):
            path.unlink(missing_ok=True)


def download(
    url: str,
    target: Path,
    scratch: Path,
    progress: Callable[[float, float], None],
    *,
    sha256: str | None = None,
    name: str | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> Path:
    """Fetch one file into a folder.

    Args:
        url: https (or http on this machine).
        target: the folder that it comes to lie in; a ``.json`` beside it says where it is from, and its SHA-256.
        scratch: the folder of what is not whole yet; another attempt goes on from there.
        progress: called with bytes done and in all (0: not known).
        sha256: the hash it must have, where one is known.
        name: what it is called here; None takes the server's word.
        sleep: waits between attempts.

    Raises:
        Refusal: the address, the name or the file is not taken; the disk has no room.
        Waiting: the server cannot be reached, says no, or keeps cutting the connection.
    """
    check_address(url)
    scratch.mkdir(parents=True, exist_ok=True)
    target.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(url.encode()).hexdigest()[:20]
    with _alone(scratch / f"{key}.lock"):
        part = _Part(scratch / f"{key}.part", scratch / f"{key}.json")
        part.validator = _read_note(part.note)
        offered = _fetch(url, part, target, progress, sleep)
        name = name or offered
        final = target / name
        try:
            digest = check_file(part.path, name, sha256)
        except Refusal:
            part.forget()
            raise
        if final.exists() and files.sha256_of(final) != digest:
            part.forget()
            raise Refusal(
                "download",
                f"Another file called {name} lies in {target} already.",
                "Rename or move it, then fetch again.",
            )
        _move(part.path, final)
        note = final.with_name(f"{final.stem}.json")
        if not note.exists():
            files.write_json(note, {"source": url.split("?", 1)[0], "sha256": digest, "bytes": final.stat().st_size})
        part.forget()
    return final


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Hold a lock file, so that two commands do not write one part."""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Waiting("The same file is being fetched by another fastsd.") from None
        yield


def _read_note(note: Path) -> str:
    try:
        return str(json.loads(note.read_text(encoding="utf-8"))["validator"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _fetch(
    url: str, part: _Part, target: Path, progress: Callable[[float, float], None], sleep: Callable[[float], None]
) -> str:
    """Request after request until the part is whole; gives the file's name."""
    fruitless = 0
    while True:
        before = part.size
        try:
            return _request(url, part, target, progress)
        except urllib.error.HTTPError as error:
            if error.code not in {408, 416, 425, 429, 500, 502, 503, 504}:
                raise Waiting(_no(url, error.code), retry_after=300.0) from None
            reason: str = f"it answers {error.code}"
            if error.code == 416:
                part.forget()  # what is here is longer than the file is now
        except (_Cut, OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.filename is not None:
                raise  # this side's disk
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        fruitless = 0 if part.size > before else fruitless + 1
        if fruitless >= _FRUITLESS:
            host = urlsplit(url).hostname
            raise Waiting(
                f"{host} cannot be reached or keeps breaking off ({reason}). Try again later; it goes on there."
            )
        sleep(min(2.0**fruitless, 30.0))


def _no(url: str, code: int) -> str:
    host = urlsplit(url).hostname or ""
    if code in {401, 403}:
        token = next((name for known, name in _TOKENS.items() if host == known or host.endswith(f".{known}")), None)
        return f"{host} wants a login for this file" + (f": set {token}." if token else ".")
    return f"{host} has no such file (it answers {code})." if code in {404, 410} else f"{host} answers {code}."


def _request(url: str, part: _Part, target: Path, progress: Callable[[float, float], None]) -> str:
    have = part.size if part.validator else 0
    request = urllib.request.Request(url, headers={"User-Agent": "fastsd", "Accept-Encoding": "identity"})  # noqa: S310 - checked
    host = urlsplit(url).hostname or ""
    token = os.environ.get(_TOKENS.get(host, ""), "")
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    if have:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", part.validator)
    with urllib.request.build_opener(_Redirects).open(request, timeout=_TIMEOUT) as answer:
        headers = {key.lower(): value for key, value in answer.headers.items()}
        name = file_name(answer.url, headers)
        start, total = _extent(answer.status, headers, have)
        if start != have or start == 0:
            part.restart(_validator(headers))
        _check_room(part.path.parent, target, total - start)
        content_type = headers.get("content-type", "")
        _receive(answer, part, content_type, total, progress)
    if total and part.size != total:
        raise _Cut("the connection ended early")
    return name


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirect only to an address that would be taken itself. The token is never sent on."""

    def redirect_request(  # noqa: PLR0917 - the library calls it so
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        host = check_address(newurl)
        if urlsplit(newurl).scheme != "https" and host != urlsplit(req.full_url).hostname:
            raise Refusal("download", "The server sends on to this machine.", "Give the file's own address.")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _extent(status: int, headers: dict[str, str], have: int) -> tuple[int, int]:
    """Where the answer's bytes begin, and the file's size (0: not known)."""
    if status == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("content-range", "").strip())
        if match and int(match[1]) == have:
            return have, 0 if match[2] == "*" else int(match[2])
        raise _Cut("the server sent another part than it was asked for")
    length = headers.get("content-length", "")
    return 0, int(length) if length.isdigit() else 0


def _validator(headers: dict[str, str]) -> str:
    """What If-Range may carry: a strong ETag, else a date; empty where resuming is not safe."""
    tag = headers.get("etag", "")
    if tag and not tag.startswith("W/"):
        return tag
    return headers.get("last-modified", "")


def _check_room(scratch: Path, target: Path, needed: int) -> None:
    for folder in (scratch, target):
        free = shutil.disk_usage(folder).free
        if needed and free < needed + _FREE_AFTER:
            raise Refusal(
                "disk",
                f"The file needs {needed / 1e9:.1f} GB more, and {folder} has {free / 1e9:.1f} GB free.",
                "Make room (1 GB should stay free), then fetch again: it goes on where it was.",
            )


def _receive(
    answer: http.client.HTTPResponse,
    part: _Part,
    content_type: str,
    total: int,
    progress: Callable[[float, float], None],
) -> None:
    with part.path.open("ab") as file:
        done = file.tell()
        progress(done, total)
        while True:
            try:
                block = answer.read1(_BLOCK)
            except http.client.IncompleteRead as error:
                block = error.partial
            if not block:
                break
            if done == 0:
                check_start(block, content_type)
            file.write(block)
            done += len(block)
            progress(done, total)
        files.sync_file(file)


def _move(source: Path, final: Path) -> None:
    """Into place in one step; a copy first where the folders lie on different disks."""
    with suppress(OSError):
        source.replace(final)
        files.sync_folder(final.parent)
        return
    files.copy_file(source, final)
