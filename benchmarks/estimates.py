"""Are the gauges true? What a run says it has changed, against what the model's answers say.

    python -m benchmarks.estimates [--quick] [--worlds "lab: goblin world" ...] [--cached]

DPO runs in four worlds (two of the lab's, two mixes of planted preferences on stories260k), gentle and violent: learning rates and betas a decade
apart. At a quarter, a half and the end of each, the change of every SAE feature's mean score is measured on 1,536 rollouts before and after,
which no estimator sees, and compared with what each estimator makes of the training pairs and of a few other rollouts.

The runs are kept in `benchmarks/cache/estimates` (`benchmarks/estimates_runs.py`); the estimators are studied on what was kept.
`--cached` takes the runs that are there.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm
from tqdm.auto import tqdm

from benchmarks.stories import CACHE, RESULTS
from shapedpo.monitor.estimators import (
    Estimate,
    Probe,
    Spectrum,
    best_estimate,
    calibrate_amplification,
    probe_change,
)


Array = NDArray[np.float64]

WINDOW = 1024  # pairs, as in `ShapedDPOConfig`
CALIBRATION = 512  # pairs that scores are standardised by
MIN_RATE = 0.005  # a feature that fires on fewer completions is left out
REPEATS = 4  # disjoint sets of probe rollouts that an estimator is tried on
SIZES = ((128, 32), (128, 64), (256, 64), (512, 64), (512, 128), (512, 256))  # rollouts before training, and at a probe
MAIN = (512, 64)


class Run:
    """A kept run, scores standardised, with the named concepts' columns behind the features'.

    Attributes:
        points: Steps at which the model was looked at.
        n_features: How many columns are features.
        concepts: Names of the others.
    """

    def __init__(self, path: Path) -> None:
        self.arrays: Any = np.load(path)
        self.meta = json.loads(str(self.arrays["meta"]))
        self.setting, self.points = self.meta["setting"], self.meta["points"]
        self.concepts = list(self.meta["named"])
        self.raw = {side: self.arrays[f"{side}_scores"] for side in ("chosen", "rejected")}
        sample = np.concatenate([scores[:CALIBRATION] for scores in self.raw.values()]).astype(np.float64)
        self._mean, std = sample.mean(axis=0), sample.std(axis=0)
        self._std = np.where(std > 0, std, 1.0)
        self._keep = (sample > 0).mean(axis=0) >= MIN_RATE
        self.n_features = int(self._keep.sum())
        self.deltas = self._standardise(self.raw["chosen"]) - self._standardise(self.raw["rejected"])
        self.sample = np.concatenate([self._standardise(scores[:CALIBRATION]) for scores in self.raw.values()])
        self.ratios = self.arrays["chosen"].astype(np.float64), self.arrays["rejected"].astype(np.float64)
        self.cost = Cost.of(self.meta)
        self._scores: dict[tuple[str, int], Array] = {}

    def _standardise(self, raw: Any) -> Array:
        scores = (raw.astype(np.float64) - self._mean) / self._std
        named = [scores[:, features].mean(axis=1) for features in self.meta["named"].values()]
        return np.column_stack([scores[:, self._keep], *named])

    def scores(self, name: str, step: int) -> Array:
        """`(N, F + C)`, of the rollouts `eval` or `probe` at a step."""
        if (name, step) not in self._scores:
            self._scores[name, step] = self._standardise(self.arrays[f"{name}_scores_{step}"])
        return self._scores[name, step]

    def amplification(self, step: int) -> tuple[Array, Array]:
        """`(F + C,)` each: amplification as the monitor has it, and its standard error."""
        n = step * self.meta["batch"]
        weights = np.exp(-np.arange(n)[::-1] / WINDOW)
        weights /= weights.sum()
        terms = (self.ratios[0][:n] - self.ratios[1][:n])[:, None] / 4 * self.deltas[:n]
        mean = weights @ terms
        return mean, np.sqrt(weights**2 @ (terms - mean) ** 2)

    def truth(self, step: int) -> tuple[Array, Array, float]:
        """The change on the evaluation's rollouts, `(F + C,)`, its standard error, and how much of its variance over features is not noise."""
        change = self.scores("eval", step) - self.scores("eval", 0)  # the same prompts and the same noise
        halves = change[::2].mean(axis=0)[: self.n_features], change[1::2].mean(axis=0)[: self.n_features]
        half = float(np.corrcoef(*halves)[0, 1])
        return change.mean(axis=0), change.std(axis=0) / len(change) ** 0.5, 2 * half / (1 + half)

    def probe(self, step: int, n_base: int, n: int, repeat: int, bridge: bool = True) -> Probe:
        """A probe of `n` rollouts against `n_base` of before training; without `bridge` a difference of means over the same prompts."""
        base, now = self.scores("probe", 0), self.scores("probe", step)
        part, before = slice(repeat * n, (repeat + 1) * n), np.arange(n_base) + (repeat * n if n_base < 512 else 0)
        before %= len(base)
        if not bridge:
            rows = now[part] - base[part]
            return Probe(rows.mean(axis=0), rows.std(axis=0, ddof=1) / n**0.5, rows)
        ratios = (self.arrays[f"probe_base_ratio_{step}"][before], self.arrays[f"probe_ratio_{step}"][part])
        return probe_change(base[before], now[part], *ratios)


