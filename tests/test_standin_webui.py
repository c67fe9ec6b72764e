"""The stand-in must be as unkind as the real thing: each trap that research names is one that it has."""

import hashlib
import json
import signal
import socket
import struct
import zlib
from pathlib import Path
from threading import Thread

import pytest

from handlers.publish.ask import A1111Client, Absent, Failed, NotReady, Unauthorised
from tests.standins.running import free_port, until, webui, write_model


def draw(client: A1111Client, prompt: str = "a cat", seed: int = 7, steps: int = 1) -> tuple[bytes, str | None]:
    picture = client.txt2img(prompt, steps=steps, width=64, height=64, seed=seed)
    return picture.content, picture.model_hash


def short_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:10]


def test_lists_loads_and_draws_with_real_files(tmp_path: Path) -> None:
    first, second = (
        write_model(tmp_path / "models/a.safetensors", 1),
        write_model(tmp_path / "models/sub/b.safetensors", 2),
    )
    drawn = tmp_path / "drawn.jsonl"
    with webui(tmp_path / "models", "--drawn", str(drawn)) as server:
        listed = {model.model_name: model for model in server.client.models()}
        assert set(listed) == {"a", "sub_b"}
        assert listed["sub_b"].filename == str(second)
        # The first was loaded at start, and so it was hashed; the other was not.
        assert listed["a"].title == f"a.safetensors [{short_hash(first)}]"
        assert listed["sub_b"].title == "sub/b.safetensors"

        picture, model_hash = draw(server.client)
        assert model_hash == short_hash(first)
        server.client.switch("sub_b")
        assert server.client.chosen() == f"sub/b.safetensors [{short_hash(second)}]"
        other, other_hash = draw(server.client)
        assert other_hash == short_hash(second)
        assert other != picture
        assert draw(server.client)[0] == other
        assert draw(server.client, seed=8)[0] != other
    lines = [json.loads(line) for line in drawn.read_text().splitlines()]
    assert [line["hash"] for line in lines] == [short_hash(first), *[short_hash(second)] * 3]
    assert lines[0]["prompt"] == "a cat"


def test_picture_is_a_png(tmp_path: Path) -> None:
    write_model(tmp_path / "a.safetensors", 1)
    with webui(tmp_path) as server:
        picture, _ = draw(server.client)
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", picture[16:24]) == (64, 64)
    data = picture.index(b"IDAT")
    length = int.from_bytes(picture[data - 4 : data])
    assert len(zlib.decompress(picture[data + 4 : data + 4 + length])) == 64 * (1 + 64 * 3)


def test_new_file_is_unknown_until_refresh(tmp_path: Path) -> None:
    write_model(tmp_path / "a.safetensors", 1)
    with webui(tmp_path) as server:
        write_model(tmp_path / "b.safetensors", 2)
        with pytest.raises(Failed, match="model 'b' not found"):
            server.client.switch("b")
        server.client.refresh()
        server.client.switch("b")


def test_overwritten_file_stays_stale(tmp_path: Path) -> None:
    path = write_model(tmp_path / "a.safetensors", 1)
    write_model(tmp_path / "b.safetensors", 2)
    with webui(tmp_path) as server:
        before = draw(server.client)
        write_model(path, 3)
        server.client.refresh()
        server.client.switch("b")
        server.client.switch("a")
        assert draw(server.client) == before
        assert before[1] != short_hash(path)
    with webui(tmp_path) as server:
        assert draw(server.client)[1] == short_hash(path)


def test_a1111_swallows_a_bad_file_and_reverts(tmp_path: Path) -> None:
    path = write_model(tmp_path / "a.safetensors", 1)
    (tmp_path / "bad.safetensors").write_bytes(b"not a model")
    with webui(tmp_path) as server:
        server.client.switch("bad")
        assert draw(server.client)[1] == short_hash(path)


def test_forge_loads_at_the_next_picture_and_wedges(tmp_path: Path) -> None:
    write_model(tmp_path / "a.safetensors", 1)
    third = write_model(tmp_path / "c.safetensors", 2)
    (tmp_path / "bad.safetensors").write_bytes(b"not a model")
    with webui(tmp_path, "--lazy", "--wedge") as server:
        draw(server.client)
        server.client.switch("bad")
        assert server.client.chosen() == "bad.safetensors"
        with pytest.raises(Failed, match="header"):
            draw(server.client)
        server.client.switch("a")
        with pytest.raises(Failed):
            draw(server.client)
        server.client.switch("c")
        assert draw(server.client)[1] == short_hash(third)
        server.client.switch("a")
        draw(server.client)


