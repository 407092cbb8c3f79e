"""What studies keep of their runs."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.record import Record, key_of


def test_two_processes_keep_their_runs_in_one_file(tmp_path: Path) -> None:
    one, other = (Record(tmp_path / "runs" / "study.jsonl") for _ in range(2))
    assert one.find("a") is None
    one.keep("a", {"rate": 0.5, "what": "naïve"})
    other.keep("b", {"rate": 0.25})
    assert one.find("b") == {"rate": 0.25}
    assert other.find("a") == {"rate": 0.5, "what": "naïve"}
    other.keep("a", {"rate": 0.75})
    assert one.find("a") == Record(one.path).find("a") == {"rate": 0.75}
    assert [json.loads(line)["key"] for line in one.path.read_text().splitlines()] == ["a", "b", "a"]


def test_a_run_is_made_once(tmp_path: Path) -> None:
    record, made = Record(tmp_path / "study.jsonl"), []

    def make() -> dict[str, int]:
        made.append(len(made))
        return {"run": len(made)}

    assert [record.made("a", make)["run"] for _ in range(2)] == [1, 1]
    assert record.made("a", make, fresh=True) == {"run": 2} == record.made("a", make)
    assert made == [0, 1]


def test_a_line_that_is_being_written_waits(tmp_path: Path) -> None:
    record = Record(tmp_path / "study.jsonl")
    record.keep("a", {"rate": 1})
    with record.path.open("a") as file:
        file.write('{"key": "b", "ra')
        file.flush()
        assert (record.find("a"), record.find("b")) == ({"rate": 1}, None)
        file.write('te": 2}\n')
        file.flush()
        assert record.find("b") == {"rate": 2}
    record.path.write_text('{"key": "c"}\n')
    assert (record.find("a"), record.find("c")) == (None, {})


def test_a_key_is_of_what_is_said_in_whatever_order() -> None:
    assert key_of({"a": 1, "b": [2.0]}) == key_of({"b": [2.0], "a": 1})
    assert key_of({"a": 1}) != key_of({"a": 1.5})
    assert len(key_of(None)) == 16