@dataclass(frozen=True)
class Cost:
    """Processor seconds: of the training, and of a rollout's sampling, its reading with the reference, and a pass of the policy over it."""

    train: float
    rollout: float
    read: float
    rescore: float

    @classmethod
    def of(cls, meta: dict[str, Any]) -> Cost:
        seconds = meta["seconds"]
        rollouts = sum(row[3] for row in seconds["rollouts"]) / sum(row[2] for row in seconds["rollouts"])
        reading = sum(row[3] for row in seconds["read"]) / sum(row[2] for row in seconds["read"])
        return cls(
            seconds["train"],
            rollouts,
            reading,
            sum(seconds["rescore"]) / len(seconds["rescore"]) / meta["setting"]["probe"],
        )

    def probe(self, n_base: int, n: int) -> float:
        """Share of the run's time that one probe takes."""
        return (n * (self.rollout + self.read) + (n + n_base) * self.rescore) / self.train

    def before(self, n_base: int) -> float:
        """Share of it that the rollouts before training take."""
        return n_base * (self.rollout + self.read) / self.train


def estimates(run: Run, step: int, last: int | None) -> Iterator[tuple[str, Estimate, float]]:
    """All estimators of the change at a step: name, estimate, and share of the run's time that a probe takes."""
    reading = run.amplification(step)
    yield "amplification", best_estimate(*reading), 0.0
    held = run.setting["probe"]
    sizes = [size for size in SIZES if max(size) <= held]
    spectra = {n: Spectrum.of(np.concatenate([run.sample, run.scores("probe", 0)[:n]])) for n, _ in sizes}
    for repeat, (n_base, n) in itertools.product(range(REPEATS), sizes):
        if (repeat + 1) * n > held:
            continue
        if (n_base, n) == sizes[-1] or (n_base, n) == MAIN:
            if last is not None:
                before = run.probe(last, n_base, n, repeat)
                calibration = calibrate_amplification(*run.amplification(last), *before[:2])
                yield "amplification, scaled by the last probe", best_estimate(*reading, calibration=calibration), 0.0
            means = run.probe(step, n_base, n, repeat, bridge=False)
            yield f"difference of means, {n} pairs", Estimate(*means[:2], ""), run.cost.probe(0, n)
        probe, share, label = run.probe(step, n_base, n, repeat), run.cost.probe(n_base, n), f"{n} and {n_base}"
        yield f"bridge, {label}", Estimate(*probe[:2], ""), share
        yield f"best without covariance, {label}", best_estimate(*reading, probe), share
        yield f"best, {label}", best_estimate(*reading, probe, spectra[n_base]), share


# --- figures -----------------------------------------------------------------------------------------------------------------------


def r2(guess: Array, truth: Array) -> float:
    """Squared correlation."""
    return float(np.corrcoef(guess, truth)[0, 1] ** 2)


def figures(guess: Estimate, truth: Array, truth_se: Array, ceiling: float) -> dict[str, float]:
    """How true an estimate is, over features.

    `r2` is the squared correlation, with its interval over resampled features; `r2 of 1` the share of variance explained by the
    estimate as it stands, slope 1; `of ceiling` the first over what a perfect estimate would get against this noisy a truth.
    """
    draws = np.random.default_rng(0).integers(0, len(truth), (200, len(truth)))
    low, high = np.quantile([r2(guess.value[draw], truth[draw]) for draw in draws], [0.025, 0.975])
    found = {
        "r2": r2(guess.value, truth),
        "r2 low": float(low),
        "r2 high": float(high),
        "of ceiling": r2(guess.value, truth) / ceiling,
        "r2 of 1": float(1 - np.sum((truth - guess.value) ** 2) / np.sum((truth - truth.mean()) ** 2)),
        "slope": float(np.polyfit(guess.value, truth, 1)[0]),
    }
    for level in (90, 95):
        # The truth has an error of its own, by which the interval is wider here than it is given out.
        half = float(norm.ppf(0.5 + level / 200)) * np.sqrt(guess.se**2 + truth_se**2)
        found[f"cover {level}"] = float(np.mean(np.abs(truth - guess.value) <= half))
    return found


