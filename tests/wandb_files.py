"""Reads back what W&B's library wrote to disk."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def wandb_run(path: Path, seconds: float = 30) -> list[Any]:
    """All records of a finished run. `wandb.finish` may return before its core has written the last of them."""
    stop = time.monotonic() + seconds
    while True:
        records = list(wandb_records(path))
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        assert time.monotonic() < stop, f"the run in {path} has no end"
        time.sleep(0.1)


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a `.wandb` file: protocol buffers in LevelDB's log format, behind a header of 7 bytes.

    W&B's core writes it; the Python package has the messages but no reader.
    """
    from wandb.proto import wandb_internal_pb2

    block, header = 32768, struct.Struct("<IHB")  # a checksum, the length, and which part of a record it is
    full, first, middle, last = 1, 2, 3, 4
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, parts = 7, b""
    while position + header.size <= len(data):
        if block - position % block < header.size:  # a block's last bytes are padding if no header fits
            position += block - position % block
            continue
        _, size, kind = header.unpack_from(data, position)
        payload = data[position + header.size : position + header.size + size]
        if len(payload) < size:
            return  # still being written
        position += header.size + size
        assert kind in (full, first, middle, last), kind
        parts = payload if kind in (full, first) else parts + payload
        if kind in (full, last):
            yield wandb_internal_pb2.Record.FromString(parts)
