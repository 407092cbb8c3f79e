"""Comparing a group of rows with the rest, for many groups and scores at once: Welch's test, Cohen's d, halves, Benjamini-Hochberg."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse, stats


Array = NDArray[np.float64]

LARGEST = 1e6
"""Where z and d are cut off, so that a perfect separation is still a number."""

_ROUNDING = 1e-12  # relative


class Comparison(NamedTuple):
    """Groups of rows, each against the rest; every array is `(groups, scores)` but for the counts, `(groups, 1)`.

    Attributes:
        n_in, n_out: Rows of the group, and of the rest.
        mean_in, mean_out: Means of the score.
        delta: `mean_in - mean_out`.
        d: Cohen's d, by the pooled standard deviation.
        z: Welch's statistic.
        p: Its two-sided p value, by the t distribution with the Welch-Satterthwaite degrees of freedom; NaN where a group or the rest
            has fewer than two rows.
        halves: `(2, groups, scores)`, delta among the rows of even and of odd number; NaN where a half of the group is empty.
    """

    n_in: Array
    n_out: Array
    mean_in: Array
    mean_out: Array
    delta: Array
    d: Array
    z: Array
    p: Array
    halves: Array

    @property
    def strength(self) -> Array:
        """What the paper ranks by, `min(|Delta_A|, |Delta_B|)`, where both halves have one sign; 0 elsewhere."""
        agree = self.halves[0] * self.halves[1] > 0
        return np.where(agree, np.abs(self.halves).min(axis=0), 0.0)

    def tested(self, min_rows: int, scores: NDArray[np.bool_] | bool = True) -> Array:
        """The p values of what is tested, NaN elsewhere: groups with enough rows in and, where there is a rest, out of them.

        Args:
            min_rows: How many are enough.
            scores: `(scores,)`, which are tested.
        """
        enough = (self.n_in >= min_rows) & ((self.n_out >= min_rows) | (self.n_out == 0))
        return np.where(enough & scores, self.p, np.nan)


class Moments:
    """Counts, sums and sums of squares of scores by group and half of the data, added up over a stream; float64.

    Args:
        n_groups: Number of groups of rows, which may overlap.
        n_scores: Number of scores a row.
    """

    def __init__(self, n_groups: int, n_scores: int) -> None:
        # the last row of each is of all rows
        self.count = np.zeros((2, n_groups + 1, 1))
        self.total = np.zeros((2, n_groups + 1, n_scores))
        self.square = np.zeros((2, n_groups + 1, n_scores))

    def add(self, rows: NDArray[np.int64], groups: sparse.csr_matrix, scores: NDArray[np.floating]) -> None:
        """Adds some rows.

        Args:
            rows: `(n,)`, their numbers, whose parity decides the half.
            groups: `(n, n_groups)`, 1 where a row is in a group.
            scores: `(n, n_scores)`.
        """
        members = sparse.hstack([groups, np.ones((len(rows), 1))], format="csr", dtype=np.float64)
        for half in (0, 1):
            which = rows % 2 == half
            of, x = members[which].T.tocsr(), np.asarray(scores[which], np.float64)
            self.count[half] += of.sum(axis=1).reshape(-1, 1)
            self.total[half] += of @ x
            self.square[half] += of @ np.square(x)

    def add_sparse(self, rows: NDArray[np.int64], scores: sparse.csr_matrix) -> None:
        """Adds some rows without groups, whose scores, `(n, n_scores)`, are mostly 0."""
        for half in (0, 1):
            x = scores[rows % 2 == half]
            n_scores = x.shape[1]
            self.count[half, -1] += x.shape[0]
            self.total[half, -1] += np.bincount(x.indices, x.data, n_scores)
            self.square[half, -1] += np.bincount(x.indices, np.square(x.data, dtype=np.float64), n_scores)

    def compare(self) -> Comparison:
        """Each group against the rest."""
        inside = [part[:, :-1] for part in (self.count, self.total, self.square)]
        outside = [
            part[:, -1:] - group for part, group in zip((self.count, self.total, self.square), inside, strict=True)
        ]
        n_in, mean_in, var_in = _mean_and_variance(*(part.sum(axis=0) for part in inside))
        n_out, mean_out, var_out = _mean_and_variance(*(part.sum(axis=0) for part in outside))
        delta = mean_in - mean_out
        delta[np.abs(delta) <= _ROUNDING * np.maximum(np.abs(mean_in), np.abs(mean_out))] = 0
        with np.errstate(divide="ignore", invalid="ignore"):
            pooled = np.sqrt(((n_in - 1) * var_in + (n_out - 1) * var_out) / (n_in + n_out - 2))
            halves = inside[1] / inside[0] - outside[1] / outside[0]
        z, p = _test(delta, var_in / np.maximum(n_in, 1), n_in, var_out / np.maximum(n_out, 1), n_out)
        return Comparison(n_in, n_out, mean_in, mean_out, delta, _ratio(delta, pooled), z, p, halves)

    def overall(self) -> Comparison:
        """The mean of all rows against zero, `(1, n_scores)`: `n_out` and `mean_out` are 0."""
        n, mean, variance = _mean_and_variance(
            *(part[:, -1:].sum(axis=0) for part in (self.count, self.total, self.square))
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            halves = self.total[:, -1:] / self.count[:, -1:]
        zero = np.zeros_like(mean)
        z, p = _test(mean, variance / np.maximum(n, 1), n, zero, np.full_like(n, 2))
        return Comparison(n, np.zeros_like(n), mean, zero, mean, _ratio(mean, np.sqrt(variance)), z, p, halves)


def _mean_and_variance(n: Array, total: Array, square: Array) -> tuple[Array, Array, Array]:
    mean = total / np.maximum(n, 1)
    variance = np.maximum(square - n * mean**2, 0) / np.maximum(n - 1, 1)
    # what is left of a constant's variance is rounding
    return n, mean, np.where(variance <= _ROUNDING * mean**2, 0.0, variance)


def _ratio(x: Array, y: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.clip(np.where(x == 0, 0.0, x / y), -LARGEST, LARGEST)


def _test(delta: Array, square_in: Array, n_in: Array, square_out: Array, n_out: Array) -> tuple[Array, Array]:
    """Welch's statistic and p value, of squared standard errors."""
    z = _ratio(delta, np.sqrt(square_in + square_out))
    with np.errstate(divide="ignore", invalid="ignore"):
        freedom = (square_in + square_out) ** 2 / (square_in**2 / (n_in - 1) + square_out**2 / (n_out - 1))
    p = 2 * stats.t.sf(np.abs(z), np.where(np.isfinite(freedom), np.maximum(freedom, 1), 1))
    p = np.where(square_in + square_out > 0, p, np.where(delta == 0, 1.0, 0.0))
    return z, np.where((n_in > 1) & (n_out > 1), p, np.nan)


def corrected(p: Array) -> Array:
    """Benjamini-Hochberg's q values, of all hypotheses that were tested; NaN marks those that were not, and stays."""
    q = np.full(p.shape, np.nan)
    tested = np.isfinite(p)
    if tested.any():
        q[tested] = stats.false_discovery_control(p[tested])
    return q
