"""What a prediction starts from: how chosen and rejected completions differ in every feature and cluster, everywhere and under conditions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from ..analysis.sampling import sample, thinned
from ..analysis.settings import AuditSettings
from ..harvesting.passes import Passes
from ..harvesting.shards import COMPLETIONS
from ..harvesting.store import Harvest
from .conditions import VIEWS, Conditions


Array = NDArray[np.float64]


class _Tally:
    """Sums over pairs of what their scores differ by, of several groups of rows: `(groups, scores)` each, but `n`, `(groups, 1)`."""

    def __init__(self, groups: int, scores: int) -> None:
        self.n = np.zeros((groups, 1))
        self.delta, self.square, self.rate = np.zeros((3, groups, scores))

    def add(self, members: Any, weights: Array, delta: Any, shown: tuple[Any, Any]) -> None:
        """Add pairs.

        Args:
            members: `(n, groups)` sparse, 1 where a pair is in a group.
            weights: `(n,)`.
            delta: `(n, scores)`, the chosen completions' scores less the rejected ones', dense or sparse.
            shown: The same of where something appears in either, 0 or 1.
        """
        weighted = sparse.diags(weights) @ members
        self.n += members.sum(axis=0).T
        self.delta += summed(weighted, delta)
        self.square += summed(sparse.diags(weights) @ weighted, squared(delta))
        for side in shown:
            self.rate += summed(members, side)


class _Spread:
    """How scores vary over completions."""

    def __init__(self, scores: int) -> None:
        self.n, self.level, self.square = 0, np.zeros(scores), np.zeros(scores)

    def add(self, scores: tuple[Any, Any]) -> None:
        """Add the scores of pairs' completions, `(n, scores)` each."""
        for side in scores:
            self.n += side.shape[0]
            self.level += np.asarray(side.sum(axis=0, dtype=np.float64)).ravel()
            self.square += np.asarray(squared(side).sum(axis=0)).ravel()

    def sd(self) -> Array:
        """`(scores,)`; 1 where a score does not vary."""
        variance = self.square / self.n - (self.level / self.n) ** 2
        return np.sqrt(np.where(variance > 1e-12, variance, 1.0))


def squared(values: Any) -> Any:
    """Dense or sparse as they are."""
    if not sparse.issparse(values):
        return np.square(values, dtype=np.float64)
    square = np.square(values.data, dtype=np.float64)
    return sparse.csr_matrix((square, values.indices, values.indptr), shape=values.shape)


def summed(members: Any, values: Any) -> Array:
    """`(groups, scores)`: sums of dense or sparse values, `(n, scores)`, over each group; `members`, `(n, groups)` sparse, says what a row counts."""
    found = (values.T @ members.toarray()).T if sparse.issparse(values) else members.T @ values
    return np.asarray(found)


@dataclass(frozen=True)
class Part:
    """Effects on the things of a kind in a view, `(n,)` each.

    Attributes:
        kind, view: As in [`~shapedpo.audit.prediction.run.Prediction`].
        number: Of each thing.
        condition: The condition's number, -1 everywhere.
        delta, se: Weighted mean over the (condition's) pairs of the score's difference, in sd of the score, and its standard error.
        rate: Share of the (condition's) completions in which it appears.
        sd: The score's standard deviation over all completions.
    """

    kind: str
    view: str
    number: NDArray[np.int64]
    condition: NDArray[np.int64]
    delta: Array
    se: Array
    rate: Array
    sd: Array


@dataclass(frozen=True)
class Effects:
    """Effects in a dataset.

    Attributes:
        parts: The effects.
        differences: `(pairs, d_sae)` sparse, chosen less rejected completions' frequencies in a sample of the pairs that count.
    """

    parts: list[Part]
    differences: Any

    def of(self, kind: str, view: str = "global") -> Part:
        """The effects on a kind of thing in a view."""
        return next(part for part in self.parts if (part.kind, part.view) == (kind, view))


def measure(
    harvest: Harvest,
    conditions: Conditions,
    weights: Array,
    settings: AuditSettings,
    sample_size: int,
    min_rows: int,
    progress: bool = True,
) -> Effects:
    """The effects in a harvest, in a pass over its shards, one of which is in memory at a time.

    Args:
        harvest: The harvest.
        conditions: Its analysis' conditions.
        weights: `(n_rows,)`, what each pair counts. A mean is over all pairs, whatever they count: half the weights are half the effect.
        settings: Of the analysis.
        sample_size: Pairs whose differences are kept, fewer where they have more entries than `settings.max_embedded`.
        min_rows: Rows of a condition that counts.
        progress: Whether to show progress bars.
    """
    chosen_rows = sample(harvest.n_rows, sample_size, settings.seed + 5) & (weights > 0)
    sampled = []
    tallies: dict[tuple[str, str], _Tally] = {}
    spreads: dict[str, _Spread] = {}
    for place, shard in Passes(harvest, progress)("Effects", COMPLETIONS):
        sides = [conditions.things.scores(shard.chosen.freq), conditions.things.scores(shard.rejected.freq)]
        groups = conditions.of_pairs(place, shard)
        for kind in sides[0]:
            scores, shown = zip(*(side[kind] for side in sides), strict=True)
            delta = scores[0] - scores[1]
            spreads.setdefault(kind, _Spread(delta.shape[1])).add(scores)
            for view in (view for of, view in VIEWS if of == kind):
                tally = tallies.setdefault((kind, view), _Tally(groups[view].shape[1], delta.shape[1]))
                tally.add(groups[view], weights[place], delta, shown)
            if kind == "feature":
                sampled.append(delta[chosen_rows[place]])
    parts = [_part(kind, view, tallies[kind, view], spreads[kind].sd(), min_rows) for kind, view in VIEWS]
    return Effects(parts, thinned(sparse.vstack(sampled, format="csr"), settings.max_embedded, settings.seed))


def differences(harvest: Harvest, which: NDArray[np.bool_], most: int, progress: bool = True) -> list[Any]:
    """`(pairs, d_sae)` sparse each: chosen less rejected completions' frequencies of some pairs of a harvest, `(n_rows,)`, at most so many."""
    which = which.copy()
    places = np.flatnonzero(which)
    which[places] = sample(len(places), most, 0)
    found = []
    for place, shard in Passes(harvest, progress)("Pairs of a gate", COMPLETIONS):
        found.append(shard.chosen.freq[which[place]] - shard.rejected.freq[which[place]])
    return found


def _part(kind: str, view: str, tally: _Tally, sd: Array, min_rows: int) -> Part:
    large = np.flatnonzero(tally.n[:, 0] >= (min_rows if view != "global" else 1))
    n = tally.n[large]
    condition, number = np.indices((len(large), tally.delta.shape[1])).reshape(2, -1)
    delta = tally.delta[large] / n
    # where no pair differs there is still doubt, as if half a pair did by as much as completions vary
    se = np.sqrt(np.maximum(tally.square[large] / n - delta**2, 0.5 * sd**2 / n) / n)
    return Part(
        kind=kind,
        view=view,
        number=number,
        condition=np.full(len(number), -1) if view == "global" else large[condition],
        delta=(delta / sd).ravel(),
        se=(se / sd).ravel(),
        rate=(tally.rate[large] / (2 * n)).ravel(),
        sd=np.broadcast_to(sd, delta.shape).ravel(),
    )
