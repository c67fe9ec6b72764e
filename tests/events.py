"""Reads what TensorBoard and Weights & Biases would read, record by record, with every checksum looked at."""

from __future__ import annotations

import io
import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image


@dataclass
class Shown:
    """What TensorBoard shows of the event files of a folder.

    Attributes:
        curves: tag → (step, value), in the order of the file.
        pictures: (step, width, height).
        times: of the events with values, in seconds.
    """

    begins_with_a_void_mark: bool = False
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=lambda: defaultdict(list))
    pictures: list[tuple[int, int, int]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)


def shown_in(folder: Path) -> Shown:
    """All events of all files, in the order in which TensorBoard reads them."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    found = Shown()
    for file in sorted(folder.glob("*tfevents*")):
        events = [Event.FromString(data) for data in _records(file.read_bytes())]
        found.begins_with_a_void_mark = (
            events[0].file_version == "brain.Event:2" and events[1].session_log.status == SessionLog.START
        )
        for event in events:
            if event.summary.value:
                found.times.append(event.wall_time)
            for value in event.summary.value:
                if value.HasField("image"):
                    with Image.open(io.BytesIO(value.image.encoded_image_string)) as image:
                        found.pictures.append((event.step, *image.size))
                    assert image.size == (value.image.width, value.image.height)
                else:
                    found.curves[value.tag].append((event.step, round(value.simple_value, 7)))
    return found


def _records(content: bytes) -> list[bytes]:
    """The records of a file of TensorFlow's format."""
    from tensorboardX.crc32c import crc32c

    def holds(part: bytes, written: bytes) -> bool:
        value = crc32c(part)
        turned = value >> 15 | (value << 17 & 0xFFFFFFFF)
        return (turned + 0xA282EAD8) & 0xFFFFFFFF == int.from_bytes(written, "little")

    records, at = [], 0
    while at < len(content):
        length = int.from_bytes(content[at : at + 8], "little")
        assert holds(content[at : at + 8], content[at + 8 : at + 12])
        data = content[at + 12 : at + 12 + length]
        assert holds(data, content[at + 12 + length : at + 16 + length])
        records.append(data)
        at += 16 + length
    return records


def wandb_steps(file: Path) -> list[tuple[int, dict[str, Any]]]:
    """(step, values) of what an offline run of wandb has kept."""
    from wandb.proto import wandb_internal_pb2

    steps = []
    for data in _leveldb_records(file.read_bytes()[7:]):
        record = wandb_internal_pb2.Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            values = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
            steps.append((record.history.step.num, values))
    return steps


def _leveldb_records(content: bytes) -> list[bytes]:
    """The records of a log of LevelDB's format behind wandb's header of 7 bytes: blocks of 32 KiB of parts.

    A part is a checksum, a length of two bytes, a type (1: whole, 2: first, 3: middle, 4: last), and data.
    """
    records, parts, at = [], b"", 0
    while at + 7 <= len(content):
        left = 32768 - (at + 7) % 32768
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in {1, 4}:
            records.append(parts)
            parts = b""
    return records
