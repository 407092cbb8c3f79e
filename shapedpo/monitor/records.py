"""`concepts.jsonl`: the numbers of a run, one JSON object a line, which survive a crash at any step.

Everything that is shown of a run, on a page or in W&B, is made from these records. A record has a `type` and a `step`:

| type | when | what |
| --- | --- | --- |
| `run` | first | what was asked: concepts, settings, data |
| `step` | each logging step | each concept's running estimates, `[value, standard error]` in sd of its score, and the strength in force |
| `features` | each dashboard step | the most amplified and suppressed features of the SAE |
| `pairs` | each dashboard step | the rows that contribute most to each concept |
| `probe` | each probe | rates and scores of rollouts, their change, and what was predicted |
| `end` | last | training ended |
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from ..files import replacing


Record = dict[str, Any]
FILE_NAME = "concepts.jsonl"
"""Name of the file in the output folder."""
TEXT_LENGTH = 1000
"""Characters kept of a text."""


class Sink(Protocol):
    """Something that shows records. Called by the main process only."""

    def open(self, records: list[Record]) -> None:
        """Training begins. `records` are those that an earlier part of a resumed run left."""

    def write(self, records: list[Record]) -> None:
        """New records, at a logging step or a probe."""

    def close(self) -> None:
        """Training has ended."""


class RecordFile:
    """Appends records to `concepts.jsonl`, each line whole before the next.

    Args:
        path: The file. One that an earlier run left there is moved aside by [`start`], never lost.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.count = 0
        """Records in it."""
        self._unwritten = ""

    def start(self, resume_step: int, count: int | None = None) -> list[Record]:
        """Begin at a step.

        A run that begins at step 0 moves an earlier run's file to the first free name of `concepts.1.jsonl`, `concepts.2.jsonl`, ...
        A resumed one cuts the file back to what it held at its checkpoint, so that it ends as if it had never stopped; one that is
        damaged is moved aside too, with a warning.

        Args:
            resume_step: The checkpoint's step, or 0.
            count: How many records there were when the checkpoint was made, if it says. A run that ends at its last checkpoint's step
                writes more of that step.

        Returns:
            The records that are kept.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept: list[Record] = []
        if self.path.is_file():
            try:
                found = read_records(self.path)[:count] if resume_step > 0 else []
            except ValueError as error:
                warnings.warn(f"{error} It is moved aside, and the records begin anew.", RuntimeWarning, stacklevel=2)
                found = []
            kept = [record for record in found if record["step"] <= resume_step and record["type"] != "end"]
            if kept:
                with replacing(self.path) as partial:
                    partial.write_text("".join(_line(record) for record in kept), encoding="utf-8")
            else:
                number = 1
                while (aside := self.path.with_suffix(f".{number}{self.path.suffix}")).exists():
                    number += 1
                self.path.rename(aside)
        self.count = len(kept)
        return kept

    def append(self, records: Iterable[Record]) -> None:
        """Write records, and hand them to the operating system before returning.

        Where that fails, as on a full disk, there is a warning, and they are written with the next ones: no record is worth a run.
        """
        lines = [_line(record) for record in records]
        self.count += len(lines)
        self._unwritten += "".join(lines)
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(self._unwritten)
        except OSError as error:
            with suppress(OSError):
                os.truncate(self.path, size)  # half a line would spoil what is written behind it
            warnings.warn(
                f"{self.path} could not be written ({type(error).__name__}: {error}). Training goes on; what is missing is written when it can be.",
                RuntimeWarning,
                stacklevel=2,
            )
        else:
            self._unwritten = ""


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """The records of a file, or of the folder that has it. A last line that a crash cut short is passed over.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line before the last is not a record; the text has its number.
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no {FILE_NAME} at {str(path)!r}. A run of ShapedDPOTrainer with concepts or `monitor` writes it into its output folder."
        )
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            record = json.loads(line)
            if not isinstance(record["type"], str) or not isinstance(record["step"], int):
                raise TypeError("type and step")
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):  # no newline behind it: cut short
                break
            raise ValueError(
                f"{path}, line {number}: expected a JSON object with `type` and `step`, found {line[:80]!r}."
            ) from error
        records.append(record)
    return records


def plain(value: Any) -> Any:
    """A number that JSON has, rounded to seven digits, or `None` for one it has not (inf, nan)."""
    value = float(value)
    return float(f"{value:.7g}") if math.isfinite(value) else None


def _line(record: Record) -> str:
    # ASCII: a lone surrogate from a tokenizer is then an escape like any other.
    return json.dumps(record, ensure_ascii=True, allow_nan=False, separators=(",", ":")) + "\n"
