"""A stand-in for a Stable Diffusion WebUI: real files, real hashes, the answers and faults of the real API.

    python tests/standins/webui.py --port 7860 --models FOLDER [--lora-dir FOLDER] [--drawn FILE] [faults …]

It behaves as A1111 does (``--lazy``: as Forge does) wherever fastsd could notice a difference:

- the port opens after ``--start-delay``; then "Running on local URL" is printed, and the API answers 404 for
  ``--api-delay`` more;
- the list of models is read at start and by refresh only; a title gains `` [hash]`` once the file has been hashed;
- a file that was overwritten under its name stays the old one, weights and hash, for as long as the process lives;
- refresh and txt2img share one lock, so a refresh waits for a running picture;
- A1111 loads in ``POST /options`` and, when the file is bad, answers 200 and stays with what it had; Forge answers 200
  at once and loads at the next picture, which fails. With ``--wedge`` the previous model fails too from then on, until
  a third one is chosen;
- the picture is a function of the loaded file's bytes, the prompt and the seed, and its ``info`` names the hash;
- LoRAs are listed at start and by their own refresh; a prompt that names one that is not listed has the folder read
  once more, and one that is not there then, or cannot be loaded, is passed over with a line in the log; ``Lora hashes``
  names those that drew, each with 12 digits of the SHA-256 of what follows its header (kohya's hash).

Only the standard library is used, so that it starts quickly and in any environment.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

SUFFIXES = {".safetensors", ".ckpt"}
Json = dict[str, Any]


class ApiError(Exception):
    """An error that the API answers with.

    Args:
        status: the HTTP status.
        kind: the name of the Python exception that the real server would have raised.
        text: its message.
    """

    def __init__(self, status: int, kind: str, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.body: Json = {"error": kind, "detail": text if status < 500 else "", "body": "", "errors": text}


@dataclass
class Checkpoint:
    """One file of the model list."""

    filename: str
    name: str
    sha256: str | None = None

    @property
    def model_name(self) -> str:
        return os.path.splitext(self.name.replace("/", "_"))[0]

    @property
    def short_hash(self) -> str | None:
        return self.sha256[:10] if self.sha256 else None

    @property
    def title(self) -> str:
        return f"{self.name} [{self.short_hash}]" if self.sha256 else self.name

    def aliases(self) -> set[str]:
        return {self.model_name, self.name, self.title, self.sha256 or "", self.short_hash or ""} - {""}

    def to_json(self) -> Json:
        return {
            "title": self.title,
            "model_name": self.model_name,
            "hash": self.short_hash,
            "sha256": self.sha256,
            "filename": self.filename,
            "config": None,
        }


def check_header(path: Path) -> None:
    """Raise ValueError unless the file is a whole safetensors file (or looks like a pickled checkpoint)."""
    with path.open("rb") as file:
        start = file.read(8)
        if path.suffix == ".ckpt":
            if start[:2] not in (b"PK", b"\x80\x02"):
                raise ValueError("invalid load key")
            return
        if len(start) < 8:
            raise ValueError("Error while deserializing header: HeaderTooSmall")
        (length,) = struct.unpack("<Q", start)
        size = path.stat().st_size
        if length > min(100_000_000, size - 8):
            raise ValueError("Error while deserializing header: HeaderTooLarge")
        header = json.loads(file.read(length))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    if not ends or max(ends) + 8 + length != size:
        raise ValueError("Error while deserializing header: MetadataIncompleteBuffer")


@dataclass
class Lora:
    """One file of the list of LoRAs."""

    filename: str
    metadata: Json

    @property
    def name(self) -> str:
        return Path(self.filename).stem

    @property
    def alias(self) -> str:
        return str(self.metadata.get("ss_output_name", self.name))

    def to_json(self) -> Json:
        return {"name": self.name, "alias": self.alias, "path": self.filename, "metadata": self.metadata}


class Loras:
    """The LoRAs of a folder, as the built-in extension of A1111 and Forge keeps them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.listed: list[Lora] = []
        # By name, as the real one's cache, which looks at nothing but whether the file is newer.
        self.hashes: dict[str, tuple[float, str]] = {}
        self.scan()

    def scan(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        paths = [path for path in sorted(self.folder.rglob("*")) if path.suffix.lower() in SUFFIXES and path.is_file()]
        self.listed = [Lora(str(path), read_metadata(path)) for path in paths]

    def find(self, name: str) -> Lora | None:
        known = {alias: lora for lora in self.listed for alias in (lora.alias, lora.name)}
        return known.get(name)

    def load(self, name: str) -> str | None:
        """The hash of the LoRA that a prompt names; None, and a line in the log, when it cannot be used."""
        if self.find(name) is None:
            self.scan()
        lora = self.find(name)
        if lora is None:
            print(f"Couldn't find network with name {name}", flush=True)
            return None
        try:
            check_header(Path(lora.filename))
        except (ValueError, OSError) as error:
            print(f"*** Error loading network {lora.filename}: {error}", file=sys.stderr, flush=True)
            return None
        return self.hash_of(lora)

    def hash_of(self, lora: Lora) -> str:
        if "sshs_model_hash" in lora.metadata:
            return str(lora.metadata["sshs_model_hash"])
        changed = Path(lora.filename).stat().st_mtime
        if lora.name not in self.hashes or changed > self.hashes[lora.name][0]:
            with Path(lora.filename).open("rb") as file:
                if lora.filename.endswith(".safetensors"):
                    (length,) = struct.unpack("<Q", file.read(8))
                    file.seek(8 + length)
                digest = hashlib.sha256(file.read()).hexdigest()
            self.hashes[lora.name] = (changed, digest)
        return self.hashes[lora.name][1]


def read_metadata(path: Path) -> Json:
    """The metadata of a safetensors file; none for a file that cannot be read."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            value: Json = json.loads(file.read(min(length, 100_000_000))).get("__metadata__") or {}
    except (OSError, ValueError, struct.error, AttributeError):
        return {}
    return value


def png(width: int, height: int, seed: bytes, text: str) -> bytes:
    """A PNG of 8×8 coloured fields that follow from ``seed``, with ``text`` as its ``parameters``."""
    colours = random.Random(seed).randbytes(8 * 8 * 3)
    rows = bytearray()
    for y in range(height):
        rows.append(0)
        for x in range(width):
            field = (y * 8 // height) * 8 + x * 8 // width
            rows += colours[field * 3 : field * 3 + 3]

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"tEXt", b"parameters\0" + text.encode("latin-1", errors="replace"))
        + chunk(b"IDAT", zlib.compress(bytes(rows)))
        + chunk(b"IEND", b"")
    )


class Engine:
    """What the server does behind its API: the list of models, loading, drawing."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder: Path = options.models
        self.loras: Loras | None = None if options.no_loras else Loras(options.lora_dir or self.folder.parent / "Lora")
        self.queue_lock = threading.Lock()
        self.load_lock = threading.Lock()
        self.interrupted = threading.Event()
        self.job, self.job_count = "", 0
        # Facts by file name, kept for as long as the process lives: this is what makes overwritten files stale.
        self.known: dict[str, Checkpoint] = {}
        self.weights: dict[str, bytes] = {}
        self.listed: list[Checkpoint] = []
        self.chosen: Checkpoint | None = None
        self.loaded: Checkpoint | None = None
        self.wedged: set[str] = set()
        self.scan()

    def scan(self) -> None:
        found = []
        for path in sorted(self.folder.rglob("*")):
            inside = path.relative_to(self.folder).as_posix()
            hidden_folder = any(part.startswith(".") for part in inside.split("/")[:-1])
            if path.suffix.lower() in SUFFIXES and path.is_file() and not hidden_folder:
                filename = str(path)
                found.append(self.known.setdefault(filename, Checkpoint(filename, inside)))
        self.listed = found

    def start(self) -> None:
        """Choose the model of last time, or the first one; A1111 loads it at once."""
        settings = self._read_settings()
        wanted = settings.get("sd_model_checkpoint")
        # Its title ends with a hash that this process has not computed yet.
        self.chosen = self.find(wanted.rsplit(" [", 1)[0]) if isinstance(wanted, str) else None
        self.chosen = self.chosen or next(iter(self.listed), None)
        if self.chosen and not self.options.lazy:
            try:
                self.load(self.chosen)
            except ValueError as error:
                print(f"loading stable diffusion model: {error}", file=sys.stderr, flush=True)

    def find(self, alias: str) -> Checkpoint | None:
        return next((checkpoint for checkpoint in self.listed if alias in checkpoint.aliases()), None)

    def choose(self, alias: str) -> None:
        """``POST /options``. A1111 loads now, and silently stays with the old model when that fails."""
        checkpoint = self.find(alias)
        if checkpoint is None:
            raise ApiError(500, "RuntimeError", f"model {alias!r} not found")
        before = self.chosen
        self.chosen = checkpoint
        if not self.options.lazy:
            try:
                self.load(checkpoint)
            except (ValueError, OSError) as error:
                print(f"changing setting sd_model_checkpoint to {alias}: {error}", file=sys.stderr, flush=True)
                self.chosen = before
        self._write_settings()

    def load(self, checkpoint: Checkpoint) -> None:
        with self.load_lock:
            if self.loaded is checkpoint:
                return
            if checkpoint.filename in self.wedged:
                raise ValueError("NoneType object has no attribute 'sd_checkpoint_info'")
            self.job_count = -1
            try:
                self._read(checkpoint)
            except (ValueError, OSError):
                if self.options.wedge:
                    self.wedged = {checkpoint.filename} | ({self.loaded.filename} if self.loaded else set())
                    self.loaded = None
                raise
            finally:
                self.job_count = 0
            self.wedged = set()
            self.loaded = checkpoint

    def _read(self, checkpoint: Checkpoint) -> None:
        name = Path(checkpoint.filename).name
        print(f"Loading weights [{checkpoint.short_hash}] from {checkpoint.filename}", flush=True)
        time.sleep(self.options.load_seconds)
        if self.options.crash_on_load and self.options.crash_on_load in name:
            print("Segmentation fault (core dumped)", file=sys.stderr, flush=True)
            os._exit(139)
        if checkpoint.filename not in self.weights:
            path = Path(checkpoint.filename)
            check_header(path)
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256")
            self.weights[checkpoint.filename] = digest.digest()
            if not self.options.no_hashing:
                checkpoint.sha256 = digest.hexdigest()

    def draw(self, request: Mapping[str, Any]) -> Json:
        """``POST /txt2img``: one picture, in turn."""
        with self.queue_lock:
            override = (request.get("override_settings") or {}).get("sd_model_checkpoint")
            if override:
                self.choose(str(override))
            self.interrupted.clear()
            if self.chosen is None:
                raise ApiError(500, "AttributeError", "No checkpoint is loaded")
            try:
                self.load(self.chosen)
            except (ValueError, OSError) as error:
                raise ApiError(500, type(error).__name__, str(error)) from error
            steps = int(request.get("steps", 50))
            self.job, self.job_count = "scripts_txt2img", 1
            try:
                self.interrupted.wait(self.options.picture_seconds * steps)
                return self._picture(self.chosen, request, steps)
            finally:
                self.job, self.job_count = "", 0

    def _picture(self, checkpoint: Checkpoint, request: Mapping[str, Any], steps: int) -> Json:
        prompt, width, height = (
            str(request.get("prompt", "")),
            int(request.get("width", 512)),
            int(request.get("height", 512)),
        )
        seed = int(request.get("seed", -1))
        seed = random.getrandbits(32) if seed < 0 else seed
        text = (
            f"{prompt}\nSteps: {steps}, Sampler: Euler, CFG scale: 7.0, Seed: {seed}, Size: {width}x{height}, "
            f"Model hash: {checkpoint.short_hash}, Model: {checkpoint.model_name}"
        )
        hashes, drawn_with = self._activate(prompt)
        if hashes:
            told = ", ".join(f"{name}: {digest}" for name, digest in hashes.items())
            text += f', Lora hashes: "{told}"'
        plain = re.sub(r"<\w+:[^>]+>", "", prompt)
        source = self.weights[checkpoint.filename] + f"{plain}|{seed}|{steps}|{drawn_with}".encode()
        picture = png(width, height, source, text)
        info = {
            "prompt": prompt,
            "seed": seed,
            "all_seeds": [seed],
            "width": width,
            "height": height,
            "steps": steps,
            "sd_model_name": checkpoint.model_name,
            "sd_model_hash": checkpoint.short_hash,
            "infotexts": [text],
            "extra_generation_params": {"Lora hashes": told} if hashes else {},
        }
        if self.options.drawn:
            line = {
                "model": checkpoint.filename,
                "hash": checkpoint.short_hash,
                "prompt": prompt,
                "seed": seed,
                "steps": steps,
                "loras": hashes,
            }
            append(self.options.drawn, json.dumps(line) + "\n")
        return {
            "images": [base64.b64encode(picture).decode()],
            "parameters": dict(request),
            "info": json.dumps(info),
        }

    def _activate(self, prompt: str) -> tuple[Json, str]:
        """The LoRAs of a prompt: name → hash as the picture tells them, and what they make of the picture."""
        hashes: Json = {}
        effect = ""
        for name, weight in re.findall(r"<lora:([^:>]+):?([^>]*)>", prompt):
            if self.loras is None:
                print("Skipping unknown extra network: lora", flush=True)
                break
            digest = self.loras.load(name)
            if digest is None:
                continue
            effect += f"{digest}*{weight or 1}"
            if not (self.options.no_hashing or self.options.no_lora_hashes):
                hashes[name.replace(",", "")] = digest[:12]
        return hashes, effect

    def refresh_loras(self) -> None:
        with self.queue_lock:
            if self.loras is not None:
                self.loras.scan()

    def refresh(self) -> None:
        with self.queue_lock:
            self.scan()

    def unload(self) -> None:
        with self.load_lock:
            self.loaded = None

    def progress(self) -> Json:
        state = {
            "skipped": False,
            "interrupted": self.interrupted.is_set(),
            "job": self.job,
            "job_count": self.job_count,
        }
        return {"progress": 0.0, "eta_relative": 0.0, "state": state, "current_image": None, "textinfo": None}

    def settings(self) -> Json:
        return {
            "sd_model_checkpoint": self.chosen.title if self.chosen else None,
            "sd_checkpoint_hash": (self.chosen.sha256 or "") if self.chosen else "",
            "samples_save": True,
            **({} if self.loras is None else {"lora_add_hashes_to_infotext": not self.options.no_lora_hashes}),
        }

    def _read_settings(self) -> Json:
        path: Path | None = self.options.settings
        if path is None or not path.exists():
            return {}
        value: Json = json.loads(path.read_text())
        return value

    def _write_settings(self) -> None:
        if self.options.settings is not None:
            self.options.settings.write_text(json.dumps(self.settings()))


def append(path: Path, text: str) -> None:
    """Append in one write, so that a reader sees whole lines."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


class Handler(BaseHTTPRequestHandler):
    """The routes."""

    engine: ClassVar[Engine]
    options: ClassVar[argparse.Namespace]
    api_from: ClassVar[float]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._route("GET")

    def do_POST(self) -> None:
        self._route("POST")

    def _route(self, method: str) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        raw = self.rfile.read(length)
        if self.options.hang_file is not None and self.options.hang_file.exists():
            threading.Event().wait(self.options.life)
        path = self.path.split("?", 1)[0]
        if time.monotonic() < self.api_from:
            self._answer(404, {"detail": "Not Found"})
            return
        if path.startswith("/sdapi/") and not self._let_in():
            self._answer(401, {"detail": "Incorrect username or password"}, {"WWW-Authenticate": "Basic"})
            return
        try:
            body = json.loads(raw) if raw else {}
            self._answer(200, self._call(method, path, body))
        except ApiError as error:
            self._answer(error.status, error.body)

    def _let_in(self) -> bool:
        if not self.options.auth:
            return True
        expected = "Basic " + base64.b64encode(self.options.auth.encode()).decode()
        return self.headers.get("Authorization") == expected

    def _call(self, method: str, path: str, body: Json) -> Any:
        engine = self.engine
        match method, path.removeprefix("/sdapi/v1"):
            case "GET", "/internal/ping" | "/docs" | "/":
                return {}
            case "GET", "/sd-models":
                return [checkpoint.to_json() for checkpoint in engine.listed]
            case "POST", "/refresh-checkpoints":
                engine.refresh()
                return None
            case "GET", "/loras" if engine.loras is not None:
                return [lora.to_json() for lora in engine.loras.listed]
            case "POST", "/refresh-loras" if engine.loras is not None:
                engine.refresh_loras()
                return None
            case "GET", "/options":
                return engine.settings()
            case "POST", "/options":
                if "sd_model_checkpoint" in body:
                    engine.choose(str(body["sd_model_checkpoint"]))
                return None
            case "POST", "/txt2img":
                return engine.draw(body)
            case "GET", "/progress":
                return engine.progress()
            case "GET", "/memory":
                return {"ram": {"free": 1, "used": 1, "total": 2}, "cuda": {"error": "unavailable"}}
            case "GET", "/cmd-flags":
                return self._flags()
            case "POST", "/unload-checkpoint":
                engine.unload()
                return {}
            case "POST", "/reload-checkpoint":
                if engine.chosen:
                    engine.load(engine.chosen)
                return {}
            case "POST", "/interrupt":
                engine.interrupted.set()
                return {}
            case "POST", "/server-kill" | "/server-restart" | "/server-stop" as command if self.options.api_server_stop:
                return self._stop_server(command)
        raise ApiError(404, "HTTPException", "Not Found")

    def _flags(self) -> Json:
        flags: Json = {"ckpt_dir": str(self.engine.folder) if self.options.tells_folder else None, "api": True}
        if self.engine.loras is not None and self.options.tells_folder:
            flags["lora_dir"] = str(self.engine.loras.folder)
        return flags

    def _stop_server(self, command: str) -> Json:
        if command == "/server-kill":
            os._exit(0)
        if command == "/server-restart":
            if not os.environ.get("SD_WEBUI_RESTART"):
                raise ApiError(501, "HTTPException", "Not Implemented")
            os._exit(0)
        # The real one closes the server and lives on, with the model still in memory.
        threading.Thread(target=self.server.shutdown).start()
        return {"Stopping": True}

    def _answer(self, status: int, body: Any, headers: Mapping[str, str] | None = None) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name in the base class
        """Say nothing: the real server's access log is off too."""


class Server(ThreadingHTTPServer):
    """Does not wait for its threads, and takes the port over from a dead predecessor."""

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; names of the real program's flags where it has them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--models", "--ckpt-dir", type=Path, required=True, help="the folder of checkpoints")
    parser.add_argument(
        "--lora-dir", type=Path, help="the folder of LoRAs; without: Lora beside the checkpoints' folder"
    )
    parser.add_argument("--no-loras", action="store_true", help="the extension for LoRAs is switched off")
    parser.add_argument("--no-lora-hashes", action="store_true", help="lora_add_hashes_to_infotext is switched off")
    parser.add_argument("--settings", "--ui-settings-file", type=Path, help="keeps the chosen model between starts")
    parser.add_argument("--auth", "--api-auth", help="user:password of Basic authentication")
    parser.add_argument("--no-hashing", action="store_true")
    parser.add_argument("--api-server-stop", action="store_true")
    parser.add_argument("--api", "--nowebui", action="store_true", help="as the real one; always on")
    parser.add_argument("--lazy", action="store_true", help="load at the next picture, as Forge does")
    parser.add_argument("--drawn", type=Path, help="append a JSON line a picture")
    parser.add_argument("--starts", type=Path, help="append a line a start: the process id")
    parser.add_argument("--start-delay", type=float, default=0.0)
    parser.add_argument("--api-delay", type=float, default=0.0)
    parser.add_argument("--load-seconds", type=float, default=0.0)
    parser.add_argument("--picture-seconds", type=float, default=0.0, help="seconds a step")
    parser.add_argument("--silent-folder", dest="tells_folder", action="store_false", help="cmd-flags names no folder")
    parser.add_argument("--crash-starts", type=int, default=0, help="crash at this many starts (counted in --starts)")
    parser.add_argument("--crash-on-load", help="crash when a file is loaded whose name contains this")
    parser.add_argument("--wedge", action="store_true", help="a bad file spoils the previous model too")
    parser.add_argument("--hang-file", type=Path, help="while this file exists, no request is answered")
    parser.add_argument("--ignore-signals", action="store_true", help="ignore SIGINT and SIGTERM")
    parser.add_argument("--grandchild", action="store_true", help="a detached child process holds the port")
    parser.add_argument("--life", type=float, default=900.0, help="seconds until it ends by itself, whatever happens")
    return parser.parse_args(arguments)


def count_start(options: argparse.Namespace) -> None:
    """Write down this start; crash if it is one that should."""
    if options.starts is None:
        return
    append(options.starts, f"{os.getpid()}\n")
    if len(options.starts.read_text().splitlines()) <= options.crash_starts:
        print("RuntimeError: Torch is not able to use GPU", file=sys.stderr, flush=True)
        raise SystemExit(1)


def main() -> None:
    """Serve until ended."""
    options = parse(sys.argv[1:])
    if options.ignore_signals:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        # As the real one: no clean-up, exit code 0.
        signal.signal(signal.SIGINT, lambda *_: os._exit(0))
    end = threading.Timer(options.life, os._exit, args=(3,))
    end.daemon = True
    end.start()
    count_start(options)
    time.sleep(options.start_delay)
    engine = Engine(options)
    engine.start()
    Handler.engine, Handler.options = engine, options
    Handler.api_from = time.monotonic() + options.api_delay
    with Server(("127.0.0.1", options.port), Handler) as server:
        if options.grandchild:
            sleep = f"import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep({options.life})"
            subprocess.Popen(
                [sys.executable, "-c", sleep],
                pass_fds=[server.fileno()],
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        print(f"Running on local URL:  http://127.0.0.1:{server.server_address[1]}", flush=True)
        server.serve_forever(poll_interval=0.05)
    threading.Event().wait()


if __name__ == "__main__":
    main()
