"""The benchmark of the estimators runs at its smallest, and its figures are computed right; what they are at that size means nothing."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.estimates import needed, write
from benchmarks.estimates_runs import Setting, collect, settings
from benchmarks.estimates_study import WINDOW, Run, figures, r2, study
from shapedpo.monitor.estimates import Window
from shapedpo.monitor.estimators import Estimate


SMALL = Setting("lab: goblin world", 2e-3, 0.1, pairs=192, evaluation=64, probe=128)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return collect(SMALL, tmp_path_factory.mktemp("runs"))


@pytest.mark.slow
def test_amplification_is_the_monitors(path: Path) -> None:
    run = Run(path)
    mean, se = run.amplification(run.points[-1])
    window = Window(run.deltas.shape[1], WINDOW, torch.device("cpu"))
    apart = torch.tensor(run.ratios[0] - run.ratios[1])
    for pair in range(len(apart)):  # the benchmark weighs pair by pair
        window.update(apart[pair : pair + 1].float(), 0.1, torch.tensor(run.deltas[pair : pair + 1]).float(), 1)
    estimates = Window.estimates(window.state())
    np.testing.assert_allclose(estimates.value[0].numpy(), mean, atol=1e-5 * np.abs(mean).max())
    np.testing.assert_allclose(estimates.se[0].numpy(), se, rtol=0.05, atol=1e-7)


@pytest.mark.slow
def test_a_run_is_kept_whole_and_studied(path: Path, tmp_path: Path) -> None:
    run = Run(path)
    assert run.points == [3, 6, 12]
    assert collect(SMALL, path.parent) == path  # not trained again
    # The policy is a distribution: over the reference's rollouts, its ratio to the reference has mean 1.
    ratios = np.exp(run.arrays["probe_base_ratio_6"].astype(float))
    assert ratios.mean() == pytest.approx(1, abs=5 * ratios.std() / len(ratios) ** 0.5)

    rows, concepts = study([path])
    names = {row["estimator"] for row in rows}
    assert {"amplification", "carried forward from the last probe", "bridge, 64 + 128", "best, 128 + 128"} <= names
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
    assert {row["concept"] for row in concepts} == set(run.concepts)
    text = write(rows, concepts, [path], tmp_path)
    assert text == (tmp_path / "estimates.md").read_text()
    heads, _, line, pairs = (row.split(" | ") for row in needed(rows).splitlines())
    assert heads[3:] == ["64 + 128", "128 + 128 |"]
    for name, cell, cost in zip(("best, 64 + 128", "best, 128 + 128"), line[3:], pairs[3:], strict=True):
        # of each estimator the last point's, and what it costs of a run in which that is a fiftieth
        (*_, row) = (row for row in rows if row["estimator"] == name)
        assert float(cell.rstrip(" |")) == pytest.approx(row["of ceiling"], abs=0.006)
        needs = 50 * (row["share"] + row["before"]) * SMALL.pairs
        assert int(cost.rstrip(" |").replace(",", "")) == pytest.approx(needs, abs=1)
    assert (tmp_path / "estimates.png").stat().st_size > 10_000
    with (tmp_path / "estimates.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)


def test_figures_of_a_known_estimate() -> None:
    draw = np.random.default_rng(0)
    truth = draw.normal(size=20_000)
    noisy = truth + 0.5 * draw.normal(size=len(truth))
    found = figures(Estimate(2 * noisy, np.full(len(truth), 1.0), ""), truth, np.zeros(len(truth)), ceiling=0.9)
    assert found["r2"] == pytest.approx(0.8, abs=0.01)  # 1 / (1 + 0.25)
    assert found["r2 low"] < found["r2"] < found["r2 high"]
    assert found["of ceiling"] == pytest.approx(found["r2"] / 0.9)
    assert found["slope"] == pytest.approx(0.4, abs=0.01)
    assert found["r2 of 1"] == pytest.approx(1 - (1 + 1), abs=0.1)  # truth - 2 truth - noise of 1
    fair = figures(Estimate(noisy, np.full(len(truth), 0.3), ""), truth, np.full(len(truth), 0.4), ceiling=1.0)
    assert fair["cover 90"] == pytest.approx(0.9, abs=0.01)  # 0.3 and the truth's own 0.4 make 0.5
    assert fair["cover 95"] == pytest.approx(0.95, abs=0.01)
    assert r2(-noisy, truth) == pytest.approx(found["r2"])


def test_the_table_has_each_world_gentle_and_violent() -> None:
    runs = settings()
    assert len({run.key for run in runs}) == len(runs) == 16
    assert {run.learning_rate for run in runs} == {2e-4, 2e-5}
    assert {run.beta for run in runs} == {0.1, 1.0}
    assert len(settings(quick=True)) == 4


def test_more_rollouts_are_tried_at_the_end_of_runs_only() -> None:
    few = settings(probe=2048)
    assert {setting.beta for setting in few} == {0.1}
    assert len(few) == len(settings()) / 2
    assert all(setting.points == (1.0,) and setting.probe == 2048 for setting in few)
    assert not {setting.key for setting in few} & {setting.key for setting in settings()}
