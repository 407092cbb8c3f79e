"""Many noisy effects, most of them small: how large each one probably is."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


Array = NDArray[np.float64]

_FITTED = 20_000  # effects that the prior is fitted to
_STEPS = 200  # of expectation maximisation


def shrunk(effects: ArrayLike, se: ArrayLike, seed: int = 0) -> tuple[Array, Array]:
    r"""Posterior mean and standard deviation of effects that are 0 for most things and large for a few.

    Adaptive shrinkage (Stephens 2017): the true effects are drawn from a mixture of normal distributions around 0 whose widths are a grid,
    from none to the largest effect's, and whose weights are fitted to the effects themselves by maximum likelihood. What few rows
    tell is drawn in to 0, what many tell stays.

    Args:
        effects: `(n,)`.
        se: `(n,)` their standard errors, above 0.
        seed: Decides which effects the prior is fitted to, where there are very many.

    Returns:
        `(n,)` each.
    """
    x, s = np.asarray(effects, np.float64), np.asarray(se, np.float64)
    if not len(x):
        return x.copy(), s.copy()
    largest = 2 * np.sqrt(max(float((x**2 - s**2).max()), float(s.min()) ** 2))
    least = max(float(s.min()) / 10, largest / 2**10)
    variances = (
        np.append(0.0, np.geomspace(least, largest, max(2, 1 + int(np.ceil(2 * np.log2(largest / least)))))) ** 2
    )
    some = np.random.default_rng(seed).permutation(len(x))[:_FITTED]
    likelihood = np.exp(_log_likelihood(x[some], s[some], variances))
    weights = np.full(len(variances), 1 / len(variances))
    for _ in range(_STEPS):
        share = likelihood * weights
        weights = (share / share.sum(axis=1, keepdims=True)).mean(axis=0)
    posterior = np.exp(_log_likelihood(x, s, variances)) * weights  # (n, components)
    posterior /= posterior.sum(axis=1, keepdims=True)
    kept = variances / (variances + s[:, None] ** 2)
    mean = (posterior * kept).sum(axis=1) * x
    square = (posterior * (kept * s[:, None] ** 2 + (kept * x[:, None]) ** 2)).sum(axis=1)
    return mean, np.sqrt(np.maximum(square - mean**2, 0))


def _log_likelihood(x: Array, s: Array, variances: Array) -> Array:
    """`(n, components)`, up to what they share."""
    total = variances + s[:, None] ** 2
    log = -0.5 * (np.log(total) + x[:, None] ** 2 / total)
    return log - log.max(axis=1, keepdims=True)
