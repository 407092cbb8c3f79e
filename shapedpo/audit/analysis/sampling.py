"""Random samples of rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import sparse


def sample(n: int, size: int, seed: int) -> NDArray[np.bool_]:
    """`(n,)`: which of n rows are among a random `size`; all where there are no more."""
    chosen = np.zeros(n, bool)
    chosen[np.random.default_rng(seed).permutation(n)[:size]] = True
    return chosen


def thinned(values: sparse.csr_matrix, most: float, seed: int, power: int = 1) -> sparse.csr_matrix:
    """As many rows, at random, as cost no more than `most` together, and one at least; all where they do.

    Args:
        values: `(n, d_sae)`.
        most: What they may cost.
        seed: Decides which are taken.
        power: A row costs its number of entries to this power, over the power: 1 counts entries, 2 pairs of entries.
    """
    cost = np.diff(values.indptr).astype(float) ** power / power
    order = np.random.default_rng(seed).permutation(len(cost))
    n = int(np.searchsorted(np.cumsum(cost[order]), most, side="right"))
    return values if n == len(cost) else values[np.sort(order[: max(1, n)])]
