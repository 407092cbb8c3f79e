"""The statistics against scipy and against loops."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse, stats

from shapedpo.audit.analysis.leading import Leading, Responsible, beyond_chance
from shapedpo.audit.analysis.statistics import LARGEST, Moments, corrected


def streamed(rows, groups, scores, parts=5):
    """Moments of everything, added a part at a time."""
    moments = Moments(groups.shape[1], scores.shape[1])
    for part in np.array_split(np.arange(len(rows)), parts):
        moments.add(rows[part], sparse.csr_matrix(groups[part].astype(float)), scores[part])
    return moments


@pytest.fixture
def data():
    draw = np.random.default_rng(0)
    groups = draw.random((300, 4)) < [0.3, 0.1, 0.5, 0.02]  # they overlap
    scores = draw.normal(size=(300, 6)) * draw.uniform(0.01, 10, 6) + draw.normal(size=6) + groups[:, :1] * 0.5
    return np.sort(draw.choice(1000, 300, replace=False)), groups, scores


def test_comparison_is_scipys_welch_test_and_the_textbooks_effect(data) -> None:
    rows, groups, scores = data
    found = streamed(rows, groups, scores).compare()
    for g in range(groups.shape[1]):
        for m in range(scores.shape[1]):
            a, b = scores[groups[:, g], m], scores[~groups[:, g], m]
            welch = stats.ttest_ind(a, b, equal_var=False)
            np.testing.assert_allclose(found.z[g, m], welch.statistic, rtol=1e-9)
            np.testing.assert_allclose(found.p[g, m], welch.pvalue, rtol=1e-7)
            pooled = ((len(a) - 1) * a.var(ddof=1) + (len(b) - 1) * b.var(ddof=1)) / (len(a) + len(b) - 2)
            expected = (a.mean() - b.mean()) / pooled**0.5
            np.testing.assert_allclose(found.d[g, m], expected, rtol=1e-9)
            np.testing.assert_allclose(found.mean_in[g, m] - found.mean_out[g, m], found.delta[g, m], rtol=1e-12)
            np.testing.assert_allclose(found.delta[g, m], a.mean() - b.mean(), rtol=1e-9)
            assert (found.n_in[g, 0], found.n_out[g, 0]) == (len(a), len(b))


def test_halves_are_rows_of_even_and_odd_number(data) -> None:
    rows, groups, scores = data
    found = streamed(rows, groups, scores).compare()
    halves = np.zeros_like(found.halves)
    for half in (0, 1):
        for g in range(groups.shape[1]):
            inside, outside = [], []
            for row, member, score in zip(rows, groups[:, g], scores, strict=True):
                if row % 2 == half:
                    (inside if member else outside).append(score)
            halves[half, g] = np.mean(inside, axis=0) - np.mean(outside, axis=0)
    np.testing.assert_allclose(found.halves, halves, rtol=1e-9)
    agree = np.sign(halves[0]) == np.sign(halves[1])
    assert 0 < agree.sum() < agree.size
    np.testing.assert_allclose(found.strength, np.where(agree, np.abs(halves).min(axis=0), 0), rtol=1e-9)


def test_all_rows_against_zero_is_scipys_one_sample_test(data) -> None:
    rows, groups, scores = data
    found = streamed(rows, groups, scores).overall()
    expected = stats.ttest_1samp(scores, 0)
    np.testing.assert_allclose(found.z[0], expected.statistic, rtol=1e-9)
    np.testing.assert_allclose(found.p[0], expected.pvalue, rtol=1e-7)
    np.testing.assert_allclose(found.d[0], scores.mean(axis=0) / scores.std(axis=0, ddof=1), rtol=1e-9)
    for half in (0, 1):
        np.testing.assert_allclose(found.halves[half, 0], scores[rows % 2 == half].mean(axis=0), rtol=1e-9)


def test_scores_that_do_not_vary_and_groups_that_are_too_small() -> None:
    rows = np.arange(20)
    groups = np.zeros((20, 3), bool)
    groups[:6, 0], groups[0, 1] = True, True  # the second has one row, the third none
    scores = np.stack([groups[:, 0], np.full(20, 0.1), np.zeros(20)], axis=1)
    found = streamed(rows, groups, scores).compare()
    assert (found.z[0, 0], found.d[0, 0], found.p[0, 0]) == (LARGEST, LARGEST, 0)  # a perfect separation
    np.testing.assert_allclose(found.z[0, 1:], 0, atol=1e-6)
    np.testing.assert_allclose(found.p[0, 1:], 1)
    assert np.isnan(found.p[1:]).all()
    assert (found.strength[2] == 0).all()


def test_correction_is_scipys_over_what_was_tested() -> None:
    p = np.random.default_rng(0).random((5, 7)) ** 3
    p[1, 2] = p[4] = np.nan
    tested = np.isfinite(p)
    q = corrected(p)
    np.testing.assert_allclose(q[tested], stats.false_discovery_control(p[tested]))
    assert np.isnan(q[~tested]).all()
    # Benjamini and Hochberg (1995), step by step
    order = sorted(p[tested])
    slow = [min(len(order) * later / (k + 1) for k, later in enumerate(order) if k >= i) for i in range(len(order))]
    np.testing.assert_allclose(sorted(q[tested]), np.minimum(slow, 1))
    assert np.isnan(corrected(np.full((2, 2), np.nan))).all()


def test_hypotheses_without_effect_are_discovered_as_rarely_as_q_says() -> None:
    draw = np.random.default_rng(0)
    discoveries = 0
    for _ in range(200):
        groups = draw.random((400, 5)) < 0.1
        # mostly zero, -1 or 1: what the disparity of a rare feature looks like
        scores = draw.choice([-1.0, 0, 1], p=[0.02, 0.96, 0.02], size=(400, 20))
        discoveries += (corrected(streamed(np.arange(400), groups, scores, 1).compare().p) < 0.05).any()
    assert discoveries <= 200 * 0.05 + 3 * (200 * 0.05 * 0.95) ** 0.5


# --- rows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [7, 64, 500])
def test_leading_rows_are_those_of_highest_score_whatever_the_parts(part) -> None:
    draw = np.random.default_rng(0)
    rows, scores, luck = np.arange(500) * 3, draw.integers(0, 6, (500, 4)) / 5, draw.random(500)
    scores[:, 3] = 0
    scores[:2, 3] = 1
    leading = Leading(4, 20)
    for start in range(0, 500, part):
        which = slice(start, start + part)
        leading.add(rows[which], scores[which], luck[which])
    members = leading.members(rows).toarray()
    for column in range(4):
        best = sorted(range(500), key=lambda i: (-scores[i, column], -luck[i]))[:20]
        expected = {i for i in best if scores[i, column] > 0}
        assert set(np.flatnonzero(members[:, column])) == expected
    np.testing.assert_array_equal(leading.members(rows[100:200]).toarray(), members[100:200])


def test_responsible_rows_are_the_largest_of_each_hypothesis() -> None:
    draw = np.random.default_rng(0)
    scores = np.round(draw.normal(size=(300, 5)), 1).astype(np.float32)
    most = Responsible(6, 12)  # nothing is ever added to the last
    most.bound = 50  # so that it cuts on the way
    for start in range(0, 300, 13):
        which = slice(start, start + 13)
        most.add(np.arange(5)[::-1], np.arange(300)[which], scores[which, ::-1])
    *found, (none, _) = most.each()
    for number, (rows, values) in enumerate(found):
        expected = sorted(range(300), key=lambda i: (-abs(scores[i, number]), i))[:12]
        assert rows.tolist() == expected
        np.testing.assert_array_equal(values, scores[expected, number])
    assert len(none) == 0


def test_rows_beyond_chance_are_mostly_so() -> None:
    draw = np.random.default_rng(0)
    share, found = [], []
    for _ in range(50):
        noise, signal = draw.normal(size=2000), draw.normal(3, 0.5, size=100)
        n = beyond_chance(np.concatenate([noise, signal]), 0.1)
        named = np.argsort(-np.concatenate([noise, signal]))[:n]
        found.append((named >= 2000).sum() / 100)
        share.append((named < 2000).sum() / max(n, 1))
    assert np.mean(share) < 0.12
    assert np.mean(found) > 0.6
    assert beyond_chance(np.array([1.0, 2, 3]), 0.1) == 0  # of three rows, one may be chance
    assert beyond_chance(np.ones(10), 0.1) == 10
    assert beyond_chance(np.zeros(0), 0.1) == 0
