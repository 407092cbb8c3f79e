"""Does the audit's prediction come true? Predicted against observed change of features and clusters, in worlds of known lessons.

    python -m benchmarks.prediction [--worlds design | held-out] [--cached]

Each run is DPO with TRL's own trainer on a lab dataset or on planted preferences on stories260k, violent (learning rate 2e-4, beta 0.1), gentle (2e-5, 1)
and violent on a quarter of the pairs. The truth: the model before and after answers 256 held-out prompts twice, the model before reads the answers,
and they count by how much likelier they have become (`shapedpo verify`). The runs are kept in `benchmarks/cache/prediction`
(`benchmarks/prediction_runs.py`, which says which worlds were held out); `--cached` takes those that are there.
Writes `benchmarks/results/prediction.{md,csv,png}`.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.estimates_runs import Setting
from benchmarks.prediction_runs import (
    DESIGN,
    FOLDER,
    HELD_OUT,
    PILOTS,
    VIOLENT,
    answers,
    audit,
    learnt,
    make,
    pilot,
    rollouts,
    settings,
)
from benchmarks.stories import RESULTS
from shapedpo.audit import Analysis, Harvest, Prediction, PredictionSettings, predict
from shapedpo.audit.conditions import Conditions
from shapedpo.audit.effects import measure
from shapedpo.audit.observed import observe
from shapedpo.audit.rollouts import Rollouts
from shapedpo.audit.verify.comparison import Figures, Outcome, compare, figures


PLAIN, ANSWERS, PILOT = "plain mean delta", "and the reference's answers", "and a pilot of 1/{}"
SHRUNK = "mean delta, conditions shrunk"
BEST = PILOT.format(PILOTS[0])


INTRODUCTION = """\
How true the audit's predictions are: R^2 (squared correlation) of predicted and observed change of the mean score, over features, over clusters, and over
clusters of response features under each cluster of prompt features. The change is that of 512 pairs of answers to held-out prompts, which count by how
much likelier they have become. *Ceiling*: what a perfect prediction would get, since the answers are noisy too (from their two halves). *Slope*: of
observed on predicted change, 1 where the scale is right. *In 90 %*: share of the 90 % intervals that held, with the answers' own noise allowed for, as they
stand and after scaling by the slope. In brackets the 95 % interval over resampled things; things vary together, so it is too narrow. *Less everywhere*: what a
condition adds. The estimators build on each other: the mean delta of the data; times how much more the reference's own answers vary than the data's
completions; put together with the log-ratios of a pilot (the run itself after a part of its steps) on 1,024 of the reference's answers, which also gives the scale.
One seed a world. The estimators and their constants were settled on the worlds of the design (`benchmarks/prediction_runs.py`).
"""


def predictions(
    setting: Setting,
    harvest: Harvest,
    analysis: Analysis,
    conditions: Conditions,
    given: Rollouts,
    pilots: dict[int, Rollouts],
) -> Iterator[tuple[str, Prediction]]:
    """Each estimator's name and what it predicts."""
    first = predict(harvest, analysis, conditions=conditions, progress=False)
    none = np.zeros(0, np.int64)
    parts = measure(harvest, conditions, np.ones(harvest.n_rows), none, analysis.settings, 1, 10, progress=False).parts
    parts.sort(key=lambda part: part.view != "global")
    plain = np.concatenate([part.delta for part in parts])
    yield PLAIN, dataclasses.replace(first, score=plain, score_low=plain, score_high=plain)
    yield SHRUNK, first
    yield ANSWERS, predict(harvest, analysis, rollouts=given, conditions=conditions, progress=False)
    for share, weighed in pilots.items():
        how = PredictionSettings(pilot_share=learnt(setting, share))
        yield (
            PILOT.format(share),
            predict(harvest, analysis, how, rollouts=weighed, conditions=conditions, progress=False),
        )


