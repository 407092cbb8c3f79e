"""Clusters of features that fire together: mutual information of binary firing, a graph of the strongest pairs, Leiden communities."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse, stats

from ...progress import progress_bar
from .settings import AuditSettings


_BLOCK = 8_000_000  # joint counts that each thread holds at once
_FREQUENT = 0.1  # share of the samples; below it sparse products are faster than dense ones
_THREADS = min(4, os.cpu_count() or 1)


class Pairs(NamedTuple):
    """Pairs of features.

    Attributes:
        first, second: `(E,)` int32, indices of features, `first < second`; in ascending order.
        weight: `(E,)` float32, normalised mutual information.
    """

    first: NDArray[np.int32]
    second: NDArray[np.int32]
    weight: NDArray[np.float32]

    def take(self, which: NDArray[Any]) -> Pairs:
        """Some of them."""
        return Pairs(self.first[which], self.second[which], self.weight[which])


def strongest_pairs(firing: sparse.csr_matrix, settings: AuditSettings, progress: bool = False) -> Pairs:
    r"""The pairs of features whose firing tells most of each other: \( I(g; h) / \sqrt{H_g H_h} \).

    Only features that fire, and are silent, in `min_firing` samples are eligible. Features that avoid each other have mutual
    information too; such pairs are left out, as the mean over a cluster of them would cancel. Joint counts are made blockwise, and only
    the pairs above a rising threshold are kept, so that memory goes with the number of edges.

    Args:
        firing: `(n, d_sae)`, nonzero where a feature fires in a sample.
        settings: Of it `min_firing`, `edge_share`, `max_edges`, `edge_p`.
        progress: Whether to show a bar.
    """
    n = firing.shape[0]
    often = np.bincount(firing.indices, minlength=firing.shape[1])
    eligible = np.flatnonzero((often >= settings.min_firing) & (often <= n - settings.min_firing))
    empty = Pairs(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.float32))
    if len(eligible) < 2:
        return empty
    eligible = eligible[np.argsort(-often[eligible], kind="stable")]
    count = often[eligible]
    share = count / n
    x_log_x = np.arange(n + 1) * np.log(np.maximum(np.arange(n + 1), 1))
    entropy = x_log_x[n] - x_log_x[count] - x_log_x[n - count]  # times n, nats

    # Joint counts are whole numbers below 2^24, so float32 has them exactly. The frequent features' are cheaper as dense products.
    firing = firing[:, eligible].astype(np.float32)
    firing.data[:] = 1
    of_feature = firing.T.tocsr()
    n_frequent = int((share > _FREQUENT).sum())
    frequent, rare = firing[:, :n_frequent].toarray(), firing[:, n_frequent:]

    keep = min(settings.max_edges, max(1, round(settings.edge_share * len(eligible) * (len(eligible) - 1) / 2)))
    least = stats.chi2.isf(settings.edge_p, 1) / 2  # of n times the mutual information, on which the G test is
    # n times the mutual information is no more than Pearson's X^2 (Kullback-Leibler is bounded by chi-squared), which is cheaper: where it is
    # `least`, a joint count is this scalar product, and here it may be a little less
    spread = np.sqrt(share * (1 - share))
    bound = np.stack([n * share, 0.99 * np.sqrt(least * n) * spread], axis=1).astype(np.float32)
    of_bound = np.stack([share, spread]).astype(np.float32)
    threshold, found = 0.0, [empty]

    def strong(start: int) -> Pairs:
        """Of the pairs of a block of features with those before them and each other."""
        end = min(start + step, len(eligible))
        own = of_feature[start:end]
        joint = own.toarray() @ frequent[:, :end]
        if end > n_frequent:
            joint = np.hstack([joint, (own @ rare[:, : end - n_frequent]).toarray()])
        a, b = np.nonzero(joint > bound[start:end] @ of_bound[:, :end])
        before = b < a + start
        a, b = a[before], b[before]
        both = joint[a, b].astype(np.int64)
        a += start
        a, b = np.where(eligible[a] < eligible[b], (a, b), (b, a))
        only_a, only_b = count[a] - both, count[b] - both
        shared = x_log_x[both] + x_log_x[only_a] + x_log_x[only_b] + x_log_x[n - both - only_a - only_b]
        shared -= x_log_x[n] - entropy[a] - entropy[b]
        weight = (shared / np.sqrt(entropy[a] * entropy[b])).astype(np.float32)
        which = (shared > least) & (weight >= threshold)
        return Pairs(eligible[a[which]].astype(np.int32), eligible[b[which]].astype(np.int32), weight[which])

    step = max(1, _BLOCK // len(eligible))
    starts = range(0, len(eligible), step)
    with ThreadPoolExecutor(_THREADS) as threads:  # scipy's products and numpy's arithmetic leave Python's lock alone
        blocks = threads.map(strong, starts)
        for part in progress_bar(blocks, desc="Features that fire together", total=len(starts), show=progress):
            found.append(part)
            if sum(len(part.weight) for part in found) > 2 * keep:
                threshold, found = _cut(found, keep)
    _, (pairs,) = _cut(found, keep)
    order = np.lexsort((pairs.second, pairs.first))
    return pairs.take(order)


def _cut(found: list[Pairs], keep: int) -> tuple[float, list[Pairs]]:
    """The strongest `keep`, and those that tie with the last of them, so that the order of the features does not matter."""
    pairs = Pairs(*(np.concatenate(part) for part in zip(*found, strict=True)))
    if len(pairs.weight) <= keep:
        return 0.0, [pairs]
    threshold = np.partition(pairs.weight, -keep)[-keep]
    strong = pairs.weight >= threshold
    return float(threshold), [pairs.take(strong)]


def feature_clusters(firing: sparse.csr_matrix, settings: AuditSettings, progress: bool = False) -> NDArray[np.int32]:
    """Leiden communities of the features that fire together, under the constant Potts model (Traag et al., 2011 and 2019).

    Modularity has a resolution limit that grows with the graph: over 1,000 features it gave eight communities of a hundred. Here a community
    is kept together where its pairs' mutual information is `resolution` in the mean, however large the graph.

    Args:
        firing: `(n, d_sae)`, nonzero where a feature fires in a sample.
        settings: Those of [`strongest_pairs`], and `seed`, `resolution`, `min_cluster_features`.
        progress: Whether to show a bar.

    Returns:
        `(d_sae,)`: each feature's cluster, the largest cluster first; -1 for features that are not eligible or in too small a one.
    """
    import igraph
    import leidenalg

    often = np.bincount(firing.indices, minlength=firing.shape[1])
    eligible = np.flatnonzero((often >= settings.min_firing) & (often <= firing.shape[0] - settings.min_firing))
    pairs = strongest_pairs(firing, settings, progress)
    edges = np.searchsorted(eligible, np.stack([pairs.first, pairs.second], axis=1))
    graph = igraph.Graph(n=len(eligible), edges=edges)
    partition = leidenalg.find_partition(
        graph,
        leidenalg.CPMVertexPartition,
        weights=pairs.weight.astype(float).tolist(),
        resolution_parameter=settings.resolution,
        seed=settings.seed,
    )
    clusters = np.full(firing.shape[1], -1, np.int32)
    clusters[eligible] = partition.membership
    return _by_size(clusters, settings.min_cluster_features)


def _by_size(clusters: NDArray[np.int32], least: int) -> NDArray[np.int32]:
    """Renumbered, the largest first and of equals the one with the smallest member; too small ones become -1."""
    numbers, first, size = np.unique(clusters, return_index=True, return_counts=True)
    kept = (numbers >= 0) & (size >= least)
    order = np.lexsort((first[kept], -size[kept]))
    new = np.full(clusters.max(initial=-1) + 2, -1, np.int32)  # its last entry is for -1
    new[numbers[kept][order]] = np.arange(len(order))
    return new[clusters]
