r"""The reward that preferences imply, as far as it is linear in features, and what it changes.

Of a reward \( r \), to first order in it, a policy trained on it moves the mean of a score \( s \) by the covariance of \( r \) and \( s \) over the
reference's answers to a prompt. What the data shows is a mean difference \( d \) of chosen and rejected completions; the reward that
explains it is \( \theta = (C + \rho I)^{-1} d \), with \( C \) the features' covariance within prompts and \( \rho \) a ridge (Fisher's
discriminant, regularised as Friedman 1989 does). A score then moves by its covariance with \( \theta \cdot z \): a feature of which the data says little
by itself moves with those that it goes together with, and what the reference never says does not move.

Source: ours (a first-order expansion of the KL-regularised optimum of Rafailov et al., arXiv 2305.18290).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.linalg import LinearOperator, cg

from ..harvesting.passes import Passes
from ..harvesting.shards import COMPLETIONS
from ..harvesting.store import Harvest
from .conditions import VIEWS, Conditions
from .effects import squared, summed


if TYPE_CHECKING:
    from ..rollouts.run import Rollouts

Array = NDArray[np.float64]
Key = tuple[str, str]  # kind and view

_PRIOR = 5.0  # pairs whose products vary as all do, that a condition's are eked out with


class Within:
    """How features vary and go together within prompts, from differences of two completions of a prompt.

    Args:
        differences: `(pairs, d_sae)` sparse, of frequencies.
        sd: `(d_sae,)`, what they are divided by.
    """

    def __init__(self, differences: Iterable[Any], sd: Array) -> None:
        scaled = sparse.vstack(list(differences), format="csr") @ sparse.diags(1 / (2**0.5 * sd))
        self.z = sparse.csr_matrix(scaled, dtype=np.float64)  # of variance 1 where two answers differ as any two do
        self.n = max(self.z.shape[0], 1)

    def __matmul__(self, vector: Array) -> Array:
        """`(d_sae,)`: the covariance matrix times a vector."""
        return np.asarray(self.z.T @ (self.z @ vector)) / self.n

    def solve(self, effect: Array, ridge: float) -> Array:
        """`(d_sae,)`: the reward that explains an effect, by conjugate gradients."""
        size = len(effect)
        operator = LinearOperator((size, size), matvec=lambda v: self @ v.ravel() + ridge * v.ravel(), dtype=np.float64)
        return cg(operator, effect, rtol=1e-6, maxiter=1000)[0]

    def holding(self, reward: Array, held: NDArray[np.int64]) -> Array:
        """The reward with as much of the held features' own taken off that they do not move."""
        if not len(held):
            return reward
        own = self.z[:, held]
        covariance = (own.T @ own).toarray() / self.n
        still = reward.copy()
        still[held] -= np.linalg.pinv(covariance, rcond=1e-9, hermitian=True) @ (self @ reward)[held]
        return still


def answer_pairs(rollouts: Rollouts, progress: bool = True) -> Iterator[tuple[Any, tuple[Any, Any]]]:
    """Each shard of some rollouts, and the frequencies, `(pairs, d_sae)` each, of two of the reference's answers to the same prompt."""
    for _, shard in Passes(rollouts.harvest, progress)("Answers"):
        if rollouts.both:  # a row has one of its answers, and two rows follow each other
            yield shard, (shard.rejected.freq[::2], shard.rejected.freq[1::2])
        else:
            yield shard, (shard.chosen.freq, shard.rejected.freq)


@dataclass(frozen=True)
class Change:
    """What a reward changes; arrays are `(groups, things)`, groups being conditions.

    Attributes:
        n: `(groups, 1)`, pairs of completions.
        value, se: Change of the mean score, in the score's units, and its standard error.
        rate_change, rate_se: Change of the share of completions in which it appears.
        rate: That share.
    """

    n: Array
    value: Array
    se: Array
    rate_change: Array
    rate_se: Array
    rate: Array


