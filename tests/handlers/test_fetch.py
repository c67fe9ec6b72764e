"""Downloads from real servers on this machine: a plain one that cuts connections, and one that speaks the hub's API."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers.context import Waiting
from handlers.fetch import get, hub
from handlers.fetch.http import download
from handlers.fetch.names import check_address, file_name, safe_name
from handlers.models import catalogue, registry, segments
from sessions.refusal import Refusal
from tests.networks import red_network


def safetensors(size: int = 300_000) -> bytes:
    header = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    body = bytes(index * 7 % 251 for index in range(size))
    return len(header).to_bytes(8, "little") + header + body


@dataclass
class Shelf:
    """What the server has, how it misbehaves, and what it was asked."""

    files: dict[str, bytes] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    redirect: str | None = None
    statuses: list[int] = field(default_factory=list)
    asked: list[dict[str, str]] = field(default_factory=list)
    url: str = ""


class ShelfHandler(BaseHTTPRequestHandler):
    shelf: Shelf

    def do_GET(self) -> None:
        shelf = self.shelf
        shelf.asked.append({key.lower(): value for key, value in self.headers.items()})
        if shelf.statuses:
            self.send_error(shelf.statuses.pop(0))
            return
        if shelf.redirect and self.path == "/redirect":
            self.send_response(302)
            self.send_header("Location", shelf.redirect)
            self.end_headers()
            return
        body = shelf.files.get(self.path.split("?")[0])
        if body is None:
            self.send_error(404)
            return
        tag = f'"{hashlib.sha256(body).hexdigest()[:12]}"'
        start = 0
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted and self.headers.get("If-Range") == tag:
            start = int(wanted[1])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.send_header("ETag", tag)
        for key, value in shelf.headers.items():
            self.send_header(key, value)
        self.end_headers()
        end = len(body) if shelf.cut_after is None else min(len(body), start + shelf.cut_after)
        self.wfile.write(body[start:end])
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the library's name
        """Silence."""


@pytest.fixture
def shelf() -> Iterator[Shelf]:
    yield from serve(Shelf(), ShelfHandler)


def serve(shelf: Shelf, handler: type[ShelfHandler]) -> Iterator[Shelf]:
    bound = type("Bound", (handler,), {"shelf": shelf})
    server = ThreadingHTTPServer(("127.0.0.1", 0), bound)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    shelf.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield shelf
    server.shutdown()
    thread.join()
    server.server_close()


def quiet(_done: float, _total: float) -> None:
    """Nobody watches."""


def fetch(shelf: Shelf, folder: Path, path: str = "/model.safetensors", **options: Any) -> Path:
    return download(
        f"{shelf.url}{path}", folder / "Models", folder / "scratch", quiet, sleep=lambda _seconds: None, **options
    )


def test_a_file_arrives_whole_with_a_note_of_where_it_is_from(shelf: Shelf, tmp_path: Path) -> None:
    body = safetensors()
    shelf.files["/model.safetensors"] = body
    told: list[tuple[float, float]] = []
    url = f"{shelf.url}/model.safetensors?token=secret"
    made = download(url, tmp_path / "Models", tmp_path / "scratch", lambda done, total: told.append((done, total)))
    assert made == tmp_path / "Models" / "model.safetensors"
    assert made.read_bytes() == body
    note = json.loads((tmp_path / "Models" / "model.json").read_text())
    assert note == {
        "source": f"{shelf.url}/model.safetensors",
        "sha256": hashlib.sha256(body).hexdigest(),
        "bytes": len(body),
    }
    assert list(told[-1]) == [len(body), len(body)]
    assert {path.suffix for path in (tmp_path / "scratch").iterdir()} <= {".lock"}


def test_cut_connections_are_taken_up_where_they_broke(shelf: Shelf, tmp_path: Path) -> None:
    body = safetensors()
    shelf.files["/model.safetensors"] = body
    shelf.cut_after = 70_000
    assert fetch(shelf, tmp_path).read_bytes() == body
    starts = [asked.get("range") for asked in shelf.asked]
    assert starts[0] is None
    assert len(starts) == -(-len(body) // 70_000)
    assert starts[1:] == [f"bytes={70_000 * step}-" for step in range(1, len(starts))]


def test_a_later_command_goes_on_with_the_part_of_a_dead_one(shelf: Shelf, tmp_path: Path) -> None:
    body = safetensors()
    shelf.files["/model.safetensors"] = body
    shelf.cut_after = 70_000

    class Killed(BaseException):
        pass

    def die(_seconds: float) -> None:
        raise Killed

    with pytest.raises(Killed):
        download(f"{shelf.url}/model.safetensors", tmp_path / "Models", tmp_path / "scratch", quiet, sleep=die)
    assert not list((tmp_path / "Models").iterdir())
    shelf.cut_after = None
    assert fetch(shelf, tmp_path).read_bytes() == body
    assert shelf.asked[1]["range"] == "bytes=70000-"


def test_a_file_that_changed_meanwhile_is_fetched_from_its_start(shelf: Shelf, tmp_path: Path) -> None:
    shelf.files["/model.safetensors"] = safetensors()
    shelf.cut_after = 70_000
    changed = safetensors(200_000)

    def change(_seconds: float) -> None:
        shelf.files["/model.safetensors"] = changed
        shelf.cut_after = None

    made = download(f"{shelf.url}/model.safetensors", tmp_path / "Models", tmp_path / "scratch", quiet, sleep=change)
    assert made.read_bytes() == changed


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"<!DOCTYPE html><html>log in</html>", "application/octet-stream"),
        (b'{"error": "unauthorized"}', "application/octet-stream"),
        (safetensors(), "text/html; charset=utf-8"),
    ],
)
def test_a_page_is_refused(shelf: Shelf, tmp_path: Path, body: bytes, content_type: str) -> None:
    shelf.files["/model.safetensors"] = body
    shelf.headers["Content-Type"] = content_type
    with pytest.raises(Refusal, match="page"):
        fetch(shelf, tmp_path)
    assert not list((tmp_path / "Models").iterdir())


def test_a_file_whose_first_byte_looks_like_a_page_is_none(shelf: Shelf, tmp_path: Path) -> None:
    # A header of 0x3C bytes: the file begins with "<".
    header = json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode().ljust(0x3C)
    assert len(header) == 0x3C
    body = len(header).to_bytes(8, "little") + header + b"x"
    shelf.files["/model.safetensors"] = body
    assert fetch(shelf, tmp_path).read_bytes() == body


@pytest.mark.parametrize("damage", ["short", "long", "header"])
def test_a_damaged_file_is_refused_and_its_part_forgotten(shelf: Shelf, tmp_path: Path, damage: str) -> None:
    whole = safetensors(1000)
    bodies = {"short": whole[:-1], "long": whole + b"x", "header": whole[:12] + b"\xff" + whole[13:]}
    shelf.files["/model.safetensors"] = bodies[damage]
    with pytest.raises(Refusal, match="no whole model file"):
        fetch(shelf, tmp_path)
    assert not list((tmp_path / "Models").iterdir())
    shelf.files["/model.safetensors"] = whole
    assert fetch(shelf, tmp_path).read_bytes() == whole


def test_another_hash_than_expected_is_refused(shelf: Shelf, tmp_path: Path) -> None:
    shelf.files["/model.safetensors"] = safetensors(10)
    with pytest.raises(Refusal, match="not the file it should be"):
        fetch(shelf, tmp_path, sha256="0" * 64)
    assert not list((tmp_path / "Models").iterdir())


def test_another_file_of_that_name_is_never_replaced(shelf: Shelf, tmp_path: Path) -> None:
    (tmp_path / "Models").mkdir()
    mine = tmp_path / "Models" / "model.safetensors"
    mine.write_bytes(b"mine")
    shelf.files["/model.safetensors"] = safetensors(10)
    with pytest.raises(Refusal, match="Another file"):
        fetch(shelf, tmp_path)
    assert mine.read_bytes() == b"mine"


def test_servers_that_fail_for_a_while_are_asked_again_and_others_are_told_of(shelf: Shelf, tmp_path: Path) -> None:
    shelf.files["/model.safetensors"] = safetensors(10)
    shelf.statuses = [503, 429]
    assert fetch(shelf, tmp_path).exists()
    shelf.statuses = [503] * 10
    with pytest.raises(Waiting, match="503"):
        fetch(shelf, tmp_path, path="/other.safetensors")
    shelf.statuses = [401]
    with pytest.raises(Waiting, match="login"):
        fetch(shelf, tmp_path, path="/gated.safetensors")
    shelf.statuses = []
    with pytest.raises(Waiting, match="no such file"):
        fetch(shelf, tmp_path, path="/absent.safetensors")


def test_a_redirect_to_an_address_that_is_not_taken_is_refused(shelf: Shelf, tmp_path: Path) -> None:
    shelf.files["/model.safetensors"] = safetensors(10)
    shelf.redirect = f"{shelf.url}/model.safetensors"
    assert fetch(shelf, tmp_path, path="/redirect").name == "model.safetensors"
    shelf.redirect = "http://example.org/model.safetensors"
    with pytest.raises(Refusal, match="not https"):
        fetch(shelf, tmp_path, path="/redirect")
    shelf.redirect = "file:///etc/passwd"
    with pytest.raises(Waiting, match="302"):
        fetch(shelf, tmp_path, path="/redirect")
    shelf.redirect = shelf.url.replace("127.0.0.1", "localhost")
    with pytest.raises(Refusal, match="this machine"):
        fetch(shelf, tmp_path, path="/redirect")


def test_the_name_comes_from_the_server_and_stays_in_the_folder(shelf: Shelf, tmp_path: Path) -> None:
    shelf.files["/api/download/7"] = safetensors(10)
    shelf.headers["Content-Disposition"] = "attachment; filename*=UTF-8''..%2F..%2Fn%C3%A4he.safetensors"
    assert fetch(shelf, tmp_path, path="/api/download/7") == tmp_path / "Models" / "nähe.safetensors"
    shelf.headers["Content-Disposition"] = 'attachment; filename="run.sh"'
    with pytest.raises(Refusal, match=r"run\.sh is no model file"):
        fetch(shelf, tmp_path, path="/api/download/7")


def test_addresses() -> None:
    assert check_address("https://example.org/a") == "example.org"
    for bad in ("http://example.org/a", "ftp://example.org/a", "https:///a", "https://me:pass@example.org/a"):
        with pytest.raises(Refusal):
            check_address(bad)


def test_names_of_presigned_addresses() -> None:
    signed = "https://cdn.example/f3?response-content-disposition=attachment%3B%20filename%3D%22a%20b.ckpt%22&X=1"
    assert file_name(signed, {}) == "a b.ckpt"
    assert file_name("https://example.org/x/My%20Model.SafeTensors", {}) == "My Model.SafeTensors"


@given(st.text(max_size=300))
def test_a_safe_name_is_one_visible_name(name: str) -> None:
    safe = safe_name(name)
    assert "/" not in safe
    assert "\\" not in safe
    assert not safe.startswith(".")
    assert len(safe.encode(errors="surrogatepass")) <= 255
    assert all(ord(character) >= 32 for character in safe)


class HubHandler(ShelfHandler):
    """The three calls of the hub that a download makes."""

    revision = "0123456789abcdef0123456789abcdef01234567"

    def do_HEAD(self) -> None:
        body = self._body()
        if body is None:
            return
        self._send_file(body)

    def do_GET(self) -> None:
        repo = "/api/models/stable-diffusion-v1-5/stable-diffusion-v1-5"
        if self.path.startswith(repo):
            siblings = [
                {"rfilename": name, "size": len(body), "lfs": self._lfs(name, body)}
                for name, body in self.shelf.files.items()
            ]
            answer = json.dumps({"id": "x/y", "sha": self.revision, "siblings": siblings}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)
            return
        body = self._body()
        if body is not None:
            self.shelf.asked.append({"path": self.path})
            self._send_file(body)
            self.wfile.write(body)

    def _lfs(self, name: str, body: bytes) -> dict[str, Any] | None:
        if not name.endswith(".safetensors"):
            return None
        digest = "0" * 64 if self.shelf.headers.get("damage") == name else hashlib.sha256(body).hexdigest()
        return {"sha256": digest, "size": len(body), "pointerSize": 134}

    def _body(self) -> bytes | None:
        body = self.shelf.files.get(self.path.partition(f"/resolve/{self.revision}/")[2])
        if body is None:
            self.send_error(404)
        return body

    def _send_file(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.revision)
        self.end_headers()


SD15_FILES = {
    "README.md": b"about",
    "model_index.json": b"{}",
    "v1-5-pruned-emaonly.safetensors": b"single",
    "scheduler/scheduler_config.json": b"{}",
    "tokenizer/merges.txt": b"#version",
    "tokenizer/vocab.json": b"{}",
    "text_encoder/config.json": b"{}",
    "text_encoder/model.safetensors": b"text",
    "text_encoder/model.fp16.safetensors": b"t",
    "text_encoder/pytorch_model.bin": b"text",
    "unet/config.json": b"{}",
    "unet/diffusion_pytorch_model.safetensors": b"unet",
    "unet/diffusion_pytorch_model.non_ema.safetensors": b"unet",
    "vae/config.json": b"{}",
    "vae/diffusion_pytorch_model.bin": b"vae",
    "safety_checker/model.safetensors": b"no",
}
SD15_NEEDED = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "tokenizer/merges.txt",
    "tokenizer/vocab.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.bin",
}


def test_only_what_loading_needs_is_chosen() -> None:
    available = [hub.HubFile(name, len(body), None) for name, body in SD15_FILES.items()]
    assert {file.path for file in hub.wanted(available, catalogue.ENTRIES["sd15"])} == SD15_NEEDED
    kosmos = [
        hub.HubFile(name, 1, None)
        for name in ("config.json", "model.safetensors", "pytorch_model.bin", "tokenizer.json", "sub/x.json", "a.jpg")
    ]
    chosen = {file.path for file in hub.wanted(kosmos, catalogue.ENTRIES["kosmos-2"])}
    assert chosen == {"config.json", "model.safetensors", "tokenizer.json"}


FETCH_SCRIPT = """
import sys
from pathlib import Path
from handlers.fetch import get
from handlers.models import registry
cache = Path(sys.argv[1])
told = []
try:
    print("path", get(sys.argv[2], cache, lambda done, total: told.append((done, total))))
    print("told", *(told[-1] if told else ["nothing"]))
    print("found", registry.find(sys.argv[2], "checkpoint", None, cache).path)
