"""The benchmark of a step's cost runs, and what it can say without noise is right; its figures are for quiet machines."""

from __future__ import annotations

import csv
import statistics
import threading
from pathlib import Path

import pytest

from benchmarks.overhead import QUICK, VARIANTS, WARM_UP, Turns, interval, run, write


@pytest.mark.slow
def test_quick_benchmark_writes_its_table(tmp_path: Path) -> None:
    variants = ["16 features", "16 features, pair projection"]
    rows = list(run(variants, QUICK, "cpu", memory=False))
    text = write(rows, tmp_path, "cpu", QUICK)

    assert [row["variant"] for row in rows] == variants
    assert set(variants) < set(VARIANTS)
    assert all(row["steps"] == QUICK.steps - WARM_UP and row["TRL, s"] > 0 and row["shaped, s"] > 0 for row in rows)
    assert rows[0]["same losses"] == "yes"  # both trainers saw the same batches, and watching changed nothing
    with (tmp_path / "overhead-cpu.csv").open() as file:
        assert [row["variant"] for row in csv.DictReader(file)] == variants
    assert all(f"| {variant} |" in text for variant in variants)


@pytest.mark.parametrize("n", [3, 12, 37, 100])
def test_interval_encloses_the_median(n: int) -> None:
    median, low, high = interval([float(value) for value in range(n)])
    assert median == statistics.median(range(n))
    assert 0 <= low < median < high <= n - 1
    if n == 100:  # the textbook's ranks of 95 %: the 40th and the 61st
        assert (low, high) == (39.0, 60.0)


def test_a_thread_that_comes_early_does_not_end_the_others_turn() -> None:
    turns = Turns([0, 1], "cpu")
    turns.take(0)
    early = threading.Thread(target=turns.take, args=(1,))
    early.start()
    early.join(0.2)
    assert early.is_alive()  # waits
    assert turns.seconds == [[], []]
    turns.end(0)
    early.join()
    turns.end(1)
    assert [len(seconds) for seconds in turns.seconds] == [1, 1]
