"""What a prediction starts from: how chosen and rejected completions differ in every feature and cluster, everywhere and under conditions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from ..analysis.sampling import sample, thinned
from ..analysis.settings import AuditSettings
from ..harvesting.store import Harvest
from .conditions import VIEWS, Conditions, passes


Array = NDArray[np.float64]


class _Tally:
    """Sums over pairs of scores of both completions, of several groups of rows: `(groups, scores)` each, but `n`, `(groups, 1)`."""

    def __init__(self, groups: int, scores: int) -> None:
        self.n = np.zeros((groups, 1))
        self.delta, self.square, self.level, self.level_square, self.rate = np.zeros((5, groups, scores))

    def add(self, members: Any, weights: Array, scores: tuple[Any, Any], shown: tuple[Any, Any]) -> None:
        """Add pairs.

        Args:
            members: `(n, groups)` sparse, 1 where a pair is in a group.
            weights: `(n,)`.
            scores: `(n, scores)` of the chosen and of the rejected completions, both dense or both sparse.
            shown: The same of where something appears, 0 or 1.
        """
        groups = sparse.csr_matrix(members.T, dtype=np.float64)
        weighted = groups @ sparse.diags(weights)
        self.n += groups.sum(axis=1)
        chosen, rejected = scores
        for total, group, values in (
            (self.delta, weighted, chosen - rejected),
            (self.square, weighted @ sparse.diags(weights), squared(chosen - rejected)),
            (self.level, groups, chosen + rejected),
            (self.level_square, groups, squared(chosen) + squared(rejected)),
            (self.rate, groups, shown[0] + shown[1]),
        ):
            total += dense(group @ values)

    def sd(self) -> Array:
        """`(groups, scores)`, of the score over completions; 1 where it does not vary."""
        n = 2 * np.maximum(self.n, 1)
        variance = self.level_square / n - (self.level / n) ** 2
        return np.sqrt(np.where(variance > 1e-12, variance, 1.0))


def squared(values: Any) -> Any:
    """Dense or sparse as they are."""
    return values.multiply(values) if sparse.issparse(values) else np.square(values, dtype=np.float64)


def dense(values: Any) -> Any:
    """As an array."""
    return values.toarray() if sparse.issparse(values) else values


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
    for place, shard in passes(harvest, "Effects", progress):
        sides = [conditions.things.scores(shard.chosen.freq), conditions.things.scores(shard.rejected.freq)]
        groups = conditions.of_pairs(place, shard)
        for kind, view in VIEWS:
            chosen, rejected = (side[kind] for side in sides)
            tally = tallies.setdefault((kind, view), _Tally(groups[view].shape[1], chosen[0].shape[1]))
            tally.add(groups[view], weights[place], *zip(chosen, rejected, strict=True))
        sampled.append((shard.chosen.freq - shard.rejected.freq)[chosen_rows[place]])
    parts = [
        _part(kind, view, tally, tallies[kind, "global"].sd()[0], min_rows) for (kind, view), tally in tallies.items()
    ]
    return Effects(parts, thinned(sparse.vstack(sampled, format="csr"), settings.max_embedded, settings.seed))


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
