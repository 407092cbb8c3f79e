"""What a prediction is made of: how chosen and rejected completions differ in every feature and cluster, everywhere and under conditions."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from .analysis.sampling import sample, thinned
from .analysis.settings import AuditSettings
from .conditions import VIEWS, Conditions, Things, passes
from .harvesting.store import Harvest


Array = NDArray[np.float64]

_RIDGE = 1e-3  # of a variance, where held features are solved for


@dataclass
class Tally:
    """Sums over pairs of scores of both completions, of several groups of rows; arrays are `(groups, scores)`, but `n`, `(groups, 1)`."""

    n: Array
    delta: Array
    square: Array
    level: Array
    level_square: Array
    rate: Array
    rate_delta: Array
    rate_square: Array

    @classmethod
    def empty(cls, groups: int, scores: int) -> Tally:
        return cls(np.zeros((groups, 1)), *(np.zeros((groups, scores)) for _ in range(7)))

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
        (chosen, rejected), (showing, other) = scores, shown
        for name, group, values in (
            ("delta", weighted, chosen - rejected),
            ("square", weighted @ sparse.diags(weights), _squared(chosen - rejected)),
            ("level", groups, chosen + rejected),
            ("level_square", groups, _squared(chosen) + _squared(rejected)),
            ("rate", groups, showing + other),
            ("rate_delta", weighted, showing - other),
            ("rate_square", weighted @ sparse.diags(weights), _squared(showing - other)),
        ):
            total = group @ values
            setattr(self, name, getattr(self, name) + (total.toarray() if sparse.issparse(total) else total))

    def sd(self) -> Array:
        """`(groups, scores)`, of the score over completions; 1 where it does not vary."""
        n = 2 * np.maximum(self.n, 1)
        variance = self.level_square / n - (self.level / n) ** 2
        return np.sqrt(np.where(variance > 1e-12, variance, 1.0))


def _squared(values: Any) -> Any:
    return values.multiply(values) if sparse.issparse(values) else np.square(values, dtype=np.float64)


@dataclass(frozen=True)
class Part:
    """Effects on the things of a kind in a view, `(n,)` each.

    Attributes:
        kind, view: As in [`~shapedpo.audit.prediction.Prediction`].
        number: Of each thing.
        condition: The condition's number, -1 everywhere.
        delta, se: Weighted mean over the (condition's) pairs of the score's difference, in sd of the score, and its standard error.
        rate: Share of the (condition's) completions in which it appears.
        rate_delta, rate_se: Weighted mean difference of its appearing, and its standard error.
        sd: The score's standard deviation over all completions.
        variance: The score's variance over the (condition's) completions, in these.
        held: `(n, H)`, the mean differences of the held features in the same pairs, in sd.
    """

    kind: str
    view: str
    number: NDArray[np.int64]
    condition: NDArray[np.int64]
    delta: Array
    se: Array
    rate: Array
    rate_delta: Array
    rate_se: Array
    sd: Array
    variance: Array
    held: Array


@dataclass(frozen=True)
class Effects:
    """Effects in a dataset, and how things go together in its completions.

    Attributes:
        parts: The effects.
        spread: `(things, H)` of each kind: covariance of scores in sd with the held features; and of appearing.
        among: `(H, H)`, the held features' own.
    """

    parts: list[Part]
    spread: dict[str, tuple[Array, Array]] = field(default_factory=dict)
    among: Array = field(default_factory=lambda: np.zeros((0, 0)))

    def holding(self) -> Effects:
        """The effects that are left when the held features do not move.

        What they would have done to the others, by the regression of each on the held ones over completions of the reference, is taken off.
        """
        h = len(self.among)
        if not h:
            return self
        solved = np.linalg.pinv(self.among + _RIDGE * np.eye(h))
        parts = []
        for part in self.parts:
            by_score, by_rate = (spread[part.number] @ solved for spread in self.spread[part.kind])
            parts.append(
                dataclasses.replace(
                    part,
                    delta=part.delta - (by_score * part.held).sum(axis=1),
                    rate_delta=part.rate_delta - (by_rate * part.held).sum(axis=1),
                )
            )
        return Effects(parts)


def measure(
    harvest: Harvest,
    conditions: Conditions,
    weights: Array,
    held: NDArray[np.int64],
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
        held: Features whose covariance with everything is wanted.
        settings: Of the analysis.
        sample_size: Completions it is taken from.
        min_rows: Rows of a condition that counts.
        progress: Whether to show progress bars.
    """
    things = conditions.things
    chosen_rows = sample(harvest.n_rows, max(1, sample_size // 2), settings.seed + 5) & (len(held) > 0)
    sampled = []
    tallies: dict[tuple[str, str], Tally] = {}
    for place, shard in passes(harvest, "Effects", progress):
        sides = [things.scores(shard.chosen.freq), things.scores(shard.rejected.freq)]
        groups = conditions.of_pairs(place, shard)
        for kind, view in VIEWS:
            chosen, rejected = (side[kind] for side in sides)
            tally = tallies.setdefault((kind, view), Tally.empty(groups[view].shape[1], chosen[0].shape[1]))
            tally.add(groups[view], weights[place], *zip(chosen, rejected, strict=True))
        for view in groups if len(held) else ():
            tally = tallies.setdefault(("held", view), Tally.empty(groups[view].shape[1], len(held)))
            levels = shard.chosen.freq[:, held].toarray(), shard.rejected.freq[:, held].toarray()
            tally.add(groups[view], weights[place], levels, levels)
        sampled += [span.freq[chosen_rows[place]] for span in (shard.chosen, shard.rejected)]
    everywhere = {kind: tally for (kind, view), tally in tallies.items() if view == "global"}
    parts = [
        _part(
            kind, view, tally, everywhere[kind].sd()[0], tallies.get(("held", view)), everywhere.get("held"), min_rows
        )
        for (kind, view), tally in tallies.items()
        if kind != "held"
    ]
    if not len(held):
        return Effects(parts)
    freq = thinned(sparse.vstack(sampled, format="csr"), settings.max_embedded, settings.seed)
    return Effects(parts, *_together(things, freq, held, everywhere))


def _part(
    kind: str,
    view: str,
    tally: Tally,
    sd: Array,
    held: Tally | None,
    held_everywhere: Tally | None,
    min_rows: int,
) -> Part:
    large = np.flatnonzero(tally.n[:, 0] >= (min_rows if view != "global" else 1))
    n = tally.n[large]
    condition, number = np.indices((len(large), tally.delta.shape[1])).reshape(2, -1)

    rate = tally.rate[large] / (2 * n)

    def mean(values: Array, squares: Array, variance: Array) -> tuple[Array, Array]:
        found = values[large] / n
        # where no pair differs there is still doubt, as if half a pair did by as much as completions vary
        return found, np.sqrt(np.maximum(squares[large] / n - found**2, 0.5 * variance / n) / n)

    delta, se = mean(tally.delta, tally.square, sd**2)
    rate_delta, rate_se = mean(tally.rate_delta, tally.rate_square, np.maximum(rate * (1 - rate), 0.1 / n))
    moved = np.zeros((len(large), 0))
    if held is not None and held_everywhere is not None:
        moved = held.delta[large] / n / held_everywhere.sd()[0]
    return Part(
        kind=kind,
        view=view,
        number=number,
        condition=np.full(len(number), -1) if view == "global" else large[condition],
        delta=(delta / sd).ravel(),
        se=(se / sd).ravel(),
        rate=rate.ravel(),
        rate_delta=rate_delta.ravel(),
        rate_se=rate_se.ravel(),
        sd=np.broadcast_to(sd, delta.shape).ravel(),
        variance=((tally.sd() / sd) ** 2)[large].ravel(),
        held=moved[condition],
    )


def _together(
    things: Things, freq: Any, held: NDArray[np.int64], tallies: dict[str, Tally]
) -> tuple[dict[str, tuple[Array, Array]], Array]:
    """Covariance of everything's score (in sd), and appearing, with the held features' scores, over completions; and among these."""
    z = freq[:, held].toarray().astype(np.float64)
    z = (z - z.mean(axis=0)) / tallies["held"].sd()[0]
    spread = {}
    for kind, (score, shown) in things.scores(freq).items():
        sd = tallies[kind].sd()[0][:, None]
        spread[kind] = (
            np.asarray(score.T @ z) / len(z) / sd,
            np.asarray(shown.T @ z) / len(z),
        )  # z has mean 0: no more to centre
    return spread, z.T @ z / len(z)
