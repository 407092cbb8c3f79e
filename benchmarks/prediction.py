"""Does the audit's prediction come true? Predicted against observed change of features and clusters, in worlds of known lessons.

    python -m benchmarks.prediction [--worlds design | held-out] [--runs violent ...] [--prompts 256] [--finished] [--quick]

Each run is DPO with TRL's own trainer on a lab dataset or on planted preferences on stories260k, violent (learning rate 2e-4, beta 0.1), gentle (2e-5, 1)
and violent on a quarter of the pairs. The truth: the model before and after answers 256 held-out prompts twice, the model before reads the answers,
and they count by how much likelier they have become (`shapedpo verify`). The runs are kept in `benchmarks/cache/prediction`
(`benchmarks/prediction_runs.py`, which says which worlds were held out); `--finished` takes those that are there. `--quick` makes one small run, to see
that all of it works. Writes `prediction.{md,csv,png}` in `benchmarks/results` (`--out`); with another number of `--prompts`, by which the truth and the
predictions have less noise, it is in the files' names.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.estimates_runs import Setting
from benchmarks.folders import add_out, out_folder
from benchmarks.prediction_report import report
from benchmarks.prediction_runs import (
    DESIGN,
    FOLDER,
    HELD_OUT,
    KINDS,
    PILOTS,
    PROMPTS,
    QUICK,
    again,
    answers,
    audit,
    learnt,
    make,
    pilot,
    rollouts,
    settings,
)
from shapedpo.audit import Analysis, Harvest, Prediction, PredictionSettings, predict
from shapedpo.audit.prediction.conditions import Conditions
from shapedpo.audit.prediction.effects import measure
from shapedpo.audit.rollouts.observed import Observed, observe
from shapedpo.audit.rollouts.run import Rollouts
from shapedpo.audit.verify.comparison import GROUPS, ODDS, Outcome, compare, figures


PLAIN, DATA, ANSWERS, PILOT = "plain mean delta", "the data alone", "and the reference's answers", "and a pilot of 1/{}"
Seen = Mapping[tuple[str, str], Observed]


def predictions(
    setting: Setting,
    harvest: Harvest,
    analysis: Analysis,
    given: Rollouts,
    pilots: Mapping[int, Rollouts],
) -> Iterator[tuple[str, Prediction]]:
    """Each estimator's name and what it predicts."""
    first = predict(harvest, analysis, progress=False)
    conditions = Conditions.of(analysis)
    parts = measure(harvest, conditions, np.ones(harvest.n_rows), analysis.settings, 1, 10, progress=False).parts
    plain = np.concatenate([part.delta for part in sorted(parts, key=lambda part: part.view != "global")])
    yield PLAIN, dataclasses.replace(first, score=plain, score_low=plain, score_high=plain)
    yield DATA, first
    yield ANSWERS, predict(harvest, analysis, rollouts=given, progress=False)
    for share, weighed in pilots.items():
        if not weighed.log_ratios.any():
            continue  # it was still at a learning rate of 0
        how = PredictionSettings(pilot_share=learnt(setting, share))
        yield PILOT.format(share), predict(harvest, analysis, how, rollouts=weighed, progress=False)


def another_run(prediction: Prediction, observed: Seen, second: Seen) -> dict[str, float]:
    """R^2 of a run with a second run of the same setting, by group, had answers no noise: from either's halves, crossed."""
    same = {key: dataclasses.replace(o, n=observed[key].n, rate=observed[key].rate) for key, o in second.items()}
    outcomes = [compare(prediction, each) for each in (observed, same)]
    found = {}
    for name, (kind, view, less) in GROUPS.items():
        (a, b), (c, d) = ((o.contrast() if less else o).of(kind, view).halves for o in outcomes)
        across, own = (np.corrcoef(a, d)[0, 1] + np.corrcoef(b, c)[0, 1]) / 2, np.corrcoef(a, b)[0, 1]
        product = own * np.corrcoef(c, d)[0, 1]
        # noise from halves that hardly agree says nothing
        found[name] = float(min(across**2 / product, 1.0)) if own > 0.2 and product > 0.04 else float("nan")
    return found


def study(runs: Sequence[Setting], folder: Path) -> tuple[list[dict[str, Any]], dict[str, Outcome]]:
    """The figures of every run, estimator and group; and the outcomes of the last estimator in the violent runs, for the picture."""
    rows, shown = [], {}
    for setting in runs:
        harvest, analysis = audit(setting, folder)
        conditions = Conditions.of(analysis)
        observed = observe(rollouts(setting, folder), conditions, progress=False)
        pilots = {share: pilot(setting, share, folder) for share in sorted(PILOTS, reverse=True)}
        twice = again(setting, folder, made=False)
        second = None if twice is None else observe(twice, conditions, progress=False)
        where = {"world": setting.world, "held out": setting.world in HELD_OUT, "lr": setting.learning_rate}
        where |= {"beta": setting.beta, "pairs": setting.pairs}
        for name, prediction in predictions(setting, harvest, analysis, answers(setting, folder), pilots):
            outcome = compare(prediction, observed)
            if setting.learning_rate == runs[0].learning_rate and setting.pairs != 250:
                shown[setting.world] = outcome
            runs_apart = {} if second is None else another_run(prediction, observed, second)
            for group, found in figures(outcome).items():
                if name == PLAIN and group.endswith(ODDS):
                    continue  # it has none of its own
                of = found.r2 / found.ceiling if found.ceiling > 0 else float("nan")
                known = {"of ceiling": of, "another run": runs_apart.get(group, float("nan"))}
                rows.append({**where, "estimator": name, "group": group, **dataclasses.asdict(found), **known})
        print(setting.key, flush=True)
    return rows, shown


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prediction", description=__doc__.split("\n")[0])
    parser.add_argument("--worlds", choices=("design", "held-out", "all"), default="all")
    parser.add_argument("--runs", nargs="+", choices=tuple(KINDS), default=tuple(KINDS))
    parser.add_argument(
        "--prompts", type=int, default=PROMPTS, help="held-out prompts that show the change (%(default)s)"
    )
    parser.add_argument("--finished", action="store_true", help="only the runs that are there")
    parser.add_argument("--quick", action="store_true", help="one small run, in seconds: to see that it works")
    parser.add_argument("--folder", type=Path, help="where runs are kept (default: in the cache)")
    add_out(parser)
    options = parser.parse_args(arguments)
    folder = options.folder or (FOLDER / "quick" if options.quick else FOLDER)
    out = out_folder(options, folder)
    worlds = {"design": DESIGN, "held-out": HELD_OUT, "all": (*DESIGN, *HELD_OUT)}[options.worlds]
    planned = settings(worlds, options.runs, options.prompts)
    name = "prediction" if options.prompts == PROMPTS else f"prediction-{options.prompts}"
    planned = [QUICK] if options.quick else planned
    runs = planned
    if options.finished:
        runs = [run for run in runs if (folder / f"{run.key}-rollouts" / "log_ratios.parquet").exists()]
    else:
        make(runs, folder)
    rows, shown = study(runs, folder)
    out.mkdir(parents=True, exist_ok=True)
    with (out / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(report(rows, shown, planned, runs, out / name))


if __name__ == "__main__":
    main()
