"""The clusterings against slow references and on planted structure."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import sparse

from shapedpo.audit.analysis import graph
from shapedpo.audit.analysis.clusters import embedded_clusters, feature_embedding, nearest, spherical_kmeans, unit
from shapedpo.audit.analysis.graph import feature_clusters, strongest_pairs
from shapedpo.audit.analysis.sampling import thinned
from shapedpo.audit.analysis.settings import AuditSettings


def together(n: int, sizes: list[int], draw, active=0.2, on=0.8, loners=0):
    """Firing of groups of features, each of which fires with probability `on` where its group is active; and each one's group."""
    of = np.repeat(np.arange(len(sizes)), sizes)
    groups = draw.random((n, len(sizes))) < active
    chance = np.where(groups[:, of], on, 0.01)
    chance = np.concatenate([chance, np.full((n, loners), 0.2)], axis=1)
    return draw.random(chance.shape) < chance, np.concatenate([of, np.full(loners, -1)])


def mutual_information(a, b) -> float:
    """In nats, from the four joint frequencies."""
    total = 0.0
    for x, y in itertools.product((False, True), repeat=2):
        joint = np.mean((a == x) & (b == y))
        if joint > 0:
            total += joint * np.log(joint / (np.mean(a == x) * np.mean(b == y)))
    return total


def entropy(a) -> float:
    return mutual_information(a, a)


@pytest.mark.parametrize(("block", "frequent"), [(1, 0.18), (300, 1.0), (10**6, 0.0), (10**6, 0.18)])
def test_strongest_pairs_are_those_of_highest_normalised_mutual_information(block, frequent, monkeypatch) -> None:
    monkeypatch.setattr(graph, "_BLOCK", block)
    monkeypatch.setattr(graph, "_FREQUENT", frequent)  # the share of features whose joint counts are dense products
    draw = np.random.default_rng(0)
    firing, _ = together(400, [4, 3, 2], draw, loners=10)
    firing = np.concatenate([firing, np.zeros((400, 2), bool), np.ones((400, 1), bool), ~firing[:, :1]], axis=1)
    firing = firing[:, draw.permutation(firing.shape[1])]
    settings = AuditSettings(min_firing=10, edge_share=0.1, edge_p=1e-3)

    eligible = [g for g in range(firing.shape[1]) if 10 <= firing[:, g].sum() <= 390]
    slow = {}
    for g, h in itertools.combinations(eligible, 2):
        a, b = firing[:, g], firing[:, h]
        information = mutual_information(a, b)
        if np.mean(a & b) > a.mean() * b.mean() and 2 * 400 * information > 10.83:  # chi-squared of p 0.001
            slow[g, h] = information / (entropy(a) * entropy(b)) ** 0.5
    keep = round(0.1 * len(eligible) * (len(eligible) - 1) / 2)
    expected = sorted(sorted(slow, key=slow.__getitem__)[-keep:])

    pairs = strongest_pairs(sparse.csr_matrix(firing), settings)
    assert list(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)) == expected
    np.testing.assert_allclose(pairs.weight, [slow[pair] for pair in expected], rtol=1e-5)


def test_features_that_fire_together_are_a_cluster() -> None:
    firing, group = together(2000, [12, 9, 6, 3], np.random.default_rng(0), loners=30)
    settings = AuditSettings(edge_share=0.2, min_cluster_features=4)
    clusters = feature_clusters(sparse.csr_matrix(firing), settings)
    for number in (0, 1, 2):  # by size; the group of three is too small
        assert np.flatnonzero(clusters == number).tolist() == np.flatnonzero(group == number).tolist()
    assert (clusters[group == 3] == -1).all()
    assert (clusters[group == -1] == -1).all()
    # the same for the rows in another order
    shuffled = firing[np.random.default_rng(1).permutation(2000)]
    np.testing.assert_array_equal(feature_clusters(sparse.csr_matrix(shuffled), settings), clusters)