def study(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """A row for each run, point and estimator, over features and over the named concepts; sets of probe rollouts averaged."""
    rows = []
    for path in tqdm(paths, desc="Studying runs"):
        run = Run(path)
        for last, step in zip([None, *run.points], run.points, strict=False):
            truth, truth_se, ceiling = run.truth(step)
            f = run.n_features
            found: dict[str, list[dict[str, float]]] = {}
            for name, guess, share in estimates(run, step, last):
                parts = {"features": slice(0, f), "concepts": slice(f, None)}
                row = figures(Estimate(guess.value[:f], guess.se[:f], ""), truth[:f], truth_se[:f], ceiling)
                inside = parts["concepts"]
                half = 1.645 * np.sqrt(guess.se[inside] ** 2 + truth_se[inside] ** 2)
                row["concepts cover 90"] = float(np.mean(np.abs(truth[inside] - guess.value[inside]) <= half))
                row["concepts error"] = float(np.mean((truth[inside] - guess.value[inside]) ** 2) ** 0.5)
                found.setdefault(name, []).append({**row, "share": share})
            setting = {key: run.setting[key] for key in ("world", "learning_rate", "beta")}
            spread = float(np.abs(run.arrays[f"probe_base_ratio_{step}"]).std())
            for name, tried in found.items():
                mean = {key: float(np.mean([row[key] for row in tried])) for key in tried[0]}
                point = {
                    "point": step / run.meta["steps"],
                    "features": f,
                    "change": float(truth[:f].std()),
                    "nats": spread,
                }
                rows.append(
                    {
                        **setting,
                        **point,
                        "ceiling": ceiling,
                        "estimator": name,
                        **mean,
                        "before": run.cost.before(MAIN[0]),
                    }
                )
    return rows


# --- the table and the picture -----------------------------------------------------------------------------------------------------

SHOWN = {
    "amplification": "amplification",
    f"difference of means, {MAIN[1]} pairs": "means",
    f"bridge, {MAIN[1]} and {MAIN[0]}": "bridge",
    f"best, {MAIN[1]} and {MAIN[0]}": "best",
    "best, 256 and 512": "best, 256",
}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The runs as Markdown: R^2 of the estimators that matter, and how well the best one's intervals hold."""
    names = [name for name in SHOWN if any(row["estimator"] == name for row in rows)]
    heads = [
        "world",
        "lr",
        "beta",
        "point",
        "change, sd",
        "ceiling",
        *(SHOWN[name] for name in names),
        "slope",
        "in 90 %",
        "in 95 %",
    ]
    lines = [f"| {' | '.join(heads)} |", f"| --- |{' ---: |' * (len(heads) - 1)}"]
    runs: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        runs.setdefault((row["world"], row["learning_rate"], row["beta"], row["point"]), {})[row["estimator"]] = row
    for (world, rate, beta, point), found in runs.items():
        some, best = found["amplification"], found[names[3] if len(names) > 3 else names[-1]]
        cells = [world, f"{rate:g}", f"{beta:g}", f"{point:.2f}", f"{some['change']:.2f}", f"{some['ceiling']:.2f}"]
        for name in names:
            row = found[name]
            interval = f" ({row['r2 low']:.2f} to {row['r2 high']:.2f})" if name in (names[0], names[-2]) else ""
            cells.append(f"{row['r2']:.2f}{interval}")
        cells += [f"{best['slope']:.2f}", f"{100 * best['cover 90']:.0f} %", f"{100 * best['cover 95']:.0f} %"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """The estimators as Markdown, each over all runs and points."""
    lines = [
        "| estimator | R^2, median | of ceiling: median | lowest | R^2 with slope 1, median | slope, 10 to 90 % of points | in 90 % | "
        "in 95 % | concepts in 90 % | concepts, rms error, sd | a probe, % of the run |",
        "| --- |" + " ---: |" * 10,
    ]
    for name in dict.fromkeys(row["estimator"] for row in rows):
        some = {
            key: np.array([row[key] for row in rows if row["estimator"] == name])
            for key in rows[0]
            if isinstance(rows[0][key], float)
        }
        low, high = np.quantile(some["slope"], [0.1, 0.9])
        cells = [
            name,
            f"{np.median(some['r2']):.2f}",
            f"{np.median(some['of ceiling']):.2f}",
            f"{some['of ceiling'].min():.2f}",
            f"{np.median(some['r2 of 1']):.2f}",
            f"{low:.2f} to {high:.2f}",
            *(f"{100 * some[key].mean():.0f} %" for key in ("cover 90", "cover 95", "concepts cover 90")),
            f"{np.sqrt(np.mean(some['concepts error'] ** 2)):.3f}",
            f"{100 * np.median(some['share']):.1f}" if some["share"].any() else "0",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write(rows: Sequence[dict[str, Any]], paths: Sequence[Path], out: Path) -> str:
    """Writes `estimates.md`, `.csv` and `.png`; returns the first one's text."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "estimates.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(
            {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()} for row in rows
        )
    before = np.median([row["before"] for row in rows])
    text = f"""How true the gauges are: R^2 (squared correlation) over SAE features between an estimate and the change that 1,536 rollouts show,
{len(paths)} runs at three points each, one seed. *Ceiling* is what a perfect estimate would get, since the rollouts are noisy too. Estimates with rollouts
use {MAIN[1]} of the policy's and {MAIN[0]} of before training, averaged over up to {REPEATS} disjoint sets; *best, 256* uses 256 of the policy's. In
brackets the 95 % interval over resampled features, which vary together, so it is too narrow. Slope (of truth on estimate) and coverage are the best
estimate's.

{table(rows)}

Each estimator over all runs and points. "n and m": n rollouts of the policy at the probe, m of before training. The time of a probe is
sampling, reading, and passes of the policy over both sets, in processor time of these small runs (2,000 and 4,000 pairs); the rollouts
before training ({MAIN[0]}) take {100 * before:.1f} % once. Both shares fall with the number of pairs.

{summary(rows)}
"""
    (out / "estimates.md").write_text(text)
    draw(paths, out / "estimates.png")
    return text


def draw(paths: Sequence[Path], out: Path) -> None:
    """Predicted against observed change at the end of each run: amplification above, the best estimate below."""
    from matplotlib.figure import Figure

    runs = [Run(path) for path in paths]
    runs = sorted(runs, key=lambda run: (run.setting["beta"], -run.setting["learning_rate"], run.setting["world"]))[:4]
    chart = Figure(figsize=(3.2 * len(runs), 6.2), layout="constrained")
    axes = chart.subplots(2, len(runs), squeeze=False)
    for column, run in enumerate(runs):
        step, f = run.points[-1], run.n_features
        truth, _, _ = run.truth(step)
        size = min(MAIN[0], run.setting["probe"]), min(MAIN[1], run.setting["probe"] // 2)
        spectrum = Spectrum.of(np.concatenate([run.sample, run.scores("probe", 0)[: size[0]]]))
        reading = run.amplification(step)
        both = {
            "amplification": best_estimate(*reading),
            "best": best_estimate(*reading, run.probe(step, *size, 0), spectrum),
        }
        for row, (name, guess) in enumerate(both.items()):
            axis = axes[row, column]
            axis.scatter(guess.value[:f], truth[:f], s=6, alpha=0.4, linewidths=0, color="tab:blue" if row else "0.45")
            axis.scatter(guess.value[f:], truth[f:], s=18, color="tab:orange", marker="D", label="named concepts")
            axis.axline((0, 0), slope=1, color="0.7", linewidth=0.8, zorder=0)
            axis.set_title(f"{name}, R² = {r2(guess.value[:f], truth[:f]):.2f}", fontsize=9)
            axis.set_xlabel("estimate, sd")
        axes[0, column].set_title(
            f"{run.setting['world']}, lr {run.setting['learning_rate']:g}, beta {run.setting['beta']:g}\n"
            + axes[0, column].get_title(),
            fontsize=9,
        )
    for row in range(2):
        axes[row, 0].set_ylabel("change in rollouts, sd")
    axes[0, 0].legend(fontsize=8)
    chart.savefig(out, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.estimates", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small runs, to check that it works")
    parser.add_argument("--worlds", nargs="+", help="names of worlds")
    parser.add_argument("--cached", action="store_true", help="only study the runs that are there")
    parser.add_argument("--cache", type=Path, default=CACHE / "estimates")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    from benchmarks.estimates_runs import WORLDS, collect, settings

    wanted = settings(options.worlds or WORLDS, options.quick)
    paths = [options.cache / f"{setting.key}.npz" for setting in wanted]
    if options.cached:
        paths = [path for path in paths if path.exists()]
    else:
        paths = [collect(setting, options.cache) for setting in tqdm(wanted, desc="Runs")]
    print(write(study(paths), paths, options.out))


if __name__ == "__main__":
    main()
