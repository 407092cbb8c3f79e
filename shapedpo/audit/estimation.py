"""From effects in the data to changes of the model: what the reference can move in, how it generalises, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from .effects import Effects, Part
from .shrinkage import shrunk


if TYPE_CHECKING:
    from .observed import Observed
    from .prediction import PredictionSettings

Array = NDArray[np.float64]

LEVEL = 0.9
"""Of the intervals."""


def estimate(
    effects: Effects, answers: Mapping[tuple[str, str], Observed], pilot: bool, settings: PredictionSettings
) -> dict[str, NDArray[Any]]:
    """The columns of a [`~shapedpo.audit.prediction.Prediction`].

    Args:
        effects: What the data shows.
        answers: What the reference's answers show; empty where there are none.
        pilot: Whether a pilot weighs them.
        settings: How.
    """
    columns: dict[str, list[Any]] = {}
    everywhere: dict[str, tuple[Array, Array]] = {}
    pace: float | None = None  # the pilot's change for a mean delta of one sd
    for part in sorted(effects.parts, key=lambda part: (part.view != "global", part.kind != "feature")):
        value, se, rate, found = part.delta, part.se, part.rate, answers.get((part.kind, part.view))
        if found is not None:
            ratio, rate = _room(part, found, settings)
            value, se = value * ratio, se * ratio
        if part.view == "global":
            if pilot and found is not None:
                change, change_se = found.change[0] / part.sd, found.se[0] / part.sd
                both = _with_pilot(value, se, change, change_se)
                if pace is None:  # features come first: there are most of them
                    pace = float(value @ both[0]) / max(float(value @ value), 1e-300)
                if pace > 0:
                    value, se = both[0] / pace, both[1] / pace
            everywhere[part.kind] = value, se
        else:  # what a condition adds to what happens everywhere, which is little for most
            base, base_se = (of[part.number] for of in everywhere[part.kind])
            more, more_se = shrunk(value - base, se)
            value, se = base + more, np.hypot(base_se, more_se)
        scale = settings.scale
        if pace is not None and pace > 0 and settings.pilot_share is not None:
            scale = pace * settings.pilot_share**-settings.growth
        _add(columns, part, value, se, rate, scale, settings)
    types = {"kind": str, "view": str, "number": np.int32, "condition": np.int32}
    return {name: np.concatenate(parts).astype(types.get(name, np.float32)) for name, parts in columns.items()}


def _room(part: Part, found: Observed, settings: PredictionSettings) -> tuple[Array, Array]:
    """How much more the reference's own answers vary than the data's completions, and the rates of appearing in them.

    A reward moves a model within what it says by itself: to first order a score's change is its covariance with the reward under the
    reference, while the delta that the data shows is so under whoever wrote the data.
    """
    at = np.maximum(part.condition, 0), part.number
    n = 2 * found.n[at[0], 0]
    varies = (n * found.variance[at] / part.sd**2 + settings.prior_answers * part.variance) / (
        n + settings.prior_answers
    )
    rate = (n / 2 * found.rate[at] + part.rate) / (n / 2 + 1)
    return np.minimum(varies / np.maximum(part.variance, 1e-9), settings.max_ratio), rate


def _with_pilot(value: Array, se: Array, change: Array, change_se: Array) -> tuple[Array, Array]:
    """What the data and a pilot say together of the pilot's change, by empirical Bayes, and its standard error."""
    from ..monitor.estimators import MIN_FEATURES, best_estimate

    if len(value) < MIN_FEATURES or not value.any() or not change.any():
        return value, se
    # what no answer shows has an error of 0 that means nothing
    both = best_estimate(value, se, (change, np.maximum(change_se, np.median(change_se[change_se > 0]))))
    return both.value, both.se


def _add(
    columns: dict[str, list[Any]],
    part: Part,
    value: Array,
    se: Array,
    rate: Array,
    scale: float,
    settings: PredictionSettings,
) -> None:
    """Add a part's lines."""
    half = float(norm.ppf(0.5 + LEVEL / 2))
    usual = np.sqrt(np.mean(value**2)) if len(value) else 0.0
    error = np.sqrt(se**2 + settings.error**2 * value**2 + (settings.common_error * usual) ** 2)
    # A change of p(1 - p) in the rate is one in the log-odds, which go on where a rate would saturate; a score moves with its rate.
    p = np.clip(rate, settings.least_rate, 1 - settings.least_rate)
    moved = np.divide(
        part.rate_delta, part.delta, out=np.zeros_like(part.delta), where=np.abs(part.delta) > 2 * part.se
    )
    usual_move = np.sqrt(p * (1 - p))  # of something that is on or off
    per_score = np.where(moved > 0, np.clip(moved, usual_move / 4, 4 * usual_move), usual_move) / (p * (1 - p))
    for name, per in (("score", 1.0), ("log_odds", per_score)):
        for suffix, shift in (("", 0.0), ("_low", -half), ("_high", half)):
            columns.setdefault(name + suffix, []).append(scale * per * (value + shift * error))
    for name, values in (
        ("kind", np.full(len(part.number), part.kind)),
        ("view", np.full(len(part.number), part.view)),
        ("number", part.number),
        ("condition", part.condition),
        ("base_rate", rate),
        ("sd", part.sd),
    ):
        columns.setdefault(name, []).append(values)
