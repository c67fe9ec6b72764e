from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from sessions import files

WRITER = """
import sys
from pathlib import Path
from sessions import files
final = Path(sys.argv[1])
with files.atomic_file(final) as file:
    file.write(b"x" * 1_000_000)
    file.flush()
    print("half", flush=True)
    sys.stdin.read()
    file.write(b"y")
"""


def test_nothing_half_finished_is_visible_after_a_kill(tmp_path: Path) -> None:
    final = tmp_path / "model.safetensors"
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(final)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    assert writer.stdin is not None
    assert writer.stdout.readline() == "half\n"
    assert not final.exists()
    left = [path.name for path in tmp_path.iterdir()]
    assert len(left) == 1
    assert left[0].startswith(files.TEMPORARY_PREFIX)
    assert files.sweep_temporaries(tmp_path) == 0, "its writer lives"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdin.close()
    writer.stdout.close()
    assert not final.exists()
    assert files.sweep_temporaries(tmp_path) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file_and_no_temp(tmp_path: Path) -> None:
    final = tmp_path / "a.txt"
    final.write_text("old")

    def write_and_fail() -> None:
        with files.atomic_file(final) as file:
            file.write(b"new")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_and_fail()
    assert final.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_the_umask_decides_the_mode(tmp_path: Path) -> None:
    final = tmp_path / "a.txt"
    before = os.umask(0o027)
    try:
        files.write_text(final, "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE(final.stat().st_mode) == 0o640


def test_a_torn_line_spoils_only_itself(tmp_path: Path) -> None:
    log = tmp_path / "manifest.jsonl"
    files.append_lines(log, ['{"a": 1}'])
    with log.open("a") as file:
        file.write('{"torn": ')
    files.append_lines(log, ['{"b": 2}', '{"c": 3}'])
    assert log.read_text().splitlines() == ['{"a": 1}', '{"torn": ', '{"b": 2}', '{"c": 3}']


def test_sha256_and_copy(tmp_path: Path) -> None:
    source = tmp_path / "a"
    source.write_bytes(os.urandom(3 << 20))
    files.copy_file(source, tmp_path / "deep" / "b")
    assert files.sha256_of(tmp_path / "deep" / "b") == files.sha256_of(source)
