"""The change that rollouts show, of every feature and cluster, everywhere and under conditions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from .conditions import OBSERVED, Conditions, passes
from .rollouts import Rollouts


Array = NDArray[np.float64]

HALVES = 3  # all prompts, those of even and those of odd number


@dataclass(frozen=True)
class Observed:
    """The change of the things of a kind in a view; arrays are `(groups, things)`, groups being conditions.

    Attributes:
        n: `(groups, 1)`, pairs of rollouts.
        change, se: Change of the mean score, in the score's own units, and its standard error.
        halves: `(2, groups, things)`, the change on rollouts of even and of odd number.
        log_odds, log_odds_se: Change of the log-odds of appearing.
        rate: Share of the base model's rollouts in which it appears.
        variance: Of the score, over all rollouts.
    """

    n: Array
    change: Array
    se: Array
    halves: Array
    log_odds: Array
    log_odds_se: Array
    rate: Array
    variance: Array


class _Sums:
    """Sums over pairs of rollouts of `r = R - c m`: what each adds to the change, up to the mean `m`, which is known at the end only."""

    def __init__(self, groups: int, things: int) -> None:
        self.n, self.c, self.cc = (np.zeros((groups, 1)) for _ in range(3))
        self.r, self.rr, self.cr, self.level, self.square = (np.zeros((groups, things)) for _ in range(5))
        self.before, self.after = (np.zeros((groups, things)) for _ in range(2))

    def add(self, members: Any, weights: Array, scores: tuple[Any, Any], shown: tuple[Any, Any]) -> None:
        """Add pairs; `weights`, `(n, 2)`, of the trained and of the base model's rollouts."""
        groups = sparse.csr_matrix(members.T, dtype=np.float64)
        c = weights.mean(axis=1)
        r = sum(sparse.diags(w / 2) @ side for w, side in zip(weights.T, scores, strict=True))
        self.n += groups.sum(axis=1)
        self.c += groups @ c[:, None]
        self.cc += groups @ (c**2)[:, None]
        for name, values in (
            ("r", r),
            ("rr", _squared(r)),
            ("cr", sparse.diags(c) @ r),
            ("level", (scores[0] + scores[1]) / 2),
            ("square", (_squared(scores[0]) + _squared(scores[1])) / 2),
            ("after", shown[0]),
            ("before", shown[1]),
        ):
            total = groups @ values
            setattr(self, name, getattr(self, name) + (total.toarray() if sparse.issparse(total) else total))

    def observed(self) -> Observed:
        n = np.maximum(self.n, 1)
        level = self.level / n
        change = (self.r - self.c * level) / n
        square = (self.rr - 2 * level * self.cr + level**2 * self.cc) / n
        se = np.sqrt(np.maximum(square - change**2, 0) / np.maximum(n - 1, 1))
        after, before = (counts + 0.5 for counts in (self.after, self.before))  # Haldane and Anscombe
        odds = [np.log(counts / (n + 1 - counts)) for counts in (after, before)]
        odds_se = np.sqrt(sum(1 / counts + 1 / (n + 1 - counts) for counts in (after, before)))
        of, half = np.split(np.arange(len(n)), HALVES)[0], np.split(change, HALVES)[1:]
        return Observed(
            n=self.n[of],
            change=change[of],
            se=se[of],
            halves=np.stack(half),
            log_odds=(odds[0] - odds[1])[of],
            log_odds_se=odds_se[of],
            rate=(self.before / n)[of],
            variance=np.maximum(self.square / n - level**2, 0)[of],
        )


def _squared(values: Any) -> Any:
    return values.multiply(values) if sparse.issparse(values) else np.square(values, dtype=np.float64)


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
    sums: dict[tuple[str, str], _Sums] = {}
    for place, shard in passes(rollouts.harvest, "Observing", progress):
        sides = [conditions.things.scores(span.freq) for span in (shard.chosen, shard.rejected)]
        groups = conditions.of_answers(shard)
        even = sparse.diags((shard.rows % 2 == 0).astype(float))
        odd = sparse.eye(len(shard.rows)) - even
        for kind, view in OBSERVED:
            chosen, rejected = (side[kind] for side in sides)
            members = sparse.hstack([groups[view], even @ groups[view], odd @ groups[view]], format="csr")
            found = sums.setdefault((kind, view), _Sums(members.shape[1], chosen[0].shape[1]))
            found.add(members, np.asarray(weights[place]), *zip(chosen, rejected, strict=True))
    return {key: found.observed() for key, found in sums.items()}


def r_squared(predicted: ArrayLike, observed: ArrayLike) -> float:
    """Squared correlation; 0 where either does not vary."""
    p, o = np.asarray(predicted, np.float64), np.asarray(observed, np.float64)
    return float(np.corrcoef(p, o)[0, 1] ** 2) if len(p) > 1 and p.std() > 0 and o.std() > 0 else 0.0
