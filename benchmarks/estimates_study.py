"""Estimators of change on kept runs, against rollouts that they have not seen: the figures behind `benchmarks/estimates.py`."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm
from tqdm.auto import tqdm

from shapedpo.monitor.estimators import Estimate, Past, Probe, Spectrum, best_estimate, probe_change


Array = NDArray[np.float64]

WINDOW = 1024  # pairs, as in `ShapedDPOConfig`
CALIBRATION = 512  # pairs that scores are standardised by
MIN_RATE = 0.005  # a feature that fires on fewer of their completions is left out
REPEATS = 4  # disjoint sets of probe rollouts that an estimator is tried on
SIZES = (
    (64, 128),
    (128, 128),
    (64, 512),
    (128, 512),
    (256, 512),
    (512, 1024),
    (1024, 2048),
)  # rollouts at a probe, and before training
MAIN = (64, 512)


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

    def probe(self, step: int, n: int, n_base: int, repeat: int, bridge: bool = True) -> Probe:
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

    def probe(self, n: int, n_base: int) -> float:
        """Share of the run's time that one probe takes."""
        return (n * (self.rollout + self.read) + (n + n_base) * self.rescore) / self.train

    def before(self, n_base: int) -> float:
        """Share of it that the rollouts before training take."""
        return n_base * (self.rollout + self.read) / self.train


def estimates(run: Run, step: int, last: int | None) -> Iterator[tuple[str, Estimate, float]]:
    """All estimators of the change at a step: name, estimate, and share of the run's time that a probe takes.

    Features are estimated together and named concepts by themselves, as `best_estimate` advises.
    """
    f = run.n_features
    reading = run.amplification(step)
    yield "amplification", best_estimate(*reading), 0.0
    held = run.setting["probe"]
    sizes = [size for size in SIZES if max(size) <= held]
    spectra = {n: Spectrum.of(np.concatenate([run.sample, run.scores("probe", 0)[:n]])[:, :f]) for _, n in sizes}

    def best(at: int, n: int, n_base: int, repeat: int, spectrum: Spectrum | None) -> Estimate:
        gauge, gauge_se = run.amplification(at)
        probe = run.probe(at, n, n_base, repeat)
        together = best_estimate(
            gauge[:f], gauge_se[:f], Probe(probe.value[:f], probe.se[:f], probe.rows[:, :f]), spectrum
        )
        return Estimate(*(np.append(a, b[f:]) for a, b in zip(together[:2], probe[:2], strict=True)), together.name)

    for repeat, (n, n_base) in itertools.product(range(REPEATS), sizes):
        if (repeat + 1) * n > held:
            continue
        label, share = f"{n} + {n_base}", run.cost.probe(n, n_base)
        if (n, n_base) == MAIN or len(sizes) < len(SIZES):
            if last is not None:
                past = Past(best(last, n, n_base, repeat, spectra[n_base]), run.amplification(last)[0])
                yield "carried forward from the last probe", best_estimate(*reading, past=past), 0.0
            means = run.probe(step, n, n_base, repeat, bridge=False)
            yield f"difference of means, {n} + {n}", Estimate(*means[:2], ""), run.cost.probe(n, 0)
        probe = run.probe(step, n, n_base, repeat)
        yield f"bridge, {label}", Estimate(*probe[:2], ""), share
        yield f"best without covariance, {label}", best(step, n, n_base, repeat, None), share
        started = time.process_time()
        guess = best(step, n, n_base, repeat, spectra[n_base])
        yield f"best, {label}", guess, share + (time.process_time() - started) / run.cost.train


def r2(guess: Array, truth: Array) -> float:
    """Squared correlation; of an estimate that says the same of all features, 0."""
    return float(np.corrcoef(guess, truth)[0, 1] ** 2) if guess.std() > 0 else 0.0


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
        "slope": float(np.polyfit(guess.value, truth, 1)[0]) if guess.value.std() > 0 else 0.0,
    }
    for level in (90, 95):
        # The truth has an error of its own, by which the interval is wider here than it is given out.
        half = float(norm.ppf(0.5 + level / 200)) * np.sqrt(guess.se**2 + truth_se**2)
        found[f"cover {level}"] = float(np.mean(np.abs(truth - guess.value) <= half))
    return found


def study(paths: Sequence[Path]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """How true the estimators are on each run, at each point.

    Returns:
        A row for each estimator over all features, averaged over sets of probe rollouts; and a row for each named concept and estimator, of
        the first set.
    """
    rows, concepts = [], []
    for path in tqdm(paths, desc="Studying runs"):
        run = Run(path)
        f = run.n_features
        for last, step in zip([None, *run.points], run.points, strict=False):
            truth, truth_se, ceiling = run.truth(step)
            where = {key: run.setting[key] for key in ("world", "learning_rate", "beta")} | {
                "point": step / run.meta["steps"]
            }
            ratios = run.arrays[f"probe_base_ratio_{step}"]
            where |= {
                "pairs": run.setting["pairs"],
                "features": f,
                "change": float(truth[:f].std()),
                "nats": float(ratios.std()),
            }
            found: dict[str, list[dict[str, float]]] = {}
            for name, guess, share in estimates(run, step, last):
                if name not in found:
                    for index, concept in enumerate(run.concepts, start=f):
                        numbers = {
                            "value": guess.value[index],
                            "se": guess.se[index],
                            "truth": truth[index],
                            "truth se": truth_se[index],
                        }
                        concepts.append({**where, "concept": concept, "estimator": name, **numbers})
                row = figures(Estimate(guess.value[:f], guess.se[:f], ""), truth[:f], truth_se[:f], ceiling)
                found.setdefault(name, []).append({**row, "share": share, "before": run.cost.before(_before(name))})
            for name, tried in found.items():
                mean = {key: float(np.mean([row[key] for row in tried])) for key in tried[0]}
                rows.append({**where, "ceiling": ceiling, "estimator": name, **mean})
    return rows, concepts


def _before(name: str) -> int:
    """How many rollouts of before training an estimator needs, by its name."""
    return int(name.split("+")[1]) if "+" in name else 0
