"""Publishing a LoRA against the stand-in: it is listed, drawn with, and nothing is switched."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers.context import JobContext, JobResult, Waiting
from handlers.publish.ask import Lora, Picture
from handlers.publish.folders import beside
from handlers.publish.job import Patience, PublishHandler
from handlers.publish.lora import Stale, data_hash, hashes_of, judge
from handlers.publish.prove import NotTaken, draw
from sessions.layout import model_stem
from tests.standins.running import Running, free_port, until, webui, write_model, write_tensors

PROMPT = "<lora:cat-1a2b:1> zwx cat"


@dataclass
class Job:
    """A publish job of a LoRA, on a tree and a WebUI laid out as A1111 lays its folders out."""

    tmp_path: Path
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def models(self) -> Path:
        return self.tmp_path / "webui/models/Stable-diffusion"

    @property
    def loras(self) -> Path:
        return self.tmp_path / "webui/models/Lora"

    @property
    def lora(self) -> Path:
        return self.tmp_path / "tree/Sessions/cat/cat-1a2b.safetensors"

    def run(self, url: str, **payload: Any) -> JobResult:
        settings = {"kind": "auto", "url": url, "models": str(self.models), "switch": "always", **self.settings}
        values = {
            "model": str(self.lora),
            "name": "cat",
            "run": "1a2b",
            "webui": settings,
            "model_kind": "lora",
            "family": "sd1",
            "trigger": "zwx cat",
            **payload,
        }

        def report(_done: float, _total: float, _note: str, _facts: Mapping[str, Any]) -> None:
            """Nobody listens."""

        context = JobContext(1, "publish", values, "cpu", self.tmp_path, report, lambda: False, lambda: False)
        return PublishHandler(Patience(busy=0.5, crashed=20.0)).run(context)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    job = Job(tmp_path)
    write_model(job.models / "old.safetensors", 1)
    write_model(job.lora, 2)
    return job


def hash_of_data(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()


def chosen_of(server: Running) -> str | None:
    return server.client.chosen()


def test_is_drawn_with_and_nothing_is_switched(job: Job) -> None:
    job.lora.with_suffix(".json").write_text("{}")
    drawn, picture = job.tmp_path / "drawn", job.tmp_path / "tree/proof.png"
    with webui(job.models, "--drawn", str(drawn)) as server:
        before = chosen_of(server)
        result = job.run(server.url, proof_picture=str(picture))
        assert chosen_of(server) == before
        assert [model.model_name for model in server.client.models()] == ["old"], "it is no checkpoint"
        plain = draw(server.client, "zwx cat").content
    placed = job.loras / "cat-1a2b.safetensors"
    digest = hash_of_data(job.lora)[:12]
    assert result.facts == {
        "run": "1a2b",
        "model_kind": "lora",
        "published": str(placed),
        "lora_hash": digest,
        "prompt": PROMPT,
        "proof": "picture",
        "note": None,
    }
    assert placed.samefile(job.lora)
    assert (job.loras / "cat-1a2b.json").exists()
    line = json.loads(drawn.read_text().splitlines()[0])
    assert (line["model"], line["prompt"]) == (str(job.models / "old.safetensors"), PROMPT)
    assert line["loras"] == {"cat-1a2b": digest}
    assert list(result.outputs) == [picture]
    assert picture.read_bytes() != plain, "the LoRA makes another picture"


def test_again_ends_in_the_same_state(job: Job) -> None:
    with webui(job.models) as server:
        assert job.run(server.url).facts == job.run(server.url).facts
    assert [path.name for path in job.loras.iterdir()] == ["cat-1a2b.safetensors"]


@pytest.mark.parametrize(
    ("settings", "options", "where"),
    [
        ({}, (), "webui/models/Lora"),
        ({"models": None}, (), "webui/models/Lora"),
        ({"models": None}, ("--silent-folder",), "webui/models/Lora"),
        ({"loras": "{tmp}/mine"}, ("--lora-dir", "{tmp}/mine"), "mine"),
        ({"models": None}, ("--lora-dir", "{tmp}/theirs"), "theirs"),
    ],
    ids=["beside the models", "told", "beside what is listed", "configured", "told to lie elsewhere"],
)
def test_where_it_goes(job: Job, settings: dict[str, Any], options: tuple[str, ...], where: str) -> None:
    folder = str(job.tmp_path)
    job.settings = {key: value and value.format(tmp=folder) for key, value in settings.items()}
    with webui(job.models, *(option.format(tmp=folder) for option in options)) as server:
        result = job.run(server.url)
    assert result.facts["published"] == str(job.tmp_path / where / "cat-1a2b.safetensors")
    assert result.facts["proof"] == "picture"


def test_beside() -> None:
    assert beside(Path("/w/models/Stable-diffusion")) == Path("/w/models/Lora")
    assert beside(Path("/w/models/Stable-diffusion/xl/mine")) == Path("/w/models/Lora")
    assert beside(Path("/w/checkpoints")) == Path("/w/Lora")


@given(name=st.text())
def test_a_lora_of_any_sessions_name_is_found_in_what_the_picture_tells(name: str) -> None:
    stem, digest = model_stem(name, "260101-abcd"), "0123456789ab"
    # As A1111 writes them: commas part the entries, colons name and hash.
    told = ", ".join(f"{each.replace(':', '').replace(',', '')}: {digest}" for each in ("other", stem))
    picture = Picture(b"", "a" * 10, "old", {"extra_generation_params": {"Lora hashes": told}})
    assert judge(picture, Lora(stem, ""), digest + "f" * 52, tells=True).kind == "picture"
    with pytest.raises(Stale):
        judge(picture, Lora(stem, ""), "f" * 64, tells=True)


def test_absent_webui_waits_and_the_lora_lies_ready(job: Job) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(Waiting, match=r"LoRA folder .*models/Lora is not there: mount it, or set webui\.loras"):
        job.run(url)
    job.loras.mkdir()
    with pytest.raises(Waiting, match="waits for a WebUI"):
        job.run(url)
    assert (job.loras / "cat-1a2b.safetensors").samefile(job.lora)
    job.settings = {"models": None}
    with pytest.raises(Waiting, match="waits for a WebUI"):
        job.run(url)


def test_none(job: Job) -> None:
    job.settings = {"kind": "none"}
    facts = job.run("http://127.0.0.1:9").facts
    assert (facts["proof"], facts["model_kind"], facts["published"]) == ("none", "lora", None)


def test_announce_draws_nothing(job: Job) -> None:
    job.settings = {"switch": "announce"}
    drawn = job.tmp_path / "drawn"
    with webui(job.models, "--drawn", str(drawn)) as server:
        assert job.run(server.url).facts["proof"] == "announced"
        assert [lora.name for lora in server.client.loras()] == ["cat-1a2b"]
    assert not drawn.exists()


@pytest.mark.parametrize("option", ["--no-hashing", "--no-lora-hashes"])
def test_a_webui_that_says_nothing_is_proven_by_the_name(job: Job, option: str) -> None:
    with webui(job.models, option) as server:
        facts = job.run(server.url).facts
    assert (facts["proof"], facts["note"]) == ("name", None)


def test_another_family_is_not_forced(job: Job) -> None:
    xl = {"model.diffusion_model.x": 1, "conditioner.embedders.1.model.x": 1, "first_stage_model.x": 1}
    write_tensors(job.models / "old.safetensors", xl)
    drawn = job.tmp_path / "drawn"
    with webui(job.models, "--drawn", str(drawn)) as server:
        facts = job.run(server.url).facts
        assert facts["proof"] == "listed"
        assert facts["note"] == "the WebUI's model, old, is sdxl; the LoRA is for sd1"
        assert not drawn.exists()
        assert job.run(server.url, family="sdxl").facts["proof"] == "picture"


def test_no_model_at_all_is_no_reason_to_wait(job: Job) -> None:
    (job.models / "old.safetensors").unlink()
    with webui(job.models) as server:
        facts = job.run(server.url).facts
    assert (facts["proof"], facts["note"]) == ("listed", "no model is chosen in the WebUI to draw with")


def test_a_model_that_cannot_draw_is_not_the_loras_fault(job: Job) -> None:
    (job.models / "old.safetensors").write_bytes(b"no model at all")
    with webui(job.models, "--lazy") as server:
        facts = job.run(server.url).facts
    assert (facts["proof"], facts["note"]) == (
        "listed",
        "the WebUI draws nothing with its model, old, at present",
    )


def test_a_lora_that_does_not_load_is_told(job: Job) -> None:
    job.lora.write_bytes(job.lora.read_bytes()[:-1])
    with webui(job.models) as server, pytest.raises(NotTaken, match="drew without cat-1a2b, which it lists"):
        job.run(server.url)


def test_a_name_that_the_webui_knows_stale(job: Job) -> None:
    stale = write_model(job.loras / job.lora.name, 99)
    with webui(job.models) as server:
        assert hashes_of(draw(server.client, PROMPT)) == {"cat-1a2b": hash_of_data(stale)[:12]}
        stale.unlink()
        os.utime(job.lora, (1, 1))  # a link keeps the time, and the WebUI looks at nothing else
        result = job.run(server.url)
    second = f"cat-1a2b~{hashlib.sha256(job.lora.read_bytes()).hexdigest()[:8]}"
    assert result.facts["published"] == str(job.loras / f"{second}.safetensors")
    assert result.facts["prompt"] == f"<lora:{second}:1> zwx cat"
    assert result.facts["proof"] == "picture"


def test_never_overwrites_another_file_of_the_name(job: Job) -> None:
    other = write_model(job.loras / job.lora.name, 99)
    content = other.read_bytes()
    with webui(job.models) as server:
        assert "~" in job.run(server.url).facts["prompt"]
    assert other.read_bytes() == content


def test_a_folder_that_the_webui_does_not_read_waits(job: Job) -> None:
    job.settings = {"loras": str(job.tmp_path / "elsewhere")}
    (job.tmp_path / "elsewhere").mkdir()
    with webui(job.models) as server, pytest.raises(Waiting, match=r"does not list it: set webui\.loras"):
        job.run(server.url)


def test_a_webui_without_loras_waits(job: Job) -> None:
    job.loras.mkdir()
    with webui(job.models, "--no-loras") as server, pytest.raises(Waiting, match="has no list of LoRAs"):
        job.run(server.url)


def test_idle_waits_for_the_picture_that_is_drawn(job: Job) -> None:
    job.settings = {"switch": "idle"}
    with webui(job.models, "--picture-seconds", "0.1") as server:

        def draw_long() -> None:
            server.client.txt2img("long", steps=600, width=64, height=64, seed=1)

        drawing = Thread(target=draw_long)
        drawing.start()
        until(lambda: not server.client.idle())
        with pytest.raises(Waiting, match="until the WebUI is idle"):
            job.run(server.url)
        assert server.client.loras() == []
        server.client.interrupt()
        drawing.join()
        assert job.run(server.url).facts["proof"] == "picture"


def test_the_hash_is_of_what_follows_the_header(tmp_path: Path) -> None:
    file = write_model(tmp_path / "a.safetensors", 1)
    assert data_hash(file) == hash_of_data(file)
    other = write_tensors(tmp_path / "b.safetensors", {"x": 1}, {"title": "b"})
    same = write_tensors(tmp_path / "c.safetensors", {"x": 1}, {"title": "c"})
    assert data_hash(other) == data_hash(same), "metadata does not count"


def test_the_standins_list_is_old_until_it_is_refreshed(job: Job) -> None:
    with webui(job.models) as server:
        write_model(job.loras / "a.safetensors", 5)
        assert server.client.loras() == []
        server.client.refresh_loras()
        assert [(lora.name, lora.filename) for lora in server.client.loras()] == [
            ("a", str(job.loras / "a.safetensors"))
        ]
        write_model(job.loras / "b.safetensors", 6)
        both = hashes_of(draw(server.client, "<lora:a:1> <lora:b:0.5> <lora:c:1> x"))
        assert set(both) == {"a", "b"}, "one that is not listed is looked for; an unknown one is ignored"
        weaker = draw(server.client, "<lora:a:0.5> <lora:b:0.5> x").content
        assert weaker != draw(server.client, "<lora:a:1> <lora:b:0.5> x").content
        server.process.kill()
        assert server.process.stdout is not None
        assert "Couldn't find network with name c" in server.process.stdout.read()


def test_the_standins_refresh_waits_behind_a_picture(job: Job) -> None:
    with webui(job.models, "--picture-seconds", "0.1") as server:
        drawing = Thread(target=lambda: server.client.txt2img("long", steps=8, width=64, height=64, seed=1))
        drawing.start()
        until(lambda: not server.client.idle())
        server.client.refresh_loras()
        assert server.client.idle(), "it comes back when the picture is drawn"
        drawing.join()
