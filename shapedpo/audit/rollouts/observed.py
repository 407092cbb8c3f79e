"""The change that rollouts show, of every feature and cluster, everywhere and under conditions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from ..harvesting.passes import Passes
from ..prediction.conditions import OBSERVED, Conditions
from ..prediction.effects import squared, summed
from .run import Rollouts


Array = NDArray[np.float64]

HALVES = 3  # all prompts, and two halves of them


@dataclass(frozen=True)
class Observed:
    """The change of the things of a kind in a view; arrays are `(groups, things)`, groups being conditions.

    Attributes:
        n: `(groups, 1)`, pairs of rollouts.
        change, se: Change of the mean score, in the score's own units, and its standard error.
        halves: `(2, groups, things)`, the change on either half of the prompts: answers to a prompt follow each other.
        log_odds, log_odds_se, log_odds_halves: Change of the log-odds of appearing.
        rate: Share of the base model's rollouts in which it appears.
    """

    n: Array
    change: Array
    se: Array
    halves: Array
    log_odds: Array
    log_odds_se: Array
    log_odds_halves: Array
    rate: Array


class _Sums:
    """Sums over pairs of rollouts of `r = R - c m`: what each adds to the change, up to the mean `m`, which is known at the end only."""

    def __init__(self, groups: int, things: int) -> None:
        self.n, self.c, self.cc = (np.zeros((groups, 1)) for _ in range(3))
        self.r, self.rr, self.cr, self.level = np.zeros((4, groups, things))

    def add(self, members: Any, weights: Array, scores: tuple[Any, Any]) -> None:
        """Add pairs; `weights`, `(n, 2)`, of the trained and of the base model's rollouts."""
        c = weights.mean(axis=1)
        r = sum(sparse.diags(w / 2) @ side for w, side in zip(weights.T, scores, strict=True))
        self.n += members.sum(axis=0).T
        self.c += members.T @ c[:, None]
        self.cc += members.T @ (c**2)[:, None]
        for total, values in (
            (self.r, r),
            (self.rr, squared(r)),
            (self.cr, sparse.diags(c) @ r),
            (self.level, (scores[0] + scores[1]) / 2),
        ):
            total += summed(members, values)

    def change(self) -> tuple[Array, Array, Array, Array]:
        """Pairs, mean over both sides, change and its standard error."""
        n = np.maximum(self.n, 1)
        level = self.level / n
        change = (self.r - self.c * level) / n
        square = (self.rr - 2 * level * self.cr + level**2 * self.cc) / n
        return n, level, change, np.sqrt(np.maximum(square - change**2, 0) / np.maximum(n - 1, 1))


def _observed(score: _Sums, shown: _Sums, both: bool) -> Observed:
    _, _, change, se = score.change()
    n, rate, more, more_se = shown.change()
    # what both models' answers show is their rates' mean, what the base model's alone show is its own
    before = np.clip(rate - (more / 2 if both else 0), 0, 1)
    after = np.clip(before + more, 0, 1)
    p, q = ((n * each + 0.5) / (n + 1) for each in (after, before))  # Haldane and Anscombe
    log_odds = np.log(p / (1 - p)) - np.log(q / (1 - q))
    middle = (p + q) / 2
    log_odds_se = np.hypot(more_se, 0.5 / (n + 1)) / (middle * (1 - middle))
    of = np.split(np.arange(len(n)), HALVES)[0]
    halves, odds_halves = (np.stack(np.split(values, HALVES)[1:]) for values in (change, log_odds))
    return Observed(score.n[of], change[of], se[of], halves, log_odds[of], log_odds_se[of], odds_halves, before[of])


def observe(
    rollouts: Rollouts, conditions: Conditions, *, bridge: bool = True, progress: bool = True
) -> dict[tuple[str, str], Observed]:
    """The change from base to trained model, by kind and view.

    Args:
        rollouts: Answers of both.
        conditions: What the audit compares, and where.
        bridge: Whether answers count by how much likelier they have become, which takes most of the noise away while the models are
            near each other; otherwise it is the plain difference of means.
        progress: Whether to show a progress bar.
    """
    weights = rollouts.weights if bridge else np.broadcast_to([2.0, -2.0], rollouts.log_ratios.shape)
    sums: dict[tuple[str, str], tuple[_Sums, _Sums]] = {}
    for place, shard in Passes(rollouts.harvest, progress)("Observing"):
        sides = [conditions.things.scores(span.freq) for span in (shard.chosen, shard.rejected)]
        groups = conditions.of_answers(shard)
        even = sparse.diags((shard.rows // 2 % 2 == 0).astype(float))  # of prompts: both models answer each twice
        odd = sparse.eye(len(shard.rows)) - even
        for kind, view in OBSERVED:
            chosen, rejected = (side[kind] for side in sides)
            members = sparse.hstack([groups[view], even @ groups[view], odd @ groups[view]], format="csr")
            size = members.shape[1], chosen[0].shape[1]
            found = sums.setdefault((kind, view), (_Sums(*size), _Sums(*size)))
            pairs = zip(chosen, rejected, strict=True)  # scores, then where it appears
            for total, values in zip(found, pairs, strict=True):
                total.add(members, np.asarray(weights[place]), values)
    return {key: _observed(*found, rollouts.both) for key, found in sums.items()}


def r_squared(predicted: ArrayLike, observed: ArrayLike) -> float:
    """Squared correlation; 0 where either does not vary."""
    p, o = np.asarray(predicted, np.float64), np.asarray(observed, np.float64)
    return float(np.corrcoef(p, o)[0, 1] ** 2) if len(p) > 1 and p.std() > 0 and o.std() > 0 else 0.0
