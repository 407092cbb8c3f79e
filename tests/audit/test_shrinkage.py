"""Adaptive shrinkage against the truth it is drawn from, and against Bayes' rule by numerical integration."""

from __future__ import annotations

import numpy as np
from scipy.stats import norm

from shapedpo.audit.prediction.shrinkage import shrunk


def test_posterior_is_bayes_rule_for_a_sparse_prior() -> None:
    draw = np.random.default_rng(0)
    n = 4000
    truth = np.where(draw.random(n) < 0.1, draw.normal(0, 1, n), 0.0)
    se = draw.uniform(0.1, 0.4, n)
    x = truth + draw.normal(0, se)
    mean, sd = shrunk(x, se)
    grid = np.linspace(-5, 5, 4001)
    prior = 0.9 * norm.pdf(grid, 0, 1e-2) + 0.1 * norm.pdf(grid)
    for i in range(0, n, 331):
        posterior = prior * norm.pdf(x[i], grid, se[i])
        posterior /= posterior.sum()
        exact = posterior @ grid, np.sqrt(posterior @ grid**2 - (posterior @ grid) ** 2)
        np.testing.assert_allclose((mean[i], sd[i]), exact, atol=0.05)
    assert np.mean((mean - truth) ** 2) < 0.4 * np.mean((x - truth) ** 2)
    inside = np.abs(truth - mean) <= 1.645 * sd + 1e-9
    assert inside.mean() > 0.88


def test_one_effect_and_none() -> None:
    mean, sd = shrunk([0.5], [0.1])
    assert 0 < mean[0] <= 0.5
    assert 0 < sd[0] < 0.5
    assert len(shrunk([], [])[0]) == 0
    mean, sd = shrunk(np.zeros(5), np.full(5, 0.1))
    np.testing.assert_array_equal(mean, 0)
