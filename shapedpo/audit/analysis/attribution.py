"""Which rows teach a lesson: a small model of what a lesson's rows show, its condition and its response together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.special import expit, logit

from ..harvesting.store import Shard
from .views import difference, on


FOLDS = 4
_PENALTY = 0.1  # scikit-learn's C
_GENEROUS, _ROUNDS = 2, 10
_MELTED = 0.9
_MIXED = 0.25  # share of the doubtful rows that may be so by chance


class Shown(NamedTuple):
    """What some pairs show, 1 where they do.

    Attributes:
        rows: `(n,)` int64, row numbers, which decide the fold.
        more, less: `(n, d_sae)` sparse, features that are on in the chosen completion only, and in the rejected one only.
        prompt: `(n, d_sae)` sparse, features that fire in the prompt.
    """

    rows: NDArray[np.int64]
    more: Any
    less: Any
    prompt: Any

    @classmethod
    def of(cls, shard: Shard, tau: float, which: NDArray[np.bool_] | slice = slice(None)) -> Shown:
        """Of some pairs of a shard."""
        apart = difference(shard, tau, which)
        spans = on(apart, 0), on(-apart, 0), on(shard.prompt.freq[which], 0)
        for span in spans:
            span.eliminate_zeros()
        return cls(shard.rows[which], *spans)

    @classmethod
    def stacked(cls, parts: Sequence[Shown]) -> Shown:
        """Several one after the other."""
        rows, *spans = zip(*parts, strict=True)
        return cls(np.concatenate(rows), *(sparse.vstack(span, format="csr") for span in spans))

    @property
    def size(self) -> int:
        """Entries in memory."""
        return self.more.nnz + self.less.nnz + self.prompt.nnz

    def take(self, which: NDArray[np.bool_]) -> Shown:
        """Some of the pairs."""
        return Shown(self.rows[which], self.more[which], self.less[which], self.prompt[which])

    def by_feature(self) -> Shown:
        """The same stored by columns, of which models take some without going through all the others."""
        return Shown(self.rows, self.more.tocsc(), self.less.tocsc(), self.prompt.tocsc())

    def columns(self, chosen: Columns, mirrored: bool = False) -> NDArray[np.float32]:
        """`(n, features)`: some features; `mirrored`, as if the rejected completion had been chosen."""
        more, less = (self.less, self.more) if mirrored else (self.more, self.less)
        parts = (more[:, chosen.response], less[:, chosen.response], self.prompt[:, chosen.prompt])
        return np.hstack([part.toarray() for part in parts]).astype(np.float32)


class Columns(NamedTuple):
    """Features that a model looks at: of the completions' difference, and of the prompt."""

    response: NDArray[np.int64]
    prompt: NDArray[np.int64]


class Model(NamedTuple):
    """What tells a lesson's rows from others.

    Attributes:
        columns: What it looks at.
        weights, bias: `(FOLDS, features)` and `(FOLDS,)`: those of a fold are fitted without the rows of that fold.
        least: Log-odds from which a row is the lesson's.
        doubtful: Log-odds from which it may be.
    """

    columns: Columns
    weights: NDArray[np.float32]
    bias: NDArray[np.float32]
    least: float
    doubtful: float

    def log_odds(self, shown: Shown) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """`(n,)` each: of pairs as they are, and mirrored."""
        of_fold = _of_fold(shown)
        real, mirrored = (
            np.where(of_fold, shown.columns(self.columns, side) @ self.weights.T + self.bias, 0).sum(axis=1)
            for side in (False, True)
        )
        return real, mirrored

    def told_by_prompt(self, shown: Shown, rows: NDArray[np.bool_]) -> float:
        """How well the prompt alone tells some pairs from the others: the area under the ROC curve; 0.5 where there are no others."""
        from sklearn.metrics import roc_auc_score

        if rows.all():
            return 0.5
        prompt = (
            shown.prompt[:, self.columns.prompt] @ self.weights[:, len(self.weights.T) - len(self.columns.prompt) :].T
        )
        return float(roc_auc_score(rows, np.where(_of_fold(shown), prompt, 0).sum(axis=1)))

    def named(self, real: NDArray[np.floating], mirrored: NDArray[np.floating]) -> NDArray[np.bool_]:
        """`(n,)`: which pairs are the lesson's, by their log-odds."""
        return (real >= self.least) & (real > mirrored)


