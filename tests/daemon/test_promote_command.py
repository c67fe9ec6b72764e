"""``fastsd models promote`` as its users have it: exit codes and sentences, with and without one who holds the tree."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from daemon.promotion import promoted
from daemon.state import TreeLock
from sessions.manifest import INTERMEDIATE, Identity, Manifest, write_identity
from tests.daemon.test_cli import Console

RUN = "261125-ab12"


@pytest.fixture
def console(tmp_path: Path) -> Console:
    return Console(tmp_path)


@pytest.fixture
def session(console: Console) -> Path:
    """A session with the model of a run and those of its steps 200 and 400."""
    folder = console.root / "Sessions" / "my dog"
    write_identity(folder, Identity("0123abcd", folder.name))
    manifest = Manifest.load(folder)
    (folder / "runs" / RUN).mkdir(parents=True)
    (folder / f"dog-{RUN}.safetensors").write_bytes(b"finished")
    manifest.append([{"kind": "convert", "run": RUN, "outputs": [f"dog-{RUN}.safetensors"]}])
    for step in (200, 400):
        name = f"{RUN}-step-{step}"
        outputs = [f"runs/{RUN}/dog-{name}.{ending}" for ending in ("safetensors", "json")]
        for output in outputs:
            (folder / output).write_text(output)
        manifest.append([{"kind": INTERMEDIATE, "run": name, "of": RUN, "step": step, "outputs": outputs}])
    return folder


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["{session}"], 2, f"say which model of my dog.*{RUN}, {RUN}-step-200 (--step 200)"),
        (["{session}/runs", "--step", "200"], 2, "say which model"),
        (["{session}/nothing"], 2, "does not exist"),
        (["{session}/dog-{run}.safetensors", "--step", "200"], 2, "leave --step out"),
        (["{root}", "--step", "200"], 2, "lies in no session"),
        (["{session}", "--step", "300"], 1, "no model of step 300 here"),
        (["{session}/other.safetensors"], 1, "other.safetensors is no model of this session"),
    ],
)
def test_what_makes_no_sense_changes_nothing(
    console: Console, session: Path, arguments: list[str], code: int, said: str
) -> None:
    (session / "other.safetensors").write_bytes(b"a person's")
    before = (session / ".fastsd" / "manifest.jsonl").read_bytes()
    done = console.run(
        "models", "promote", *(word.format(session=session, root=console.root, run=RUN) for word in arguments)
    )
    assert done.returncode == code, done.stderr
    for part in said.split(".*"):
        assert part in done.stderr
    assert (session / ".fastsd" / "manifest.jsonl").read_bytes() == before


def test_by_step_and_by_file_without_a_daemon(console: Console, session: Path, tmp_path: Path) -> None:
    done = console.run("models", "promote", session, "--step", "400", "--json")
    assert done.returncode == 0, done.stderr
    model = session / f"dog-{RUN}-step-400.safetensors"
    assert json.loads(done.stdout) == {
        "session": "my dog",
        "folder": str(session),
        "model": str(model),
        "name": f"{RUN}-step-400",
        "run": RUN,
        "step": 400,
        "daemon": False,
    }
    assert model.read_text() == f"runs/{RUN}/{model.name}"
    assert model.with_suffix(".json").is_file()
    assert promoted(Manifest.load(session))["supersedes"] == [RUN]
    # By its file, through a link, and in words; nothing is written where nobody watched.
    (tmp_path / "link").symlink_to(console.root)
    done = console.run("models", "promote", tmp_path / "link" / "Sessions" / "my dog" / f"dog-{RUN}.safetensors")
    assert done.returncode == 0, done.stderr
    assert "is the model of my dog now. The next `fastsd up` publishes it." in done.stdout
    assert promoted(Manifest.load(session))["run"] == RUN
    assert not console.state.folder.exists()


def test_the_tree_is_held_by_somebody_who_cannot_be_asked(console: Console, session: Path) -> None:
    console.state.prepare()
    before = (session / ".fastsd" / "manifest.jsonl").read_bytes()
    with TreeLock(console.state):
        done = console.run("models", "promote", session, "--step", "400")
        assert (done.returncode, "already watched by process" in done.stderr) == (1, True)
        # Its state folder is another one, on another machine perhaps: the lock in the tree tells.
        shutil.rmtree(console.state.folder)
        done = console.run("models", "promote", session, "--step", "400")
        assert (done.returncode, "already watched by process" in done.stderr) == (1, True)
    assert (session / ".fastsd" / "manifest.jsonl").read_bytes() == before
    assert console.run("models", "promote", session, "--step", "400").returncode == 0
