"""Are the gauges true? What a run says it has changed, against what the model's answers say.

    python -m benchmarks.estimates [--quick] [--worlds "lab: goblin world" ...] [--probe 2048] [--finished]

DPO runs in four worlds (two of the lab's, two mixes of planted preferences on stories260k), gentle and violent: learning rates and betas a decade
apart. At a quarter, a half and the end of each, the change of every SAE feature's mean score is measured on 1,536 rollouts before and after,
which no estimator sees, and compared with what each estimator makes of the training pairs and of a few other rollouts.

The runs are kept in `benchmarks/cache/estimates` (`benchmarks/estimates_runs.py`); the estimators are studied on what was kept.
`--finished` takes the runs that are there. `--probe` asks how many rollouts the best estimator needs: the runs of the small beta with more of them, at their
end (`estimates-rollouts.md`).
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from benchmarks.estimates_study import MAIN, REPEATS, Run, Spectrum, best_estimate, r2, study
from benchmarks.folders import CACHE, add_out, out_folder
from shapedpo.monitor.estimators import Probe


LABEL = f"{MAIN[0]} + {MAIN[1]}"
SHOWN = {
    "amplification": "amplification",
    "carried forward from the last probe": "carried",
    f"difference of means, {MAIN[0]} + {MAIN[0]}": "means",
    f"bridge, {LABEL}": "bridge",
    f"best, {LABEL}": "best",
    f"best, 256 + {MAIN[1]}": "best, 256",
}


ROLLOUTS_NOTE = (
    "What more rollouts bring the best estimator: R^2 over SAE features with the change that 1,536 others show, as a share of what a perfect estimate would "
    'get, at the end of runs with beta 0.1 (`python -m benchmarks.estimates --probe 2048`). "n + m": n rollouts of the policy at the probe, m of before '
    "training. Last row: median over the runs; the rollouts before training are counted with the probe."
)


def overview(rows: Sequence[dict[str, Any]]) -> str:
    """R^2 as a share of the ceiling by world and learning rate, as Markdown: median and range over betas and points."""
    names = [name for name in SHOWN if any(row["estimator"] == name for row in rows)]
    lines = [
        f"| of ceiling: median (range) | change, sd | {' | '.join(names)} |",
        "| --- |" + " ---: |" * (len(names) + 1),
    ]
    for kind, rate in dict.fromkeys((row["world"].split(":")[0], row["learning_rate"]) for row in rows):
        some = [row for row in rows if row["world"].startswith(kind) and row["learning_rate"] == rate]
        changes = [row["change"] for row in some]
        cells = [f"{kind}, lr {rate:g}", f"{min(changes):.2f} to {max(changes):.2f}"]
        for name in names:
            found = [row["of ceiling"] for row in some if row["estimator"] == name]
            cells.append(f"{np.median(found):.2f} ({min(found):.2f} to {max(found):.2f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The runs as Markdown: R^2 of the estimators that matter, and how well the best one's intervals hold."""
    heads = [
        "world",
        "lr",
        "beta",
        "point",
        "change, sd",
        "log-ratio, sd",
        "ceiling",
        *SHOWN.values(),
        "slope",
        "in 90 %",
        "in 95 %",
    ]
    lines = [f"| {' | '.join(heads)} |", f"| --- |{' ---: |' * (len(heads) - 1)}"]
    runs: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        runs.setdefault((row["world"], row["learning_rate"], row["beta"], row["point"]), {})[row["estimator"]] = row
    for (world, rate, beta, point), found in runs.items():
        some, best = found["amplification"], found.get(f"best, {LABEL}")
        cells = [
            world,
            f"{rate:g}",
            f"{beta:g}",
            f"{point:.2f}",
            f"{some['change']:.2f}",
            f"{some['nats']:.1f}",
            f"{some['ceiling']:.2f}",
        ]
        for name in SHOWN:
            row = found.get(name)
            interval = (
                f" ({row['r2 low']:.2f} to {row['r2 high']:.2f})"
                if row and name in ("amplification", f"best, {LABEL}")
                else ""
            )
            cells.append(f"{row['r2']:.2f}{interval}" if row else "")
        cells += (
            [f"{best['slope']:.2f}", *(f"{100 * best[f'cover {level}']:.0f} %" for level in (90, 95))]
            if best
            else ["", "", ""]
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """The estimators as Markdown, each over all runs and points."""
    lines = [
        "| estimator | of ceiling: lowest | median | highest | R^2 of slope 1, median | slope, 10 to 90 % of points | in 90 % | in 95 % | "
        "a probe, % of the run | pairs from which it is 2 %, with the rollouts before training |",
        "| --- |" + " ---: |" * 9,
    ]
    for name in dict.fromkeys(row["estimator"] for row in rows):
        some = {
            key: np.array([row[key] for row in rows if row["estimator"] == name])
            for key in rows[0]
            if isinstance(rows[0][key], int | float)
        }
        low, high = np.quantile(some["slope"], [0.1, 0.9])
        needed = float(np.median((some["share"] + some["before"]) * some["pairs"] / 0.02))
        cells = [
            name,
            *(f"{pick(some['of ceiling']):.2f}" for pick in (np.min, np.median, np.max)),
            f"{np.median(some['r2 of 1']):.2f}",
            f"{low:.2f} to {high:.2f}",
            *(f"{100 * some[key].mean():.0f} %" for key in ("cover 90", "cover 95")),
            f"{100 * np.median(some['share']):.1f}" if some["share"].any() else "0",
            f"{needed:,.0f}" if needed else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def needed(rows: Sequence[dict[str, Any]]) -> str:
    """What more rollouts bring the best estimator, by world, and from how long a run on they are 2 % of it, as Markdown."""
    names = [name for name in dict.fromkeys(row["estimator"] for row in rows) if name.startswith("best, ")]
    heads = ["of ceiling", "change, sd", "ceiling", *(name.removeprefix("best, ") for name in names)]
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " ---: |" * (len(heads) - 1)]
    runs: dict[tuple[str, float], dict[str, dict[str, Any]]] = {}
    for row in rows:
        runs.setdefault((row["world"], row["learning_rate"]), {})[row["estimator"]] = row
    for (world, rate), found in runs.items():
        where = found[names[0]]
        shares = [found[name]["of ceiling"] for name in names]
        cells = [f"{value:.2f}" for value in (where["change"], where["ceiling"], *shares)]
        lines.append(f"| {world}, lr {rate:g} | {' | '.join(cells)} |")
    costs = [
        [(run[name]["share"] + run[name]["before"]) * run[name]["pairs"] / 0.02 for run in runs.values()]
        for name in names
    ]
    cells = ["pairs from which it is 2 %", "", "", *(f"{np.median(cost):,.0f}" for cost in costs)]
    return "\n".join([*lines, f"| {' | '.join(cells)} |"])


def concept_summary(rows: Sequence[dict[str, Any]]) -> str:
    """The named concepts as Markdown, all runs and points together."""
    lines = ["| estimator | R^2 | R^2 of slope 1 | slope | rms error, sd | in 90 % |", "| --- |" + " ---: |" * 5]
    for name in dict.fromkeys(row["estimator"] for row in rows):
        if name.startswith(("best", "carried")):
            continue  # of so few, `best_estimate` gives the probe as it is
        value, se, truth, truth_se = (
            np.array([row[key] for row in rows if row["estimator"] == name])
            for key in ("value", "se", "truth", "truth se")
        )
        error = truth - value
        cells = [
            name,
            f"{r2(value, truth):.2f}",
            f"{1 - error @ error / np.sum((truth - truth.mean()) ** 2):.2f}",
            f"{np.polyfit(value, truth, 1)[0]:.2f}",
            f"{np.sqrt(np.mean(error**2)):.3f}",
            f"{100 * np.mean(np.abs(error) <= 1.645 * np.hypot(se, truth_se)):.0f} %",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write(rows: Sequence[dict[str, Any]], concepts: Sequence[dict[str, Any]], paths: Sequence[Path], out: Path) -> str:
    """Writes `estimates.md`, `.csv`, `estimates-concepts.csv` and `.png`; returns the first one's text."""
    out.mkdir(parents=True, exist_ok=True)
    for name, table_rows in (("estimates", rows), ("estimates-concepts", concepts)):
        with (out / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(table_rows[0]))
            writer.writeheader()
            for row in table_rows:
                writer.writerow(
                    {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}
                )
    evaluation = Run(paths[0]).setting["evaluation"]
    from benchmarks.estimates_runs import settings

    text = f"""How true are the gauges? R^2 (squared correlation) over SAE features between an estimate and the change of the mean score that {evaluation} rollouts
show, which no estimator sees; {len(paths)} of the {len(settings())} runs of the full table at three points each, one seed. *Ceiling*: what a perfect estimate would get, since those rollouts are noisy
too (from their two halves). *Change*: sd over features of that change, in sd of the score. *Log-ratio*: of policy and reference, on base rollouts, nats. In
brackets the 95 % interval over resampled features; features vary together, so it is too narrow. Estimates with rollouts use {MAIN[0]} of the policy's
and {MAIN[1]} of before training, averaged over up to {REPEATS} disjoint sets; *best, 256* uses 256. *Carried*: no rollouts now; the best estimate at
the point before, half as far into the run. Slope (of change on estimate) and coverage are *best*'s. The prompts of the evaluation and of the probes are drawn from one pool of held-out prompts, so
some are in both. The best estimator's design was settled on six of the runs (learning rate 2e-4 in all worlds and 2e-5 in the lab's first and
in the first stories, beta 0.1); the others came after.

{overview(rows)}

{table(rows)}

Each estimator over all runs and points; *of ceiling* is R^2 over the ceiling, *R^2 of slope 1* takes the estimate as it stands (against the noisy
rollouts). "n + m": n rollouts of the policy at the probe, m of before training. The time of a probe: sampling and reading its rollouts,
passes of the policy over both sets, and the estimate, in processor time, as a share of these small runs (2,000 and 4,000 pairs).

{summary(rows)}

The named concepts (the lab's traits and dialogue), all runs and points together. So few are not estimated together: *bridge* is their best estimate.

{concept_summary(concepts)}
"""
    (out / "estimates.md").write_text(text)
    draw(paths, out / "estimates.png")
    return text


def draw(paths: Sequence[Path], out: Path) -> None:
    """Estimated against observed change at the end of runs: amplification above, the best estimate below."""
    from matplotlib.figure import Figure

    runs = sorted((Run(path) for path in paths), key=lambda run: (run.setting["beta"], run.setting["world"]))
    shown: dict[tuple[str, float], Run] = {}  # a run of the lab and of stories, gentle and violent
    for run in runs:
        shown.setdefault((run.setting["world"].split(":")[0], run.setting["learning_rate"]), run)
    chart = Figure(figsize=(3.2 * len(shown), 6.4), layout="constrained")
    axes = chart.subplots(2, len(shown), squeeze=False, sharex="col", sharey="col")
    for column, run in enumerate(shown.values()):
        step, f = run.points[-1], run.n_features
        whole, _, ceiling = run.truth(step)
        truth = whole[:f]
        reading = [values[:f] for values in run.amplification(step)]
        n = min(MAIN[0], run.setting["probe"])
        probe = run.probe(step, n, min(MAIN[1], run.setting["probe"]), 0)
        spectrum = Spectrum.of(np.concatenate([run.sample, run.scores("probe", 0)])[:, :f])
        best = best_estimate(*reading, Probe(probe.value[:f], probe.se[:f], probe.rows[:, :f]), spectrum)
        setting = f"{run.setting['world']}\nlr {run.setting['learning_rate']:g}, beta {run.setting['beta']:g}\n"
        for row, (name, value) in enumerate({"amplification": reading[0], f"best, {n} rollouts": best.value}.items()):
            axis = axes[row, column]
            axis.axline((0, 0), slope=1, color="0.75", linewidth=0.8, zorder=0)
            found = r2(value, truth)
            axis.scatter(value, truth, s=7, alpha=0.5, linewidths=0, color="tab:blue" if row else "0.4")
            axis.set_title(
                f"{'' if row else setting}{name}: R² {found:.2f}, {found / ceiling:.2f} of ceiling", fontsize=9
            )
        axes[1, column].set_xlabel("estimated change, sd", fontsize=9)
    for row in range(2):
        axes[row, 0].set_ylabel("change that rollouts show, sd", fontsize=9)
    chart.savefig(out, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.estimates", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small runs, to check that it works")
    parser.add_argument("--worlds", nargs="+", help="names of worlds")
    parser.add_argument("--probe", type=int, help="how many rollouts to give the estimators at most")
    parser.add_argument("--finished", action="store_true", help="only study the runs that are there")
    parser.add_argument("--folder", type=Path, default=CACHE / "estimates")
    add_out(parser)
    options = parser.parse_args(arguments)
    from benchmarks.estimates_runs import WORLDS, collect, settings

    wanted = settings(options.worlds or WORLDS, options.quick, options.probe)
    paths = [options.folder / f"{setting.key}.npz" for setting in wanted]
    if options.finished:
        paths = [path for path in paths if path.exists()]
    else:
        paths = [collect(setting, options.folder) for setting in tqdm(wanted, desc="Runs")]
    out = out_folder(options, CACHE / "quick")
    if options.probe:
        out.mkdir(parents=True, exist_ok=True)
        text = needed(study(paths)[0])
        (out / "estimates-rollouts.md").write_text(f"{ROLLOUTS_NOTE}\n\n{text}\n")
        print(text)
    else:
        print(write(*study(paths), paths, out))


if __name__ == "__main__":
    main()
