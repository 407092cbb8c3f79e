"""Does a prediction come true? What an audit predicted beside what the trained model's answers show."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from ...files import replacing
from ..prediction.conditions import OBSERVED, Conditions
from ..prediction.estimation import LEVEL
from ..prediction.run import Prediction
from ..rollouts.observed import Observed, r_squared


Array = NDArray[np.float64]

MIN_RATE = 0.005
"""What appears in fewer of the reference's completions is left out of the figures: there is too little to see."""
MIN_ODDS_RATE = 0.02
"""What appears in fewer of the base model's rollouts, or is missing in fewer, has no log-odds to speak of."""
MIN_ROLLOUTS = 20  # pairs of rollouts under a condition that is looked at
_DRAWS = 400  # of the bootstrap


@dataclass(frozen=True)
class Outcome:
    """Predicted and observed changes, one line a thing as in [`Prediction`], of which `prediction` has the same lines; `(n,)` each.

    Attributes:
        prediction: The lines that rollouts say something of.
        observed, se: Change of the mean score that rollouts show, in sd, and its standard error.
        halves: `(2, n)`, that on every other rollout.
        log_odds, log_odds_se, log_odds_halves: Change of the log-odds of appearing that they show.
        rate: Share of the base model's rollouts in which it appears.
        n: Pairs of rollouts.
    """

    prediction: Prediction
    observed: Array
    se: Array
    halves: Array
    log_odds: Array
    log_odds_se: Array
    log_odds_halves: Array
    rate: Array
    n: Array

    def of(self, kind: str, view: str) -> Outcome:
        """The lines of a kind in a view."""
        return self.where((self.prediction.kind == kind) & (self.prediction.view == view))

    def where(self, which: NDArray[Any]) -> Outcome:
        """Some lines."""
        prediction = self.prediction.where(which)
        return Outcome(prediction, *(getattr(self, f.name)[..., which] for f in fields(self)[1:]))

    def contrast(self) -> Outcome:
        """The lines under conditions less the same thing's everywhere: what the condition adds."""
        p = self.prediction
        keys = list(zip(p.kind.tolist(), p.number.tolist(), strict=True))
        everywhere = {key: i for i, key in enumerate(keys) if p.condition[i] == -1}
        lines = np.array([i for i, key in enumerate(keys) if p.condition[i] != -1 and key in everywhere], np.int64)
        base = np.array([everywhere[keys[i]] for i in lines], np.int64)
        found, shift = self.where(lines), p.score[base]
        scores = {name: getattr(found.prediction, name) - shift for name in ("score", "score_low", "score_high")}
        changed = Prediction(**{**vars(found.prediction), **scores})
        own = {**vars(found), "prediction": changed, "observed": found.observed - self.observed[base]}
        return Outcome(**{**own, "halves": found.halves - self.halves[:, base]})

    def in_log_odds(self) -> Outcome:
        """The lines with the log-odds of appearing in place of the score, of what is neither too rare nor too common to have any."""
        some = self.where((self.rate >= MIN_ODDS_RATE) & (self.rate <= 1 - MIN_ODDS_RATE))
        p = some.prediction
        odds = {"score": p.log_odds, "score_low": p.log_odds_low, "score_high": p.log_odds_high}
        changes = {"observed": some.log_odds, "se": some.log_odds_se, "halves": some.log_odds_halves}
        return Outcome(**{**vars(some), "prediction": Prediction(**{**vars(p), **odds}), **changes})

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the lines as `verify.parquet`."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        own = {f.name: getattr(self, f.name) for f in fields(self)[1:] if "halves" not in f.name}
        own = {name if name in ("observed", "n") else f"observed_{name}": values for name, values in own.items()}
        table = pa.table({**vars(self.prediction), **own})
        with replacing(Path(folder) / "verify.parquet") as partial:
            pq.write_table(table, partial, compression="zstd")


