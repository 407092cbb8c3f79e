"""The page of the prediction benchmark: what it says follows from its rows; and what a second run says, against known noise."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from transformers import get_linear_schedule_with_warmup

from benchmarks import prediction, prediction_report
from benchmarks.prediction_runs import DESIGN, GENTLE, HELD_OUT, PILOTS, learnt, settings
from shapedpo.audit import Prediction
from shapedpo.audit.rollouts.observed import Observed
from shapedpo.audit.verify.comparison import GROUPS, compare, figures


N, CONDITIONS = 400, 3


def world(order: float, noise: float = 0.3) -> tuple[Prediction, dict, dict]:
    """A prediction, and two runs that share a truth but for what their order decides, each seen with noise."""
    draw = np.random.default_rng(0)
    lines, runs = [], ({}, {})
    for kind, view, groups in (
        ("feature", "global", 1),
        ("feature_cluster", "global", 1),
        ("response_cluster", "global", 1),
        ("response_cluster", "prompt", CONDITIONS),
    ):
        truth = draw.normal(size=(groups, N))
        condition, number = np.indices((groups, N)).reshape(2, -1)
        lines.append((kind, view, condition if view == "prompt" else np.full(N, -1), number, truth.ravel()))
        for run in runs:
            own = truth + order * draw.normal(size=truth.shape)
            halves = own + noise * 2**0.5 * draw.normal(size=(2, *truth.shape))
            same, se, rate = halves.mean(axis=0), np.full(truth.shape, noise), np.full(truth.shape, 0.3)
            run[kind, view] = Observed(np.full((groups, 1), 99.0), same, se, halves, same, se, halves, rate)
    columns = {name: np.concatenate([line[i] for line in lines]) for i, name in ((2, "condition"), (3, "number"))}
    columns |= {
        name: np.concatenate([np.full(len(line[4]), line[i]) for line in lines])
        for i, name in enumerate(("kind", "view"))
    }
    truth = np.concatenate([line[4] for line in lines])
    for name in ("score", "log_odds"):
        columns |= {name: truth, f"{name}_low": truth - 0.1, f"{name}_high": truth + 0.1}
    ones = np.ones(len(truth))
    return Prediction(**columns, base_rate=0.3 * ones, sd=ones, scaled=ones > 1), *runs


@pytest.mark.parametrize("order", [0.0, 0.7])
def test_a_second_run_says_how_much_the_order_of_pairs_decides(order) -> None:
    found = prediction.another_run(*world(order))
    assert set(found) == set(GROUPS)
    for name, value in found.items():
        if "less" not in name:
            assert value == pytest.approx(1 / (1 + order**2) ** 2, abs=0.08)
    assert np.isnan(prediction.another_run(*world(0.0, noise=9.0))["features"])  # nothing to be seen


def test_what_a_pilot_has_had_is_the_schedules_share() -> None:
    for setting in settings((DESIGN[0], DESIGN[-1])):
        steps, warm_up = setting.pairs // 16, 10 if setting.world.startswith("lab") else 0
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
        (rate,) = get_linear_schedule_with_warmup(optimizer, warm_up, steps).lr_lambdas
        for share in PILOTS:
            had = sum(map(rate, range(steps // share))) / sum(map(rate, range(steps)))
            assert learnt(setting, share) == pytest.approx(had)


def test_the_page_says_what_the_rows_hold(tmp_path) -> None:
    predicted, first, _ = world(0.0)
    outcome = compare(predicted, first)
    planned = settings((*DESIGN, *HELD_OUT))
    runs = [run for run in planned if (run.learning_rate, run.beta) != GENTLE and run.pairs == 1000]
    rows = [
        {"world": run.world, "held out": run.world in HELD_OUT, "lr": run.learning_rate, "beta": run.beta}
        | {"pairs": run.pairs, "estimator": "known", "group": group, **dataclasses.asdict(found)}
        | {"of ceiling": found.r2 / found.ceiling, "another run": 0.81 if run.world == "lab: topics" else np.nan}
        for run in runs
        for group, found in figures(outcome).items()
    ]
    page = prediction_report.report(rows, {"lab: topics": outcome}, planned, runs, tmp_path / "prediction")
    assert page == (tmp_path / "prediction.md").read_text()
    assert (tmp_path / "prediction.png").stat().st_size > 1000
    assert "1,024 (`--answers 512`)" in page
    assert f"{len(DESIGN) + len(HELD_OUT)} of {len(planned)} runs" in page
    assert "lab: goblin world gentle" in page
    assert "lab: topics violent, 250 pairs" in page
    r2, ceiling = rows[0]["r2"], rows[0]["ceiling"]
    assert f"features {r2:.2f} (target 0.9, reached in {5 if r2 >= 0.9 else 0} of 5 runs)" in page
    # the second estimator gets half of what the first does
    named = [
        {**row, "estimator": name, "r2": row["r2"] * part}
        for name, part in (("whole", 1), ("half", 0.5))
        for row in rows
    ]
    reach = 0.9 * ceiling
    (line,) = (line for line in prediction_report.bounds(named) if line.startswith("| features |"))
    assert (
        line
        == f"| features | 0.9 | {ceiling:.2f} | {reach:.2f} (1 runs) | {r2 / 2 / reach:.0%} ({r2 / 2 / reach:.0%} to {r2 / 2 / reach:.0%}) |"
    )
    below = sum(row["ceiling"] < prediction_report.TARGETS.get(row["group"], 0) for row in rows)
    assert f"In {below} of {4 * len(runs)} cases" in prediction_report.limits(named)[0]
    assert f"| lab: topics | features | {ceiling:.2f} | 0.81 | {0.9 * ceiling:.2f} | {r2:.2f} |" in page
    assert "lab: style | features" not in page.split("What a second run says")[1].split("Every run")[0]