def _of_fold(shown: Shown) -> NDArray[np.bool_]:
    """`(n, FOLDS)`: which fold each pair is in. A row's parity has a meaning of its own: split halves."""
    return (shown.rows // 2 % FOLDS)[:, None] == np.arange(FOLDS)


def attributed(
    shown: Shown,
    seeds: NDArray[np.bool_],
    aside: NDArray[np.bool_],
    features: int,
    max_chance: float,
    mixed: bool = False,
) -> tuple[Model, NDArray[np.bool_]] | None:
    r"""Learns from some rows of a lesson what all of them show.

    A logistic regression tells the seeds from all other pairs and from all pairs mirrored (chosen and rejected exchanged), by what
    differs between the completions and by the prompt. So it finds what the seeds' difference has that the opposite has not, under the condition
    that they share. The rows so found are the seeds of the next round, until they stay the same. Each row is judged by a model that has
    not seen it. Where every pair is a seed, the mirrored ones are all that it is told from.

    Seeds are some of the lesson's rows, and more alike than all of them are. The first two rounds take every row nearer to the
    seeds' median than to the others'. Later ones are strict: the rows that are not yet found make all odds a constant times too low,
    which is the mean probability among those that are, and a row belongs to the lesson if the corrected probability is above a half (Elkan
    and Noto, 2008). That holds while those found are some at random: the rows that a round leaves out are the doubtful ones, which the next would
    learn as others, so that it would leave out more, round after round. Where a tenth has melted away like this, the largest set is taken.

    Where completions differ by chance, a pair is as likely as its mirror image: mirrored pairs that would belong to the lesson count
    how many of its rows do by chance, and the threshold rises until they are at most `max_chance` of them (knockoff+, Barber and Candes,
    2015).

    Args:
        shown: The pairs.
        seeds: `(n,)`, some of the lesson's rows.
        aside: `(n,)`, rows that may be the lesson's or not: not learned from in the first round.
        features: How many features to look at, of the difference and of the prompt, those that tell most.
        max_chance: Share of the rows that may be the lesson's by chance.
        mixed: Whether about as many seeds go that way by chance. The first rounds may then find few of them, from which later ones find more.

    Returns:
        The model, and which of the pairs are the lesson's; `None` if the seeds have nothing in common that goes beyond chance.
    """
    labels, learned = seeds, ~aside | seeds
    found: tuple[Model, NDArray[np.bool_]] | None = None
    for number in range(_ROUNDS):
        model = _fitted(shown, labels, learned, features)
        real, mirrored = model.log_odds(shown)
        if number < _GENEROUS:
            others = mirrored if labels.all() else real[~labels]
            enough = float(np.median(real[labels]) + np.median(others)) / 2
        else:
            enough = float(logit(expit(real[labels]).mean() / 2))
        least = max(enough, _beyond_chance(real, mirrored, max_chance))
        short = np.maximum(real, mirrored) < least
        model = model._replace(least=least, doubtful=min(least, _beyond_chance(real[short], mirrored[short], _MIXED)))
        before, labels, learned = labels, model.named(real, mirrored), np.ones_like(learned)
        if found is not None:
            if (labels == before).all():
                return model, labels
            if labels.sum() < _MELTED * found[1].sum():
                break
        if (labels & seeds).sum() < (1 if mixed and number < _GENEROUS else seeds.sum() / 2):
            break
        if number >= _GENEROUS and (found is None or labels.sum() > found[1].sum()):
            found = model, labels
    return found


def _beyond_chance(real: NDArray[np.floating], mirrored: NDArray[np.floating], max_chance: float) -> float:
    """The lowest log-odds from which few enough mirrored pairs are; infinite if there is none."""
    largest = np.maximum(real, mirrored)
    order = np.argsort(-largest, kind="stable")
    ours = np.cumsum(real[order] > mirrored[order])
    chance = np.cumsum(real[order] < mirrored[order])
    fine = np.flatnonzero(1 + chance <= max_chance * ours)
    return float(largest[order[fine[-1]]]) if len(fine) else np.inf


def _fitted(shown: Shown, labels: NDArray[np.bool_], learned: NDArray[np.bool_], features: int) -> Model:
    from sklearn.linear_model import LogisticRegression

    spans = (shown.more, shown.less), (shown.less, shown.more), (shown.prompt, shown.prompt)
    more, less, prompt = (_telling(values, mirrored, labels, features) for values, mirrored in spans)
    columns = Columns(np.union1d(more, less), prompt)
    x = np.concatenate([shown.columns(columns), shown.columns(columns, mirrored=True)])
    y = np.concatenate([labels, np.zeros_like(labels)])
    use = np.concatenate([learned, np.ones_like(learned)])
    of_fold = np.tile(_of_fold(shown), (2, 1))
    weights, bias = np.zeros((FOLDS, x.shape[1]), np.float32), np.full(FOLDS, -np.inf, np.float32)
    for number in range(FOLDS):
        train = use & ~of_fold[:, number]
        if y[train].any():
            found = LogisticRegression(C=_PENALTY, max_iter=200, tol=1e-3).fit(x[train], y[train])
            weights[number], bias[number] = found.coef_[0], found.intercept_[0]
    return Model(columns, weights, bias, 0.0, 0.0)


def _telling(values: Any, mirrored: Any, labels: NDArray[np.bool_], n: int) -> NDArray[np.int64]:
    """The features whose rate among the labelled rows is farthest from that of all (of all mirrored, where all rows are labelled), in standard
    errors (one row more or less aside)."""
    rate = (mirrored if labels.all() else values).getnnz(axis=0) / len(labels)
    inside = values.T @ labels.astype(np.float32)  # whole numbers
    count = labels.sum()
    z = (inside - count * rate) / np.sqrt(count * rate * (1 - rate) + 1)
    return np.sort(np.argsort(-np.abs(z), kind="stable")[:n])