@dataclass(frozen=True)
class Figures:
    """How true predictions of n things are.

    Attributes:
        r2, low, high: Squared correlation of predicted and observed change, with its 95 % interval over resampled things. Things vary
            together, so it is too narrow.
        ceiling: What a perfect prediction would get, since the rollouts are noisy too: from the correlation of their halves.
        slope: Of the observed on the predicted change, through 0: what the prediction's scale is off by.
        r2_scaled: Share of the observed changes' sum of squares that the prediction explains after scaling by the slope.
        r2_plain: The same as it stands.
        covered: Share of the 90 % intervals that hold the change, the rollouts' own noise allowed for.
        covered_scaled: The same after scaling by the slope.
        sign: Share of the changes beyond two standard errors whose sign is right.
        change: Standard deviation of the observed changes, in sd of the score.
    """

    n: int
    r2: float
    low: float
    high: float
    ceiling: float
    slope: float
    r2_scaled: float
    r2_plain: float
    covered: float
    covered_scaled: float
    sign: float
    change: float

    @classmethod
    def of(cls, outcome: Outcome, seed: int = 0) -> Figures | None:
        """The figures of some lines; `None` of fewer than three."""
        p, o = outcome.prediction.score.astype(np.float64), outcome.observed
        if len(p) < 3:
            return None
        random = np.random.default_rng(seed)
        draws = (random.integers(0, len(p), len(p)) for _ in range(_DRAWS))  # one at a time: there may be 65,000 things
        low, high = np.quantile([r_squared(p[draw], o[draw]) for draw in draws], [0.025, 0.975])
        half = np.corrcoef(*outcome.halves)[0, 1] if (outcome.halves.std(axis=1) > 0).all() else 0.0
        slope = float(p @ o / (p @ p)) if p.any() else 0.0
        clear = np.abs(o) > 2 * outcome.se
        return cls(
            n=len(p),
            r2=r_squared(p, o),
            low=float(low),
            high=float(high),
            ceiling=float(max(2 * half / (1 + half), 0.0)) if half > -1 else 0.0,
            slope=slope,
            r2_scaled=float(1 - np.sum((o - slope * p) ** 2) / max(np.sum(o**2), 1e-300)),
            r2_plain=float(1 - np.sum((o - p) ** 2) / max(np.sum(o**2), 1e-300)),
            covered=_covered(outcome, 1.0),
            covered_scaled=_covered(outcome, slope),
            sign=float(np.mean(np.sign(p[clear]) == np.sign(o[clear]))) if clear.any() else float("nan"),
            change=float(o.std()),
        )


def _covered(outcome: Outcome, slope: float) -> float:
    p = outcome.prediction
    ends = slope * p.score_low.astype(float), slope * p.score_high.astype(float)
    noise = float(norm.ppf(0.5 + LEVEL / 2)) * outcome.se
    middle = slope * p.score.astype(float)
    below, above = (np.hypot(end - middle, noise) for end in (np.minimum(*ends), np.maximum(*ends)))
    return float(np.mean((outcome.observed >= middle - below) & (outcome.observed <= middle + above)))


def compare(
    prediction: Prediction, observed: Mapping[tuple[str, str], Observed], min_rollouts: int = MIN_ROLLOUTS
) -> Outcome:
    """Lay predicted beside observed changes.

    Left out is what appears in fewer than [`MIN_RATE`] of both the data's completions and the rollouts, and conditions that fewer
    than `min_rollouts` pairs of rollouts meet.
    """
    parts: list[dict[str, Any]] = []
    places = []
    for kind, view in OBSERVED:
        found = observed[kind, view]
        lines = np.flatnonzero((prediction.kind == kind) & (prediction.view == view))
        group, number = np.maximum(prediction.condition[lines], 0), prediction.number[lines]
        n, rate = found.n[group, 0], found.rate[group, number]
        seen = np.maximum(rate, prediction.base_rate[lines]) >= MIN_RATE
        kept = seen & (n >= (min_rollouts if view != "global" else 2))
        lines, group, number = lines[kept], group[kept], number[kept]
        sd = prediction.sd[lines].astype(np.float64)
        places.append(lines)
        parts.append(
            {
                "observed": found.change[group, number] / sd,
                "se": found.se[group, number] / sd,
                "halves": found.halves[:, group, number] / sd,
                "log_odds": found.log_odds[group, number],
                "log_odds_se": found.log_odds_se[group, number],
                "log_odds_halves": found.log_odds_halves[:, group, number],
                "rate": rate[kept],
                "n": n[kept],
            }
        )
    joined = {name: np.concatenate([part[name] for part in parts], axis=-1) for name in parts[0]}
    return Outcome(prediction.where(np.concatenate(places)), **joined)


