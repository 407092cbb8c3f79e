"""`concepts.jsonl`: whole lines, whatever happens, and nothing that was saved is lost."""

from __future__ import annotations

import json
import math
import resource

import pytest

from shapedpo.monitor.records import RecordFile, plain, read_records


def record(step: int, kind: str = "step", **fields):
    return {"type": kind, "step": step, **fields}


def test_round_trip(tmp_path):
    file = RecordFile(tmp_path / "out" / "concepts.jsonl")
    assert file.start(0) == []
    written = [record(0, "run"), record(1, text="a\nb \u2028 \ud800 </script>")]
    file.append(written[:1])
    file.append(written[1:])
    assert read_records(tmp_path / "out") == written
    assert (tmp_path / "out" / "concepts.jsonl").read_text().isascii()


def test_crash_in_the_middle_of_a_line(tmp_path):
    path = tmp_path / "concepts.jsonl"
    path.write_text('{"type":"run","step":0}\n{"type":"step","step":1,"conc')
    assert read_records(path) == [record(0, "run")]
    path.write_text('{"type":"run","step":0}\n{"type":"st\n{"type":"step","step":2}\n')
    with pytest.raises(ValueError, match=r"line 2.*expected a JSON object"):
        read_records(path)


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"concepts\.jsonl"):
        read_records(tmp_path)


def test_a_new_run_moves_the_old_file_aside(tmp_path):
    file = RecordFile(tmp_path / "concepts.jsonl")
    for number in range(3):
        file.start(0)
        file.append([record(number)])
    assert read_records(file.path) == [record(2)]
    assert read_records(tmp_path / "concepts.1.jsonl") == [record(0)]
    assert read_records(tmp_path / "concepts.2.jsonl") == [record(1)]


def test_resuming_cuts_back_to_the_checkpoint(tmp_path):
    file = RecordFile(tmp_path / "concepts.jsonl")
    file.append([record(0, "run"), record(5), record(10), record(15), record(15, "end")])
    with file.path.open("a") as half:
        half.write('{"type":"st')
    assert file.start(10) == [record(0, "run"), record(5), record(10)]
    file.append([record(15)])
    assert [r["step"] for r in read_records(file.path)] == [0, 5, 10, 15]


def test_resuming_beside_damaged_records_begins_anew(tmp_path):
    path = tmp_path / "concepts.jsonl"
    path.write_text(damaged := '{"type":"run","step":0}\n{"type":"st\n{"type":"step","step":2}\n')
    file = RecordFile(path)
    with pytest.warns(RuntimeWarning, match=r"line 2: expected .* It is moved aside"):
        assert file.start(2) == []
    file.append([record(2, "run")])
    assert read_records(path) == [record(2, "run")]
    assert (tmp_path / "concepts.1.jsonl").read_text() == damaged


def test_resuming_at_the_last_step_cuts_back_to_the_checkpoint(tmp_path):
    """What a run wrote at its end has its last checkpoint's step."""
    file = RecordFile(tmp_path / "concepts.jsonl")
    file.append([record(0, "run"), record(5)])
    saved = file.count
    file.append([record(5, "probe"), record(5, "end")])
    again = RecordFile(file.path)
    assert again.start(5, saved) == [record(0, "run"), record(5)]
    assert again.count == 2


def test_a_full_disk_does_not_end_a_run(tmp_path):
    """No half line is left behind, and what is missing comes with the next records."""
    file = RecordFile(tmp_path / "concepts.jsonl")
    file.append([record(0, "run")])
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.path.stat().st_size + 10, limit[1]))  # all that fits on this disk
    try:
        with pytest.warns(RuntimeWarning, match=r"could not be written .*Training goes on"):
            file.append([record(1), record(2)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert read_records(file.path) == [record(0, "run")]
    file.append([record(3)])
    assert read_records(file.path) == [record(0, "run"), *map(record, (1, 2, 3))]
    assert file.count == 4


def test_numbers_are_json():
    assert [plain(value) for value in (1, 1.23456789, math.inf, math.nan)] == [1.0, 1.234568, None, None]
    assert json.dumps(plain(0.1)) == "0.1"