class _Sums:
    """Sums over pairs of the products of a reward's and a score's differences."""

    def __init__(self, groups: int, things: int) -> None:
        self.n = np.zeros((groups, 1))
        self.value, self.value_square, self.shown, self.shown_square, self.rate = np.zeros((5, groups, things))

    def add(self, members: Any, reward: Array, scores: tuple[Any, Any], shown: tuple[Any, Any]) -> None:
        half = sparse.diags(reward / 2)
        product = half @ members
        square = half @ product
        self.n += members.sum(axis=0).T
        for value, value_square, (one, other) in (
            (self.value, self.value_square, scores),
            (self.shown, self.shown_square, shown),
        ):
            difference = one - other
            value += summed(product, difference)
            value_square += summed(square, squared(difference))
        for side in shown:
            self.rate += summed(members, side) / 2

    def change(self, usual: tuple[Array, Array] | None = None) -> Change:
        """`usual`: `(things,)` each, the products' variances everywhere."""
        n, known = np.maximum(self.n, 1), self.variances()
        if usual is not None:
            value, rate = (
                (self.n * own + _PRIOR * of_all) / (self.n + _PRIOR) for own, of_all in zip(known, usual, strict=True)
            )
            known = value, rate
        se, rate_se = (np.sqrt(variance / n) for variance in known)
        return Change(self.n, self.value / n, se, self.shown / n, rate_se, self.rate / n)

    def variances(self) -> tuple[Array, Array]:
        n = np.maximum(self.n, 1)
        return (
            np.maximum(self.value_square / n - (self.value / n) ** 2, 0),
            np.maximum(self.shown_square / n - (self.shown / n) ** 2, 0),
        )


def changes(
    reward: Array,
    harvest: Harvest,
    conditions: Conditions,
    counting: NDArray[np.bool_],
    answers: Rollouts | None,
    progress: bool = True,
    gated: tuple[NDArray[np.bool_], Array] | None = None,
) -> tuple[Mapping[Key, Change], Mapping[Key, Change]]:
    """What a reward changes, everywhere and under conditions.

    Args:
        reward: `(d_sae,)`, of a frequency of 1.
        harvest: The data, whose pairs are completions of the same prompt too.
        conditions: What is scored, and where.
        counting: `(n_rows,)`, which pairs are there at all.
        answers: Answers of the reference.
        progress: Whether to show progress bars.
        gated: `(n_rows,)`, pairs that another reward is of, and that reward; of answers it is not known which they are.

    Returns:
        What the reference would change by, and what all completions at hand say, which are more for a condition: by kind and view each. The same
        thing where there are no answers.
    """
    everything, own = _Collected(), _Collected()
    if answers is not None:
        for shard, pair in answer_pairs(answers, progress):
            groups = conditions.of_answers(shard)
            groups = {view: members[::2] if answers.both else members for view, members in groups.items()}
            for collected in (everything, own):
                collected.add(pair[0] @ reward - pair[1] @ reward, conditions, groups, pair)
    for place, shard in Passes(harvest, progress)("Predicting", COMPLETIONS):
        kept = sparse.diags(counting[place].astype(float))
        groups = {view: kept @ members for view, members in conditions.of_pairs(place, shard).items()}
        pair = shard.chosen.freq, shard.rejected.freq
        difference = pair[0] @ reward - pair[1] @ reward
        if gated is not None:
            difference = np.where(gated[0][place], pair[0] @ gated[1] - pair[1] @ gated[1], difference)
        everything.add(difference, conditions, groups, pair)
    found = everything.changes()
    return (own.changes() if answers is not None else found), found


class _Collected:
    def __init__(self) -> None:
        self.sums: dict[Key, _Sums] = {}

    def add(self, difference: Array, conditions: Conditions, groups: Mapping[str, Any], pair: tuple[Any, Any]) -> None:
        """Add pairs of completions; `difference`, `(n,)`, is that of their rewards."""
        sides = [conditions.things.scores(freq) for freq in pair]
        for kind, view in VIEWS:
            if view in groups:
                (score, shown), (other, appeared) = (side[kind] for side in sides)
                sums = self.sums.setdefault((kind, view), _Sums(groups[view].shape[1], score.shape[1]))
                sums.add(groups[view], difference, (score, other), (shown, appeared))

    def changes(self) -> dict[Key, Change]:
        usual = {kind: sums.variances() for (kind, view), sums in self.sums.items() if view == "global"}
        return {
            (kind, view): sums.change() if view == "global" else sums.change(usual[kind])
            for (kind, view), sums in self.sums.items()
        }
