"""Runs of the real W&B library without a network, and what it wrote to disk, read back."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import wandb

from shapedpo.monitor.wandb import WandbSink


TABLES = {"concepts/amplified", "concepts/suppressed", "concepts/pairs", "probe/rollouts"}
CHARTS = {"concepts/top", "concepts/heatmap", "probe/predicted_vs_observed"}
AXIS = {"train/global_step", "_step", "_timestamp", "_runtime"}


def start(**kwargs: Any) -> Any:
    return wandb.init(project="tests", settings=wandb.Settings(silent=True, console="off"), **kwargs)


def feed(sink: WandbSink, records: list[Any]) -> None:
    """Records by step, as the monitor hands them over."""
    for _, together in groupby(records, key=lambda record: record["step"]):
        sink.write(list(together))


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


class Written:
    """What a finished run has on disk.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        records = wandb_run(next(self.folder.glob("run-*.wandb")))
        self.rows = [
            _nested(record.history.item) for record in records if record.WhichOneof("record_type") == "history"
        ]
        self.metrics = {
            record.metric.name or record.metric.glob_name: record.metric.step_metric
            for record in records
            if record.WhichOneof("record_type") == "metric"
        }
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.artifacts: dict[str, list[Any]] = {}
        for record in records:
            for update in (record.run.config.update, record.config.update):
                self.config |= _nested(update)
            if record.WhichOneof("record_type") == "summary":
                for item in record.summary.update:
                    _put(self.summary, item)
            if record.WhichOneof("record_type") == "artifact":
                for entry in record.artifact.manifest.contents:
                    self.artifacts.setdefault(entry.path, []).append(json.loads(Path(entry.local_path).read_text()))

    def values(self, key: str) -> list[Any]:
        """The contents of a table or chart, each time that it was logged."""
        return [json.loads(self.file(row[key]).read_text()) for row in self.rows if key in row]

    def file(self, value: dict[str, Any]) -> Path:
        return self.folder / "files" / value["path"]

    def table(self, key: str, at: int = -1) -> list[dict[str, Any]]:
        """A table's rows, by column."""
        table = self.values(key)[at]
        return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


def _put(into: dict[str, Any], item: Any) -> None:
    *path, last = item.nested_key or [item.key]
    for name in path:
        into = into.setdefault(name, {})
    into[last] = json.loads(item.value_json)


def _nested(items: Any) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for item in items:
        _put(result, item)
    return result