except Exception as error:
    print(type(error).__name__, error)
"""


def fetch_from_hub(shelf: Shelf, folder: Path, name: str = "sd15", token: str | None = None) -> dict[str, str]:
    """Run ``get`` in a process whose hub is the shelf; its lines, by their first word."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HTTP", "http"))}
    environment |= {"HF_ENDPOINT": shelf.url, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_TOKEN": token} if token else {}
    ran = subprocess.run(
        [sys.executable, "-c", FETCH_SCRIPT, str(folder), name],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return {line.partition(" ")[0]: line.partition(" ")[2] for line in ran.stdout.splitlines()}


def test_a_model_of_the_hub_comes_to_the_cache_and_is_found_there(tmp_path: Path) -> None:
    for shelf in serve(Shelf(files=dict(SD15_FILES)), HubHandler):
        said = fetch_from_hub(shelf, tmp_path)
        folder = tmp_path / "models" / "sd15"
        assert said["path"] == said["found"] == str(folder)
        there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        assert {name for name in there if not name.startswith(".cache")} == SD15_NEEDED
        size = sum(len(SD15_FILES[name]) for name in SD15_NEEDED)
        assert said["told"] == f"{size} {size}"
        fetched = len(shelf.asked)
        again = fetch_from_hub(shelf, tmp_path)
        assert (again["path"], again["told"]) == (str(folder), "nothing")
        assert len(shelf.asked) == fetched


class GatedHandler(HubHandler):
    """A gated repository: anybody may see what it holds, and its files only with the right token."""

    repository = "black-forest-labs/FLUX.1-dev"

    def do_GET(self) -> None:
        self.path = self.path.replace(self.repository, "stable-diffusion-v1-5/stable-diffusion-v1-5")
        super().do_GET()

    def _body(self) -> bytes | None:
        token = self.headers.get("Authorization", "")
        if token == "Bearer hf_right":
            return super()._body()
        self.send_response(403 if token else 401)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("Content-Length", "0")
        self.end_headers()
        return None


def test_a_gated_model_names_the_page_of_its_licence_and_where_the_token_goes(tmp_path: Path) -> None:
    page = f"https://huggingface.co/{GatedHandler.repository}"
    weights = {f"{part}/model.safetensors": b"w" for part in ("transformer", "vae", "text_encoder", "text_encoder_2")}
    for shelf in serve(Shelf(files={"model_index.json": b"{}", **weights}), GatedHandler):
        without = fetch_from_hub(shelf, tmp_path, name="flux-dev")["Waiting"]
        assert page in without
        assert "FLUX.1 [dev] Non-Commercial" in without
        assert "HF_TOKEN" in without
        assert "https://huggingface.co/settings/tokens" in without
        wrong = fetch_from_hub(shelf, tmp_path, name="flux-dev", token="hf_wrong")["Waiting"]
        assert page in wrong
        assert "this token has not" in wrong
        assert "hf_wrong" not in wrong
        assert not list((tmp_path / "models" / "flux-dev").rglob("*.safetensors"))
        right = fetch_from_hub(shelf, tmp_path, name="flux-dev", token="hf_right")
        assert right["path"] == str(tmp_path / "models" / "flux-dev")
    with pytest.raises(registry.MissingModel) as missing:
        registry.check("flux-dev", "checkpoint", None, tmp_path / "empty")
    assert page in str(missing.value)
    assert "HF_TOKEN" in str(missing.value)
    with pytest.raises(registry.MissingModel) as free:
        registry.check("sd15", "checkpoint", None, tmp_path / "empty")
    assert "HF_TOKEN" not in str(free.value)


def test_a_file_of_the_hub_with_another_hash_is_refused(tmp_path: Path) -> None:
    damaged = "unet/diffusion_pytorch_model.safetensors"
    for shelf in serve(Shelf(files=dict(SD15_FILES), headers={"damage": damaged}), HubHandler):
        said = fetch_from_hub(shelf, tmp_path)
        assert "arrived damaged" in said["Refusal"]
        assert not (tmp_path / "models" / "sd15" / "model_index.json").exists()


def test_without_a_hub_it_says_so(tmp_path: Path) -> None:
    gone = Shelf()
    for _open in serve(gone, HubHandler):
        pass
    assert "cannot be reached" in fetch_from_hub(gone, tmp_path)["Waiting"]


def test_unknown_names_and_addresses_outside_a_tree_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="known"):
        get("nonsense", tmp_path, quiet)
    with pytest.raises(Refusal, match="Models folder"):
        get("https://example.org/a.safetensors", tmp_path, quiet)


@pytest.fixture
def small(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> catalogue.Entry:
    """The entry of u2netp, with the server on this machine and the hash of what lies there."""
    body = red_network()
    shelf.files["/u2netp.onnx"] = body
    pinned = ("u2netp.onnx", hashlib.sha256(body).hexdigest())
    entry = replace(catalogue.ENTRIES["u2netp"], origin=f"{shelf.url}/u2netp.onnx", single=pinned)
    monkeypatch.setitem(catalogue.ENTRIES, "u2netp", entry)
    return entry


@pytest.mark.parametrize("name", ["segment", "u2netp", "U2NetP"])
def test_a_segment_network_is_fetched_by_name_once(
    shelf: Shelf, tmp_path: Path, small: catalogue.Entry, name: str
) -> None:
    assert segments.find(None, tmp_path) is None
    # Whatever the server calls it.
    shelf.headers["Content-Disposition"] = 'attachment; filename="asset-17.onnx"'
    for _ in range(2):
        assert get(name, tmp_path, quiet) == tmp_path / "models" / "u2netp"
    assert len(shelf.asked) == 1
    found = segments.find(None, tmp_path)
    assert found is not None
    assert found.path.read_bytes() == shelf.files["/u2netp.onnx"]
    assert segments.read_interface(found.path).side == 64
    note = json.loads(found.path.with_name("u2netp.json").read_text())
    assert small.single is not None
    assert note["sha256"] == small.single[1]
    listed = {model.name: model for model in registry.list_models(None, tmp_path)}
    assert (listed["u2netp"].present, listed["u2net"].present) == (True, False)


@pytest.mark.parametrize("damage", ["cut off", "another", "page"])
def test_a_segment_network_that_is_not_the_one_is_refused(
    shelf: Shelf, tmp_path: Path, small: catalogue.Entry, damage: str
) -> None:
    del small
    whole = shelf.files["/u2netp.onnx"]
    shelf.files["/u2netp.onnx"] = {"cut off": whole[:-30], "another": red_network(32), "page": b"<html>"}[damage]
    with pytest.raises(Refusal):
        get("segment", tmp_path, quiet)
    assert segments.find(None, tmp_path) is None


def test_a_damaged_segment_network_goes_aside_when_it_is_fetched_anew(
    shelf: Shelf, tmp_path: Path, small: catalogue.Entry
) -> None:
    file = tmp_path / "models" / "u2netp" / small.index
    file.parent.mkdir(parents=True)
    file.write_bytes(b"half of it")
    get("segment", tmp_path, quiet)
    assert file.read_bytes() == shelf.files["/u2netp.onnx"]
    assert file.with_name("u2netp.onnx.old").read_bytes() == b"half of it"


def test_the_catalogue_pins_every_segment_network() -> None:
    entries = [entry for entry in catalogue.ENTRIES.values() if entry.kind == catalogue.SEGMENT]
    assert len(entries) >= 3
    for entry in entries:
        assert entry.single is not None
        assert entry.single[0] == entry.index
        assert re.fullmatch(r"[0-9a-f]{64}", entry.single[1])
        assert check_address(entry.origin) == "github.com"
    assert catalogue.ALIASES[catalogue.SEGMENT] in catalogue.ENTRIES
