"""Reading the files that wandb writes offline."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2


def records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: a log of 32 KiB blocks, each with pieces of 7 bytes of header and the data."""
    data, pos, buffer = path.read_bytes(), 7, b""
    while pos + 7 <= len(data):
        left = 32768 - pos % 32768
        if left < 7:
            pos += left
            continue
        _, length, kind = struct.unpack("<IHB", data[pos : pos + 7])  # 1 whole, 2 first, 3 middle, 4 last
        if kind == 0:
            return
        piece = data[pos + 7 : pos + 7 + length]
        pos += 7 + length
        buffer = piece if kind in (1, 2) else buffer + piece
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()  # pyright: ignore[reportAttributeAccessIssue]
            record.ParseFromString(buffer)
            yield record
