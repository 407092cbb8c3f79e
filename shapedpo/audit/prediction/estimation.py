"""From effects in the data to changes of the model: the reward that they imply, what it moves, and how sure that is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from ..harvesting.store import Harvest
from .conditions import Conditions
from .effects import Effects, Part, differences
from .reward import Change, Within, answer_pairs, changes
from .shrinkage import shrunk


if TYPE_CHECKING:
    from ..rollouts.observed import Observed
    from ..rollouts.run import Rollouts
    from .run import PredictionSettings

Array = NDArray[np.float64]

LEVEL = 0.9
"""Of the intervals."""
_PRIOR_PAIRS = 20  # of the data's completions, that a base rate in the answers is eked out with
_TINY = 1e-9  # of a standard error, where nothing varies


@dataclass(frozen=True)
class _Line:
    """Changes of a part's things, `(n,)` each: of the score, in sd, and of the share of completions in which it appears; and standard errors."""

    value: Array
    se: Array
    rate: Array
    rate_se: Array


def estimate(
    harvest: Harvest,
    conditions: Conditions,
    effects: Effects,
    weights: Array,
    held: NDArray[np.int64],
    answers: Rollouts | None,
    pilot: Observed | None,
    settings: PredictionSettings,
    progress: bool = True,
    held_on: NDArray[np.bool_] | None = None,
) -> dict[str, NDArray[Any]]:
    """The columns of a [`~shapedpo.audit.prediction.run.Prediction`].

    Args:
        harvest, conditions: The data, and what is scored where.
        effects: What it shows.
        weights: What each pair counts.
        held: Features that are held.
        answers: The reference's answers, if there are any.
        pilot: How a pilot changed the features in them, if there is one.
        settings: How.
        progress: Whether to show progress bars.
        held_on: The pairs on which they are held; all by default.
    """
    features = effects.of("feature")
    spoken = [] if answers is None else [one - other for _, (one, other) in answer_pairs(answers, progress)]
    data = Within([effects.differences], features.sd)
    own = Within(spoken, features.sd) if spoken else data
    reward = data.solve(features.delta, settings.ridge)
    if pilot is not None:
        reward = _half_of_each(reward, own.solve(pilot.change[0] / features.sd, settings.ridge), own)
    gated = None
    if held_on is None:
        reward = own.holding(reward, held)
    else:  # as a gate does: there they do not move, elsewhere they do
        inside = Within(differences(harvest, held_on & (weights > 0), settings.sample, progress), features.sd)
        gated = held_on, inside.holding(reward, held) / features.sd
    of_reference, of_all = changes(reward / features.sd, harvest, conditions, weights > 0, answers, progress, gated)

    columns: dict[str, list[Any]] = {}
    everywhere: dict[str, _Line] = {}
    scale = settings.scale
    for part in sorted(effects.parts, key=lambda part: (part.view != "global", part.kind != "feature")):
        if part.view == "global":
            line = everywhere[part.kind] = _everywhere(part, of_reference[part.kind, "global"])
            if part.kind == "feature" and pilot is not None and settings.pilot_share is not None:  # features come first
                pace = _pace(line.value, pilot.change[0] / part.sd, pilot.se[0] / part.sd)
                scale = pace / settings.pilot_share if pace > 0 else scale
        else:
            line = _under_condition(
                part, everywhere[part.kind], of_all[part.kind, part.view], of_all[part.kind, "global"]
            )
        rate = _base_rate(part, of_reference.get((part.kind, part.view)) if spoken else None)
        _add(columns, part, line, rate, scale, settings)
    types = {"kind": str, "view": str, "number": np.int32, "condition": np.int32, "scaled": bool}
    return {name: np.concatenate(parts).astype(types.get(name, np.float32)) for name, parts in columns.items()}


def _half_of_each(reward: Array, shown: Array, within: Within) -> Array:
    """The mean of the data's and of a pilot's reward, the latter scaled so that it moves the features as far."""
    size, other = (float(np.linalg.norm(within @ each)) for each in (reward, shown))
    return (reward + size / other * shown) / 2 if size > 0 and other > 0 else reward


def _pace(value: Array, seen: Array, seen_se: Array) -> float:
    """How far a pilot has gone, of a prediction of 1; half of what is predicted was read off it, with its noise."""
    size, other, own = (float(np.linalg.norm(each)) for each in (value, seen, seen_se))
    return (float(value @ seen) - size / other * own**2 / 2) / size**2 if size > 0 and other > 0 else 0.0


def _everywhere(part: Part, change: Change) -> _Line:
    value, se = change.value[0] / part.sd, change.se[0] / part.sd
    pairs = part.se * np.linalg.norm(value) / max(float(np.linalg.norm(part.delta)), 1e-300)  # they are a sample, too
    return _Line(value, np.hypot(se, pairs), change.rate_change[0], change.rate_se[0])


def _under_condition(part: Part, everywhere: _Line, change: Change, all_over: Change) -> _Line:
    """What happens everywhere and what the condition adds to it, which is little for most things."""
    at = part.condition, part.number
    base, base_se, base_rate, base_rate_se = (of[part.number] for of in vars(everywhere).values())
    more, more_se = shrunk(
        (change.value[at] - all_over.value[0][part.number]) / part.sd, change.se[at] / part.sd + _TINY
    )
    rate, rate_se = shrunk(change.rate_change[at] - all_over.rate_change[0][part.number], change.rate_se[at] + _TINY)
    return _Line(base + more, np.hypot(base_se, more_se), base_rate + rate, np.hypot(base_rate_se, rate_se))


def _base_rate(part: Part, spoken: Change | None) -> Array:
    if spoken is None:
        return part.rate
    at = np.maximum(part.condition, 0), part.number
    n = spoken.n[at[0], 0]
    return (n * spoken.rate[at] + _PRIOR_PAIRS * part.rate) / (n + _PRIOR_PAIRS)


def _add(
    columns: dict[str, list[Any]],
    part: Part,
    line: _Line,
    rate: Array,
    scale: float | None,
    settings: PredictionSettings,
) -> None:
    """Add a part's lines."""
    half = float(norm.ppf(0.5 + LEVEL / 2))
    usual = np.sqrt(np.mean(line.value**2)) if len(line.value) else 0.0
    # a change of p(1 - p) in the rate is one in the log-odds, which go on where a rate would saturate
    p = np.clip(rate, settings.least_rate, 1 - settings.least_rate)
    odds = p * (1 - p)
    for name, value, se, common in (
        ("score", line.value, line.se, usual),
        ("log_odds", line.rate / odds, line.rate_se / odds, usual / np.sqrt(odds)),  # that of something on or off
    ):
        error = np.sqrt(se**2 + (settings.error * value) ** 2 + (settings.common_error * common) ** 2)
        for suffix, shift in (("", 0.0), ("_low", -half), ("_high", half)):
            columns.setdefault(name + suffix, []).append((scale or 1.0) * (value + shift * error))
    for name, values in (
        ("kind", np.full(len(part.number), part.kind)),
        ("view", np.full(len(part.number), part.view)),
        ("number", part.number),
        ("condition", part.condition),
        ("base_rate", rate),
        ("sd", part.sd),
        ("scaled", np.full(len(part.number), scale is not None)),
    ):
        columns.setdefault(name, []).append(values)
