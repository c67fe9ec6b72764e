"""Publishing against a stand-in that is a process of its own, with real files and real hashes."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from handlers.context import Cancelled, JobContext, JobResult, Stopping, Waiting
from handlers.publish import prove, swap
from handlers.publish.ask import Absent, Model
from handlers.publish.job import Patience, PublishHandler
from handlers.publish.prove import NotTaken
from sessions.files import TEMPORARY_PREFIX
from sessions.refusal import Refusal
from tests.standins.running import free_port, until, webui, write_model


@dataclass
class Job:
    """A publish job on a tree and a WebUI folder in ``tmp_path``."""

    tmp_path: Path
    settings: dict[str, Any] = field(default_factory=dict)
    cancelled: bool = False
    stopping: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.tmp_path / "webui"

    @property
    def model(self) -> Path:
        return self.tmp_path / "tree/Sessions/cat/cat-1a2b.safetensors"

    def run(self, url: str, handler: PublishHandler | None = None, **payload: Any) -> JobResult:
        webui_settings = {"kind": "auto", "url": url, "models": str(self.folder), "switch": "always", **self.settings}
        values = {"model": str(self.model), "name": "cat", "run": "1a2b", "webui": webui_settings, **payload}

        def report(done: float, total: float, note: str, facts: Mapping[str, Any]) -> None:
            self.notes.append(note)

        context = JobContext(
            1, "publish", values, "cpu", self.tmp_path, report, lambda: self.cancelled, lambda: self.stopping
        )
        return (handler or PublishHandler(Patience(busy=0.5, crashed=20.0))).run(context)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    job = Job(tmp_path)
    write_model(job.folder / "old.safetensors", 1)
    write_model(job.model, 2)
    return job


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_publishes_and_proves(job: Job) -> None:
    for suffix in (".yaml", ".preview.png", ".json"):
        job.model.with_name(job.model.stem + suffix).write_text(suffix)
    drawn, picture = job.tmp_path / "drawn", job.tmp_path / "tree/proof.png"
    with webui(job.folder, "--drawn", str(drawn)) as server:
        result = job.run(server.url, proof_picture=str(picture))
        assert server.client.chosen() == f"cat-1a2b.safetensors [{sha256(job.model)[:10]}]"
    assert result.facts == {
        "run": "1a2b",
        "published": str(job.folder / "cat-1a2b.safetensors"),
        "sd_model_hash": sha256(job.model)[:10],
        "proof": "picture",
        "previous": f"old.safetensors [{sha256(job.folder / 'old.safetensors')[:10]}]",
    }
    assert (job.folder / "cat-1a2b.safetensors").samefile(job.model)
    assert (job.folder / "cat-1a2b.yaml").read_text() == ".yaml"
    assert (job.folder / "cat-1a2b.preview.png").read_text() == ".preview.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert list(result.outputs) == [picture]
    line = json.loads(drawn.read_text().splitlines()[-1])
    assert line["hash"] == sha256(job.model)[:10]
    assert line["model"] == str(job.folder / "cat-1a2b.safetensors")


def test_again_ends_in_the_same_state(job: Job) -> None:
    with webui(job.folder) as server:
        first = job.run(server.url)
        second = job.run(server.url)
    assert second.facts["published"] == first.facts["published"]
    assert second.facts["proof"] == "picture"
    assert {path.name for path in job.folder.iterdir()} == {"old.safetensors", "cat-1a2b.safetensors"}


@pytest.mark.parametrize("options", [(), ("--silent-folder",)])
def test_finds_the_folder_by_asking(job: Job, options: tuple[str, ...]) -> None:
    job.settings = {"models": None}
    with webui(job.folder, *options) as server:
        assert job.run(server.url).facts["published"] == str(job.folder / "cat-1a2b.safetensors")


def test_no_folder_to_be_found_waits(job: Job) -> None:
    job.settings = {"models": None}
    empty = job.tmp_path / "empty"
    with webui(empty, "--silent-folder") as server, pytest.raises(Waiting, match=r"set webui\.models"):
        job.run(server.url)


def test_absent_webui_waits_and_the_model_lies_ready(job: Job) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(Waiting) as caught:
        job.run(url)
    assert caught.value.reason == (
        f"The model is ready. It waits for a WebUI at {url}: start it, or set webui.kind: none in fastsd.yaml."
    )
    assert (job.folder / "cat-1a2b.safetensors").samefile(job.model)
    job.notes.clear()
    with pytest.raises(Waiting):
        job.run(url)
    assert job.notes == [], "a job that only waits must not read gigabytes again and again"


def test_starting_webui_waits(job: Job) -> None:
    with webui(job.folder, "--api-delay", "600", wait=False) as server:
        until(lambda: _answers_something(server.client.models))
        with pytest.raises(Waiting, match="still starting, or it was started without --api"):
            job.run(server.url)


def _answers_something(call: Any) -> bool:
    try:
        call()
    except Absent:
        return False
    except Exception:
        return True
    return True


def test_none_and_kinds_of_later(job: Job) -> None:
    job.settings = {"kind": "none"}
    assert job.run("http://127.0.0.1:9").facts["proof"] == "none"
    job.settings = {"kind": "comfyui"}
    with pytest.raises(Waiting, match="comfyui is not supported yet"):
        job.run("http://127.0.0.1:9")


def test_credentials(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    with webui(job.folder, "--auth", "ann:pass:word") as server:
        with pytest.raises(Waiting, match="FASTSD_WEBUI_AUTH=user:password"):
            job.run(server.url)
        job.settings = {"user": "ann", "password": "pass:word"}
        assert job.run(server.url).facts["proof"] == "picture"
        job.settings = {}
        monkeypatch.setenv("FASTSD_WEBUI_AUTH", "ann:pass:word")
        assert job.run(server.url).facts["proof"] == "picture"


def test_announce_does_not_switch(job: Job) -> None:
    job.settings = {"switch": "announce"}
    with webui(job.folder) as server:
        before = server.client.chosen()
        result = job.run(server.url)
        assert result.facts["proof"] == "announced"
        assert server.client.chosen() == before
        assert "cat-1a2b" in {model.model_name for model in server.client.models()}


def test_idle_waits_for_the_picture_that_is_drawn(job: Job) -> None:
    job.settings = {"switch": "idle"}
    with webui(job.folder, "--picture-seconds", "0.1") as server:

        def draw() -> None:
            server.client.txt2img("long", steps=600, width=64, height=64, seed=1)

        drawing = Thread(target=draw)
        drawing.start()
        until(lambda: not server.client.idle())
        with pytest.raises(Waiting, match="until the WebUI is idle"):
            job.run(server.url)
        chosen = server.client.chosen()
        assert chosen is not None
        assert chosen.startswith("old")
        job.stopping = True
        with pytest.raises(Stopping):
            job.run(server.url)
        job.stopping = False
        server.client.interrupt()
        drawing.join()
        assert job.run(server.url).facts["proof"] == "picture"


def test_cancelled_while_copying_leaves_nothing(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", _no_links)
    job.cancelled = True
    with webui(job.folder) as server, pytest.raises(Cancelled):
        job.run(server.url, sha256=sha256(job.model))
    assert [path.name for path in job.folder.iterdir()] == ["old.safetensors"]


def _no_links(*_: Any, **__: Any) -> None:
    raise OSError(18, "Invalid cross-device link")


def test_copies_where_links_do_not_reach(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", _no_links)
    with webui(job.folder) as server:
        assert job.run(server.url).facts["proof"] == "picture"
    placed = job.folder / "cat-1a2b.safetensors"
    assert placed.read_bytes() == job.model.read_bytes()
    assert not placed.samefile(job.model)
    assert not [path for path in job.folder.iterdir() if path.name.startswith(TEMPORARY_PREFIX)]


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from handlers.publish import swap

    def no_links(*_, **__):
        raise OSError(18, "Invalid cross-device link")

    def kill_at_half(done, size):
        if done * 2 >= size:
            os.kill(os.getpid(), signal.SIGKILL)

    os.link = no_links
    model, folder = Path(sys.argv[1]), Path(sys.argv[2])
    swap.place(model, swap.Shelf(folder), sys.argv[3], model.stem, kill_at_half)
"""


