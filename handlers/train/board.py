"""TensorBoard's event files in ``runs/<id>/``.

tensorboardX knows the messages (90 kB, and nothing that is not here already; the tensorboard package would bring 30 MB
of a server along). The records are written here, not by its thread: each write finds the session anew, as people rename
folders, and nothing goes on behind the run's back.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from handlers.train.place import Place, folder_in
from handlers.train.viewers import Row, scalars
from sessions.layout import RUNS

_PREFIX = "events.out.tfevents."


class Board:
    """The event file that one process writes of a run; those of earlier processes are emptied.

    It begins with a mark that all steps before are void, for a TensorBoard that read the earlier file.

    Args:
        place: the session.
        run: the run's id.

    Raises:
        ImportError: tensorboardX is not installed.
    """

    def __init__(self, place: Place, run: str) -> None:
        try:
            from tensorboardX.crc32c import crc32c
            from tensorboardX.proto import event_pb2, summary_pb2
        except ImportError as error:
            raise ImportError("the package tensorboardX is not installed (pip install tensorboardX)") from error
        self._crc32c = crc32c
        self._event = event_pb2
        self._summary = summary_pb2
        self._place = place
        self._run = run
        # Read in the order of their names: what is newer has a larger number.
        self._name = f"{_PREFIX}{time.time_ns()}.fastsd"

    def begin(self, rows: Sequence[Row], samples: Mapping[int, Path]) -> None:
        """As ``viewers.Viewer.begin``."""
        pb = self._event
        start = pb.Event(wall_time=time.time(), step=0, session_log=pb.SessionLog(status=pb.SessionLog.START))
        events = [pb.Event(wall_time=time.time(), file_version="brain.Event:2"), start]
        shown = sorted(samples.items())
        for row in rows:
            events.append(self._of(row))
            while shown and shown[0][0] <= row["step"]:
                events.append(self._picture(*shown.pop(0)))
        former = [path.name for path in folder_in(self._place.now(), RUNS, self._run).glob(f"{_PREFIX}*.fastsd")]
        self._append(events)
        for name in former:
            self._place.write(partial(self._void, name))

    def _void(self, name: str, session: Path) -> None:
        """Empty the file of an earlier process, or remove it where that was done before.

        A TensorBoard that is reading a file that goes stays with it, and never looks at the next one.
        """
        file = session / RUNS / self._run / name
        if file.stat().st_size:
            os.truncate(file, 0)
        else:
            file.unlink()

    def note(self, rows: Sequence[Row]) -> None:
        """As ``viewers.Viewer.note``."""
        self._append([self._of(row) for row in rows])

    def show(self, step: int, sample: Path) -> None:
        """As ``viewers.Viewer.show``."""
        self._append([self._picture(step, sample)])

    def close(self) -> None:
        """Nothing is left to do."""

    def _of(self, row: Row) -> Any:
        value = self._summary.Summary.Value
        values = [value(tag=name, simple_value=number) for name, number in scalars(row)]
        at = float(row.get("at") or time.time())
        return self._event.Event(wall_time=at, step=row["step"], summary=self._summary.Summary(value=values))

    def _picture(self, step: int, sample: Path) -> Any:
        encoded = sample.read_bytes()
        with Image.open(io.BytesIO(encoded)) as image:
            width, height = image.size
        pb = self._summary.Summary
        image = pb.Image(height=height, width=width, colorspace=3, encoded_image_string=encoded)
        return self._event.Event(
            wall_time=sample.stat().st_mtime,
            step=step,
            summary=pb(value=[pb.Value(tag="samples", image=image)]),
        )

    def _append(self, events: Iterable[Any]) -> None:
        data = b"".join(framed(event.SerializeToString(), self._crc32c) for event in events)

        def write(session: Path) -> None:
            with (folder_in(session, RUNS, self._run) / self._name).open("ab") as file:
                file.write(data)

        self._place.write(write)


def framed(data: bytes, crc32c: Any) -> bytes:
    """A record of TensorFlow's format: length, its checksum, the data, their checksum; numbers are little-endian.

    Checksums are CRC-32C, turned by 15 bits and shifted by a constant, as the format asks.
    """

    def checksum(part: bytes) -> bytes:
        value = crc32c(part)
        return (((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF).to_bytes(4, "little")

    length = len(data).to_bytes(8, "little")
    return length + checksum(length) + data + checksum(data)
