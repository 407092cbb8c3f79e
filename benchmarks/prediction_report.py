"""What `benchmarks/prediction.py` found, as a page and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.estimates_runs import Setting
from benchmarks.prediction_runs import GENTLE, HELD_OUT, PILOTS, learnt
from shapedpo.audit.verify.comparison import GROUPS, ODDS, Figures, Outcome


TARGETS = {"features": 0.9, "clusters T_m": 0.9, "clusters R_m": 0.9, "R_m under prompt clusters": 0.75}
COVERED = (0.85, 0.95)

INTRODUCTION = """\
How true the audit's predictions are: R² (squared correlation) of predicted and observed change of the mean score, over features, over clusters, and over
clusters of response features under each cluster of prompt features. The change is that of two answers by either model to each of {prompts:,} held-out prompts, which
count by how much likelier they have become. *Ceiling*: what a perfect prediction would get, since the answers are noisy too (from halves of the prompts).
*Another run*: R² with a second run that saw the same pairs in another order, had answers no noise; what the order decides nobody can predict, so that no
prediction is expected to get more than its square root times the ceiling: *within reach* (a pilot in the run's own order may, as it has seen a part of it). *Slope*: of observed on predicted change, 1 where the scale is right. *In 90 %*: share of the
90 % intervals that held, with the answers' own noise allowed for, as they stand and after scaling by the slope. In brackets the 95 % interval over
resampled things; things vary together, so it is too narrow. *Less everywhere*: what a condition adds.

The estimators build on each other: the plain mean delta; the reward that explains it, and what that moves in the data's own completions (`shapedpo audit`);
in answers of the reference, of which there are {answers:,} (`--answers {asked}`); put together with the log-ratios of a pilot on them, which is the run itself after a part of its steps and
also gives the scale (`--pilot`; where warm-up is most of it, it has learnt little: see below). In forward passes over a completion, of which DPO on 1,000 pairs takes 8,000 (two a pair, the reference's and the policy's, and
twice as much for its gradient), the answers cost about {written:,} (writing and reading them), a pilot of 1/8 another 1,000 for its steps and {answers:,} to weigh the answers, one of
1/4 2,000 and {answers:,}. Answers cost the same for a million pairs. One seed a world. The estimators and their constants were settled on the worlds of the
design (`benchmarks/prediction_runs.py` says what else was seen).
"""


def report(
    rows: Sequence[dict[str, Any]],
    shown: dict[str, Outcome],
    planned: Sequence[Setting],
    runs: Sequence[Setting],
    out: Path,
) -> str:
    """Write `out`'s page (`.md`) and picture (`.png`); returns the page."""
    prompts = runs[0].evaluation
    answers = 4 * prompts
    introduction = INTRODUCTION.format(prompts=prompts, answers=answers, asked=2 * prompts, written=2 * answers)
    lines = [introduction, made(planned, runs), ""]
    last = rows[-1]["estimator"]
    for title, held in (("Worlds held out", True), ("Worlds of the design", False)):
        if not (some := [row for row in rows if row["held out"] == held]):
            continue
        lines += [f"## {title}", "", said(some, last), "", *overview(some, [*GROUPS]), ""]
        lines += ["In log-odds of appearing in an answer:", "", *overview(some, [name + ODDS for name in GROUPS]), ""]
        lines += ["What keeps them from the targets:", "", *limits(some), "", *bounds(some), ""]
        if apart := between_runs(some, last):
            lines += ["What a second run says, and what the last prediction gets:", "", *apart, ""]
        lines += [f"Every run, {last}:", "", *table(some, last), ""]
    out.with_suffix(".md").write_text("\n".join(lines))
    picture(shown, out.with_suffix(".png"))
    return "\n".join(lines)


def made(planned: Sequence[Setting], runs: Sequence[Setting]) -> str:
    """Which of the planned runs there are, and how much of them their pilots are."""
    missing = [name_of(run) for run in planned if run not in runs]
    lines = [f"{len(runs)} of {len(planned)} runs." + (f" Not made: {', '.join(missing)}." if missing else "")]
    for share in PILOTS:
        had: dict[str, list[str]] = {}
        for run in runs:
            had.setdefault(f"{learnt(run, share):.0%}", []).append(f"{run.world.split(':')[0]}, {run.pairs} pairs")
        parts = (f"{part} ({'; '.join(dict.fromkeys(of))})" for part, of in had.items())
        lines.append(f"By the sum of learning rates a pilot of 1/{share} of the steps has had {', '.join(parts)}.")
    return " ".join(lines)


def name_of(run: Setting) -> str:
    """A run in words."""
    force = "gentle" if (run.learning_rate, run.beta) == GENTLE else "violent"
    return f"{run.world} {force}{f', {run.pairs} pairs' if run.pairs != 1000 else ''}"


def said(rows: Sequence[dict[str, Any]], name: str) -> str:
    """How the last estimator does beside the targets."""
    parts = []
    for group, target in TARGETS.items():
        r2 = [row["r2"] for row in rows if row["estimator"] == name and row["group"] == group]
        if r2:
            parts.append(
                f"{group} {np.median(r2):.2f} (target {target}, reached in {sum(x >= target for x in r2)} of {len(r2)} runs)"
            )
    covered = [row["covered"] for row in rows if row["estimator"] == name and row["group"] in TARGETS]
    inside = sum(COVERED[0] <= x <= COVERED[1] for x in covered)
    wide = sum(x > COVERED[1] for x in covered)
    return (
        f"R² {name}, medians over runs: {'; '.join(parts)}. Of {len(covered)} shares of 90 % intervals that held (a run and a group each), {inside} are "
        f"between 85 and 95 %, {wide} above and {len(covered) - inside - wide} below."
    )


def overview(rows: Sequence[dict[str, Any]], groups: Sequence[str]) -> list[str]:
    """A table of each estimator by group: medians over runs, with their range."""
    groups = [group for group in groups if any(row["group"] == group for row in rows)]
    lines = [f"| R² / ceiling, median (range) | {' | '.join(groups)} |", "| --- |" + " ---: |" * len(groups)]
    every = len(_runs_of(rows, rows[0]["estimator"]))
    for name in dict.fromkeys(row["estimator"] for row in rows):
        cells, runs = [], len(_runs_of(rows, name))
        for group in groups:
            some = [row for row in rows if row["estimator"] == name and row["group"] == group]
            # next to a ceiling of noise, a share of it says nothing
            r2, of = (
                [row[key] for row in some if key == "r2" or row["ceiling"] >= 0.1] for key in ("r2", "of ceiling")
            )
            share = f" / {np.median(of):.2f} ({min(of):.2f} to {max(of):.2f})" if of else ""
            cells.append(f"{np.median(r2):.2f}{share}" if some else "")
        if any(cells):
            lines.append(f"| {name}{f' ({runs} runs)' if runs < every else ''} | {' | '.join(cells)} |")
    return lines


def _runs_of(rows: Sequence[dict[str, Any]], name: str) -> set[tuple[Any, ...]]:
    """The runs that an estimator was held against: a pilot that has learnt nothing predicts nothing."""
    return {tuple(row[key] for key in ("world", "lr", "beta", "pairs")) for row in rows if row["estimator"] == name}


def limits(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Why the targets cannot be reached, as far as runs say: a ceiling that is below, and an order of pairs that decides."""
    ceilings = [(row["ceiling"], TARGETS[row["group"]]) for row in _once(rows)]
    reach = [(_reach(row), TARGETS[row["group"]]) for row in _once(rows) if np.isfinite(row["another run"])]
    names = list(dict.fromkeys(row["estimator"] for row in rows))
    clean = [
        f"{sum(row['of ceiling'] >= TARGETS[row['group']] for row in rows if row['group'] in TARGETS and row['estimator'] == name)} ({name})"
        for name in names
    ]
    said = (
        f"In {sum(c < target for c, target in ceilings)} of {len(ceilings)} cases (a run and a group each) the ceiling is below the target: the answers by which the change "
        "is seen are too few for any prediction, were it the truth, to show the target's R². With that noise taken off, R² over ceiling, the target is "
        f"reached in {', '.join(clean)} of them."
    )
    if not reach:
        return [said]
    return [
        f"{said} What is within reach, the ceiling times the square root of what another run gets, is less: below the target in "
        f"{sum(r < target for r, target in reach)} of the {len(reach)} cases of runs that were made twice. The rest, up to what is within reach, is the "
        "predictions' own error."
    ]


def bounds(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A table of what is within reach in each group, and what the estimators get of it; medians over runs."""
    names = list(dict.fromkeys(row["estimator"] for row in rows))[1:]  # the first is what the others are to better
    heads = ("group", "target", "ceiling", "within reach", *(f"got of it, {name}" for name in names))
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for group, target in TARGETS.items():
        some = [row for row in rows if row["group"] == group]
        twice = [row for row in some if np.isfinite(row["another run"]) and _reach(row) >= 0.1]
        got = [[row["r2"] / _reach(row) for row in twice if row["estimator"] == name] for name in names]
        cells = [f"{np.median([row['ceiling'] for row in _once(some)]):.2f}"] if some else [""]
        cells += [f"{np.median([_reach(row) for row in _once(twice)]):.2f} ({len(_once(twice))} runs)" if twice else ""]
        cells += [f"{np.median(each):.0%} ({min(each):.0%} to {max(each):.0%})" if each else "" for each in got]
        lines.append(f"| {group} | {target} | {' | '.join(cells)} |")
    return lines


def _once(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one estimator, in the groups that have a target: what is the same for all."""
    return [row for row in rows if row["estimator"] == rows[0]["estimator"] and row["group"] in TARGETS]


def _reach(row: dict[str, Any]) -> float:
    """The R² that a prediction of the mean over all orders of the pairs would get."""
    return float(row["ceiling"] * row["another run"] ** 0.5)


def between_runs(rows: Sequence[dict[str, Any]], name: str) -> list[str]:
    """A table of the runs that were made twice."""
    some = [row for row in rows if row["estimator"] == name and np.isfinite(row["another run"])]
    heads = ("world", "group", "ceiling", "another run", "within reach", "R²")
    lines = [f"| {' | '.join(heads)} |", "| --- | --- |" + " ---: |" * 4]
    for row in some:
        cells = [f"{value:.2f}" for value in (row["ceiling"], row["another run"], _reach(row), row["r2"])]
        lines.append(f"| {row['world']} | {row['group']} | {' | '.join(cells)} |")
    return lines if some else []


def table(rows: Sequence[dict[str, Any]], name: str) -> list[str]:
    """Every run of one estimator."""
    heads = ("world", "lr", "beta", "pairs", "group", "n", "change, sd", "R² [95 %]", "ceiling")
    heads += ("slope", "in 90 %", "in 90 %, scaled", "sign")
    lines = [f"| {' | '.join(heads)} |", "| --- | ---: | ---: | ---: | --- |" + " ---: |" * (len(heads) - 5)]
    for row in rows:
        if row["estimator"] == name and not row["group"].endswith(ODDS):
            cells = [row["world"], f"{row['lr']:g}", f"{row['beta']:g}", row["pairs"], row["group"], row["n"]]
            cells += [f"{row['change']:.3f}", f"{row['r2']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"]
            cells += [f"{row['ceiling']:.2f}", f"{row['slope']:.2f}"]
            cells += [f"{row['covered']:.0%}", f"{row['covered_scaled']:.0%}", f"{row['sign']:.0%}"]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def picture(shown: dict[str, Outcome], path: Path) -> None:
    """Predicted against observed change in the violent runs, features above and conditions below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(shown), 6.4), layout="constrained")
    axes: Any = figure.subplots(2, len(shown), squeeze=False)
    for column, (world, outcome) in enumerate(shown.items()):
        for ax, (kind, view) in zip(
            axes[:, column], (("feature", "global"), ("response_cluster", "prompt")), strict=True
        ):
            some = outcome.of(kind, view)
            found = Figures.of(some)
            ax.scatter(some.prediction.score, some.observed, s=4, color="tab:blue", alpha=0.6)
            r2 = "" if found is None else f"\n$R^2$ {found.r2:.2f} of {found.ceiling:.2f}"
            ax.set_title(f"{world}{', held out' if world in HELD_OUT else ''}{r2}", fontsize=8)
            ax.set_xlabel("predicted change, sd", fontsize=8)
            ax.set_ylabel(
                f"observed change, {'features' if view == 'global' else 'clusters under conditions'}", fontsize=8
            )
    figure.savefig(path, dpi=110)