def test_killed_while_copying_shows_nothing_and_the_next_try_ends_the_same(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.model.write_bytes(job.model.read_bytes() + bytes(10_000_000))  # more than one block
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(job.model), str(job.folder), sha256(job.model)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    [left] = [path for path in job.folder.iterdir() if path.name != "old.safetensors"]
    assert left.name.startswith(TEMPORARY_PREFIX)
    with webui(job.folder) as server:
        assert [model.model_name for model in server.client.models()] == ["old"], "no half file is listed"
    monkeypatch.setattr(os, "link", _no_links)
    with pytest.raises(Waiting):
        job.run(f"http://127.0.0.1:{free_port()}")
    assert {path.name for path in job.folder.iterdir()} == {"old.safetensors", "cat-1a2b.safetensors"}
    assert sha256(job.folder / "cat-1a2b.safetensors") == sha256(job.model)


def test_never_overwrites_another_file_of_the_name(job: Job) -> None:
    other = write_model(job.folder / job.model.name, 99)
    content = other.read_bytes()
    with webui(job.folder) as server:
        result = job.run(server.url)
    assert other.read_bytes() == content
    assert result.facts["published"] == str(job.folder / f"cat-1a2b~{sha256(job.model)[:8]}.safetensors")
    assert result.facts["proof"] == "picture"


@pytest.mark.parametrize("options", [(), ("--lazy",)])
def test_a_name_that_the_webui_knows_stale(job: Job, options: tuple[str, ...]) -> None:
    stale = write_model(job.folder / job.model.name, 99)
    with webui(job.folder, *options) as server:
        server.client.switch("cat-1a2b")
        server.client.txt2img("x", steps=1, width=64, height=64, seed=1)
        stale.unlink()
        result = job.run(server.url)
    assert result.facts["proof"] == "picture"
    assert result.facts["sd_model_hash"] == sha256(job.model)[:10]
    assert result.facts["published"] == str(job.folder / f"cat-1a2b~{sha256(job.model)[:8]}.safetensors")


def test_another_hash_under_the_right_name_is_told(job: Job) -> None:
    with webui(job.folder) as server:
        published = Path(job.run(server.url).facts["published"])
        entry = swap.find(server.client.models(), published)
        assert entry is not None
        with pytest.raises(NotTaken, match="older file of the name cat-1a2b"):
            prove.judge(prove.draw(server.client), entry, "0" * 64)


def test_no_hashing_is_proven_by_name(job: Job) -> None:
    with webui(job.folder, "--no-hashing") as server:
        assert job.run(server.url).facts["proof"] == "name"


def test_forge_is_proven_by_the_picture(job: Job) -> None:
    with webui(job.folder, "--lazy", "--wedge") as server:
        assert job.run(server.url).facts["proof"] == "picture"


@pytest.mark.parametrize(
    "options", [(), ("--lazy",), ("--lazy", "--wedge")], ids=["a1111 reverts", "forge fails", "forge wedges"]
)
def test_a_model_that_does_not_load_leaves_the_previous_one(job: Job, options: tuple[str, ...]) -> None:
    old = sha256(job.folder / "old.safetensors")[:10]
    write_model(job.folder / "third.safetensors", 3)
    job.model.write_bytes(b"no model at all")
    with webui(job.folder, *options) as server:
        server.client.txt2img("x", steps=1, width=64, height=64, seed=1)
        with pytest.raises(NotTaken, match=r"does not take cat-1a2b: .* It has its previous model again, old; its log"):
            job.run(server.url)
        assert server.client.txt2img("x", steps=1, width=64, height=64, seed=1).model_hash == old


def test_wedged_with_no_third_model_says_restart(job: Job) -> None:
    job.model.write_bytes(b"no model at all")
    with webui(job.folder, "--lazy", "--wedge") as server:
        server.client.txt2img("x", steps=1, width=64, height=64, seed=1)
        with pytest.raises(NotTaken, match=r"could not be chosen again either: restart it"):
            job.run(server.url)


@pytest.mark.parametrize("options", [(), ("--lazy",)])
def test_a_crash_after_the_swap_rolls_back_when_the_webui_is_back(job: Job, options: tuple[str, ...]) -> None:
    settings = ("--settings", str(job.tmp_path / "config.json"), *options)
    port = free_port()
    caught: list[Exception] = []

    def publish(url: str) -> None:
        try:
            job.run(url)
        except Exception as error:
            caught.append(error)

    with webui(job.folder, "--crash-on-load", "cat", *settings, port=port) as server:
        server.client.switch("old")
        publishing = Thread(target=publish, args=(server.url,))
        publishing.start()
        server.process.wait(20)
    with webui(job.folder, "--crash-on-load", "cat", *settings, port=port) as server:
        publishing.join(20)
        assert "it went away while it loaded the model" in str(caught[0])
        assert isinstance(caught[0], NotTaken)
        assert server.client.chosen() == f"old.safetensors [{sha256(job.folder / 'old.safetensors')[:10]}]"


def test_a_crash_without_return_waits(job: Job) -> None:
    with webui(job.folder, "--crash-on-load", "cat") as server, pytest.raises(Waiting, match="waits for a WebUI"):
        job.run(server.url, PublishHandler(Patience(crashed=0.2)))


def test_missing_model_is_refused(job: Job) -> None:
    job.model.unlink()
    with pytest.raises(Refusal, match="no longer there"):
        job.run("http://127.0.0.1:9")


def test_missing_folder_and_no_right_wait(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.settings = {"models": str(job.tmp_path / "unmounted")}
    with webui(job.folder) as server:
        with pytest.raises(Waiting, match="is not there: mount it"):
            job.run(server.url)

        def denied(*_: Any, **__: Any) -> bool:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(swap, "_link", denied)
        job.settings = {}
        with pytest.raises(Waiting, match="may not write"):
            job.run(server.url)


def test_full_disk_waits_and_leaves_nothing(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", _no_links)
    monkeypatch.setattr("sessions.files.sync_file", full)
    with webui(job.folder) as server, pytest.raises(Waiting, match="no room"):
        job.run(server.url)
    assert [path.name for path in job.folder.iterdir()] == ["old.safetensors"]


def test_sidecars_that_people_changed_stay(job: Job) -> None:
    (job.folder / "cat-1a2b.json").write_text('{"notes": "mine"}')
    job.model.with_suffix(".json").write_text("{}")
    with suppress(Waiting):
        job.run("http://127.0.0.1:9")
    assert (job.folder / "cat-1a2b.json").read_text() == '{"notes": "mine"}'


def test_find_by_path_and_through_a_container(tmp_path: Path) -> None:
    real = write_model(tmp_path / "models/a-1.safetensors", 1)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "models")
    listed = [Model("a", "a-1", str(link / "a-1.safetensors")), Model("b", "b", "/data/models/b-2.safetensors")]
    assert swap.find(listed, real) is listed[0]
    assert swap.find(listed, tmp_path / "models/b-2.safetensors") is listed[1]
    twice = [*listed, Model("b", "sub_b", "/data/models/sub/b-2.safetensors")]
    assert swap.find(twice, tmp_path / "models/b-2.safetensors") is None


def test_usual_folder() -> None:
    rows = ["/m/a.ckpt", "/m/b.ckpt", "/m/sdxl/c.ckpt", "/other/d.ckpt"]
    assert swap.usual_folder([Model(row, row, row) for row in rows]) == Path("/m")
    assert swap.usual_folder([]) is None