def test_truncated_file_is_no_model(tmp_path: Path) -> None:
    path = write_model(tmp_path / "a.safetensors", 1)
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(path.read_bytes()[:-8])
    with webui(tmp_path) as server:
        server.client.switch("bad")
        assert draw(server.client)[1] == short_hash(path)


def test_refresh_waits_behind_a_picture(tmp_path: Path) -> None:
    write_model(tmp_path / "a.safetensors", 1)
    with webui(tmp_path, "--picture-seconds", "1") as server:
        drawing = Thread(target=draw, args=(server.client,))
        drawing.start()
        until(lambda: not server.client.idle())
        server.client.refresh()
        assert server.client.idle()
        drawing.join()


def test_interrupt_ends_a_picture(tmp_path: Path) -> None:
    write_model(tmp_path / "a.safetensors", 1)
    with webui(tmp_path, "--picture-seconds", "60") as server:
        drawing = Thread(target=draw, args=(server.client,))
        drawing.start()
        until(lambda: not server.client.idle())
        server.client.interrupt()
        drawing.join(10)
        assert not drawing.is_alive()


def test_port_opens_before_the_api_answers(tmp_path: Path) -> None:
    write_model(tmp_path / "a.safetensors", 1)
    with webui(tmp_path, "--start-delay", "0.4", "--api-delay", "0.6", wait=False) as server:
        with pytest.raises(Absent):
            server.client.models()
        assert server.process.stdout is not None
        until(lambda: "Running on local URL" in server.process.stdout.readline())  # type: ignore[union-attr]
        with pytest.raises(NotReady):
            server.client.models()
        assert not server.client.ready()
        until(server.client.ready)


def test_auth(tmp_path: Path) -> None:
    write_model(tmp_path / "a.safetensors", 1)
    with webui(tmp_path, "--auth", "ann:secret") as server:
        with pytest.raises(Unauthorised, match="FASTSD_WEBUI_AUTH"):
            server.client.models()
        with pytest.raises(Unauthorised):
            A1111Client(server.url, "ann", "wrong").models()
        assert A1111Client(server.url, "ann", "secret").models()


def test_hang_is_absence_in_the_end(tmp_path: Path) -> None:
    write_model(tmp_path / "a.safetensors", 1)
    hang = tmp_path / "hang"
    with webui(tmp_path, "--hang-file", str(hang)) as server:
        hang.touch()
        with pytest.raises(Absent, match="did not answer within"):
            A1111Client(server.url, timeout=0.3).models()


def test_kill_and_restart(tmp_path: Path) -> None:
    write_model(tmp_path / "a.safetensors", 1)
    with webui(tmp_path) as server, pytest.raises(NotReady):
        server.client.kill()
    with webui(tmp_path, "--api-server-stop") as server:
        with pytest.raises(Failed, match="501"):
            server.client._post("/sdapi/v1/server-restart", {}, 5.0)
        server.client.kill()
        assert server.process.wait(10) == 0


def test_settings_outlive_the_process(tmp_path: Path) -> None:
    write_model(tmp_path / "models/a.safetensors", 1)
    second = write_model(tmp_path / "models/b.safetensors", 2)
    options = ("--settings", str(tmp_path / "config.json"))
    with webui(tmp_path / "models", *options) as server:
        server.client.switch("b")
    with webui(tmp_path / "models", *options) as server:
        assert draw(server.client)[1] == short_hash(second)


def test_crash_on_load(tmp_path: Path) -> None:
    write_model(tmp_path / "a.safetensors", 1)
    write_model(tmp_path / "b.safetensors", 2)
    with webui(tmp_path, "--crash-on-load", "b.") as server:
        with pytest.raises(Absent, match="broke the connection off"):
            server.client.switch("b")
        assert server.process.wait(10) == 139


def test_crashes_at_start_as_often_as_told(tmp_path: Path) -> None:
    write_model(tmp_path / "models/a.safetensors", 1)
    options = ("--starts", str(tmp_path / "starts"), "--crash-starts", "1")
    with webui(tmp_path / "models", *options, wait=False) as server:
        assert server.process.wait(10) == 1
    with webui(tmp_path / "models", *options) as server:
        assert server.process.poll() is None


def test_ignores_signals_and_leaves_a_grandchild_on_the_port(tmp_path: Path) -> None:
    write_model(tmp_path / "a.safetensors", 1)
    port = free_port()
    with webui(tmp_path, "--ignore-signals", "--grandchild", "--life", "6", port=port) as server:
        server.process.send_signal(signal.SIGINT)
        server.process.send_signal(signal.SIGTERM)
        draw(server.client)
        server.process.kill()
        server.process.wait(10)
        # The listening socket lives on in the grandchild.
        with pytest.raises(OSError, match="in use"), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