@pytest.mark.parametrize("power", [1, 2])
def test_a_sample_is_as_large_as_what_its_rows_cost_allows(power) -> None:
    values = sparse.csr_matrix(np.random.default_rng(0).random((500, 40)) < 0.25)
    assert thinned(values, 1e9, 0, power) is values
    some = thinned(values, 2_000, 0, power)
    cost = (np.asarray(some.sum(axis=1)).ravel() ** power / power).sum()
    assert 1_800 < cost <= 2_000
    assert thinned(values, 1, 0, power).shape == (1, 40)


def test_features_that_have_nothing_in_common_are_no_cluster() -> None:
    firing = np.random.default_rng(0).random((2000, 80)) < 0.1
    clusters = feature_clusters(sparse.csr_matrix(firing), AuditSettings(min_cluster_features=2))
    assert (clusters == -1).all()


def test_no_feature_fires() -> None:
    assert feature_clusters(sparse.csr_matrix((50, 7), dtype=bool), AuditSettings()).tolist() == [-1] * 7


def test_spherical_kmeans_finds_directions_and_ends_where_lloyds_steps_end() -> None:
    draw = np.random.default_rng(0)
    truth = draw.integers(5, size=1000)
    directions = unit(draw.normal(size=(5, 20)))
    x = unit(directions[truth] + 0.1 * draw.normal(size=(1000, 20)))
    centroids = spherical_kmeans(x, 5, seed=0)
    labels, cosine = nearest(x, centroids)
    assert len({(a, b) for a, b in zip(truth, labels, strict=True)}) == 5
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, rtol=1e-5)
    for k in range(5):  # a step more, in float64, moves nothing
        total = x[labels == k].astype(np.float64).sum(axis=0)
        np.testing.assert_allclose(centroids[k], total / np.linalg.norm(total), atol=1e-5)
    np.testing.assert_allclose(cosine, (x.astype(np.float64) @ centroids.T).max(axis=1), atol=1e-6)
    np.testing.assert_array_equal(spherical_kmeans(x, 5, seed=0), centroids)


def test_spherical_kmeans_of_fewer_directions_than_clusters() -> None:
    x = unit(np.repeat(np.eye(3), 10, axis=0))
    assert len(spherical_kmeans(x, 8, seed=0)) == 3


def test_embedding_is_the_svd_of_standardised_columns() -> None:
    draw = np.random.default_rng(0)
    groups = draw.normal(size=(500, 4))
    x = np.where(draw.random((500, 40)) < 0.4, groups[:, np.arange(40) % 4] + 3 + 0.3 * draw.normal(size=(500, 40)), 0)
    x[:, 7] = 2.0  # a constant
    standardised = (x - x.mean(axis=0)) / np.where(x.std(axis=0) > 0, x.std(axis=0), 1)
    _, values, right = np.linalg.svd(standardised, full_matrices=False)
    slow = (right[:30] * values[:30, None]).T
    slow /= np.where(np.linalg.norm(slow, axis=1, keepdims=True) > 1e-9, np.linalg.norm(slow, axis=1, keepdims=True), 1)
    fast = feature_embedding(sparse.csr_matrix(x.astype(np.float32)), 30, seed=0)
    np.testing.assert_allclose(fast @ fast.T, slow @ slow.T, atol=2e-2)  # up to rotation
    assert (fast[7] == 0).all()


def test_features_of_a_kind_are_embedded_together() -> None:
    firing, group = together(1500, [10, 10, 10, 10], np.random.default_rng(0), active=0.3)
    clusters = embedded_clusters(sparse.csr_matrix(firing.astype(np.float32)), 4, 8, seed=0)
    assert len(set(zip(group.tolist(), clusters.tolist(), strict=True))) == 4
    assert embedded_clusters(sparse.csr_matrix((20, 0), dtype=np.float32), 4, 8, seed=0).shape == (0,)
    assert (embedded_clusters(sparse.csr_matrix(np.ones((20, 3), np.float32)), 4, 8, seed=0) == -1).all()