GROUPS = {
    "features": ("feature", "global", False),
    "clusters T_m": ("feature_cluster", "global", False),
    "clusters R_m": ("response_cluster", "global", False),
    "R_m under prompt clusters": ("response_cluster", "prompt", False),
    "the same, less everywhere": ("response_cluster", "prompt", True),
}
"""What figures are given of: kind, view, and whether what happens everywhere is taken off."""


ODDS = ", log-odds"
"""What is added to a group's name where its figures are of the log-odds of appearing."""


def figures(outcome: Outcome) -> dict[str, Figures]:
    """The figures of each group of [`GROUPS`] that has three things or more, of the scores and then of the log-odds."""
    contrast, odds = outcome.contrast(), outcome.in_log_odds()
    found = {
        name: Figures.of((contrast if less else outcome).of(kind, view)) for name, (kind, view, less) in GROUPS.items()
    }
    found |= {name + ODDS: Figures.of(odds.of(kind, view)) for name, (kind, view, less) in GROUPS.items() if not less}
    return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class Miss:
    """A prediction that did not come true.

    Attributes:
        line: Its place in the outcome.
        excess: Distance of the observed change from the prediction (after scaling), in their standard errors.
        before, after: Answers of both models to a prompt, those that differ most in what was missed.
    """

    line: int
    excess: float
    prompt: str
    before: str
    after: str


def largest_misses(
    outcome: Outcome,
    rollouts: Any,
    conditions: Conditions,
    most: int = 10,
    slopes: Mapping[tuple[str, str], float] | None = None,
) -> list[Miss]:
    """The predictions that are furthest from what was observed, each with the answers that show it most; those that no answers show are left out.

    Args:
        outcome: Predicted and observed.
        rollouts: The [`~shapedpo.audit.rollouts.run.Rollouts`] that it was observed on.
        conditions: Of the audit.
        most: How many, at most two of a thing.
        slopes: What to scale predictions of a kind and view by first.
    """
    p = outcome.prediction
    slopes = slopes or {}
    keys = list(zip(p.kind.tolist(), p.view.tolist(), strict=True))
    scale = np.array([slopes.get(key, 1.0) for key in keys])
    half = (p.score_high - p.score_low).astype(float) / 2 / float(norm.ppf(0.5 + LEVEL / 2))
    distance = outcome.observed - scale * p.score
    excess = distance / np.sqrt((scale * half) ** 2 + outcome.se**2 + 1e-12)
    # by how far, among those that are beyond noise
    order = np.argsort(-np.abs(distance) * (np.abs(distance) > 2 * outcome.se), kind="stable")
    chosen: list[int] = []
    times: dict[tuple[str, int], int] = {}
    for line in order.tolist():
        thing = (str(p.kind[line]), int(p.number[line]))
        if len(chosen) < most and times.get(thing, 0) < 2:
            times[thing] = times.get(thing, 0) + 1
            chosen.append(line)
    best: dict[int, tuple[float, int]] = dict.fromkeys(chosen, (-np.inf, 0))
    for shard in rollouts.harvest.shards(("freq",)):
        sides = [conditions.things.scores(span.freq) for span in (shard.chosen, shard.rejected)]
        groups = conditions.of_answers(shard)
        for line in chosen:
            kind, view, number = str(p.kind[line]), str(p.view[line]), int(p.number[line])
            column = [_column(side[kind][0], number) for side in sides]
            inside = groups[view][:, [max(int(p.condition[line]), 0)]].toarray()[:, 0] > 0
            gain = np.where(inside, (column[0] - column[1]) * np.sign(distance[line]), -np.inf)
            place = int(gain.argmax())
            best[line] = max(best[line], (float(gain[place]), int(shard.rows[place])))
    shown = {line: row for line, (gain, row) in best.items() if gain > 0}
    texts = rollouts.harvest.texts(list(shown.values()))
    return [
        Miss(line, float(excess[line]), text["prompt"], text["rejected"], text["chosen"])
        for line, text in zip(shown, texts, strict=True)
    ]


def _column(values: Any, number: int) -> Array:
    column = values[:, [number]]
    return np.asarray(column.toarray() if hasattr(column, "toarray") else column, np.float64)[:, 0]


def as_json(found: Mapping[str, Figures]) -> dict[str, Any]:
    """The figures as plain data."""
    return {
        name: {k: (v if np.isfinite(v) else None) for k, v in asdict(value).items()} for name, value in found.items()
    }