def study(runs: Sequence[Setting], folder: Path) -> tuple[list[dict[str, Any]], dict[str, Outcome]]:
    """The figures of every run, estimator and group; and the outcomes of the best estimator in the violent runs, for the picture."""
    rows, shown = [], {}
    for setting in runs:
        harvest, analysis = audit(setting, folder)
        conditions = Conditions.of(harvest, analysis, progress=False)
        observed = observe(rollouts(setting, folder), conditions, progress=False)
        pilots = {share: pilot(setting, share, folder) for share in PILOTS}
        where = {"world": setting.world, "held out": setting.world in HELD_OUT, "lr": setting.learning_rate}
        where |= {"beta": setting.beta, "pairs": setting.pairs}
        for name, prediction in predictions(setting, harvest, analysis, conditions, answers(setting, folder), pilots):
            outcome = compare(prediction, observed)
            if name == BEST and (setting.learning_rate, setting.beta, setting.pairs) == (*VIOLENT, 1000):
                shown[setting.world] = outcome
            for group, found in figures(outcome).items():
                rows.append({**where, "estimator": name, "group": group, **dataclasses.asdict(found)})
                rows[-1]["of ceiling"] = found.r2 / found.ceiling if found.ceiling > 0 else float("nan")
        print(setting.key, flush=True)
    return rows, shown


def overview(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A table of each estimator by group: medians over runs, with their range."""
    groups = list(dict.fromkeys(row["group"] for row in rows))
    lines = [f"| R² / ceiling, median (range) | {' | '.join(groups)} |", "| --- |" + " ---: |" * len(groups)]
    for name in dict.fromkeys(row["estimator"] for row in rows):
        cells = []
        for group in groups:
            some = [row for row in rows if row["estimator"] == name and row["group"] == group]
            r2, of = ([row[key] for row in some] for key in ("r2", "of ceiling"))
            cells.append(f"{np.median(r2):.2f} / {np.median(of):.2f} ({min(of):.2f} to {max(of):.2f})" if some else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def table(rows: Sequence[dict[str, Any]], name: str) -> list[str]:
    """Every run of one estimator."""
    heads = (
        "world",
        "lr",
        "beta",
        "pairs",
        "group",
        "n",
        "change, sd",
        "R² [95 %]",
        "ceiling",
        "slope",
        "in 90 %",
        "in 90 %, scaled",
        "sign",
    )
    lines = [f"| {' | '.join(heads)} |", "| --- | ---: | ---: | ---: | --- |" + " ---: |" * (len(heads) - 5)]
    for row in rows:
        if row["estimator"] == name:
            cells = [
                row["world"],
                f"{row['lr']:g}",
                f"{row['beta']:g}",
                row["pairs"],
                row["group"],
                row["n"],
                f"{row['change']:.3f}",
            ]
            cells += [
                f"{row['r2']:.2f} [{row['low']:.2f}, {row['high']:.2f}]",
                f"{row['ceiling']:.2f}",
                f"{row['slope']:.2f}",
            ]
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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prediction", description=__doc__.split("\n")[0])
    parser.add_argument("--worlds", choices=("design", "held-out", "all"), default="all")
    parser.add_argument("--cached", action="store_true", help="only the runs that are there")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    runs = settings({"design": DESIGN, "held-out": HELD_OUT, "all": (*DESIGN, *HELD_OUT)}[options.worlds])
    if options.cached:
        runs = [run for run in runs if (options.folder / f"{run.key}-rollouts" / "log_ratios.parquet").exists()]
    else:
        make(runs, options.folder)
    rows, shown = study(runs, options.folder)
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "prediction.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    lines = [INTRODUCTION, ""]
    for title, held in (("Worlds held out", True), ("Worlds of the design", False)):
        if some := [row for row in rows if row["held out"] == held]:
            lines += [f"## {title}", "", *overview(some), "", f"Every run, {BEST}:", "", *table(some, BEST), ""]
    (options.out / "prediction.md").write_text("\n".join(lines))
    picture(shown, options.out / "prediction.png")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
