"""The scores that the two views compare: what is active in a pair, what its sides differ in, what its prompt expresses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from ..harvesting.store import Shard
from .clusters import unit


Float = NDArray[np.float32]


def difference(shard: Shard, tau: float, which: NDArray[np.bool_] | slice = slice(None)) -> sparse.csr_matrix:
    """`(n, d_sae)`: 1 where a feature is on in the chosen completion only, -1 in the rejected one only; of some pairs of a shard."""
    return on(shard.chosen.freq[which], tau) - on(shard.rejected.freq[which], tau)


def pooled(
    values: sparse.csr_matrix,
    clusters: NDArray[np.int32],
    weights: NDArray[np.floating] | float = 1.0,
    mean: bool = False,
) -> Float:
    """`(n, clusters)`: sums of features' values, `(n, d_sae)`, over clusters.

    Args:
        values: The values.
        clusters: `(d_sae,)`, each feature's cluster; -1 for features of none.
        weights: `(d_sae,)`, what each feature's values are multiplied by.
        mean: Whether to divide the weights by the cluster's size.
    """
    of_cluster = sizes(clusters)
    n = len(of_cluster)
    factor = np.broadcast_to(np.asarray(weights, np.float64), clusters.shape)
    if mean:
        factor = factor / np.append(of_cluster, 1)[clusters]
    # each value moves to its cluster's column, those of no cluster to one more, and what meets there adds up: half the time of a product
    column = np.where(clusters >= 0, clusters, n)[values.indices]
    weighted = values.data * factor.astype(np.float32)[values.indices]
    return sparse.csr_matrix((weighted, column, values.indptr), shape=(values.shape[0], n + 1)).toarray()[:, :n]


def numbered(groups: Sequence[Sequence[int]], d_sae: int) -> NDArray[np.int32]:
    """`(d_sae,)`: the number of each feature's cluster, -1 where it is in none; from the features of each cluster."""
    clusters = np.full(d_sae, -1, np.int32)
    for number, features in enumerate(groups):
        clusters[list(features)] = number
    return clusters


def sizes(clusters: NDArray[np.int32]) -> NDArray[np.int64]:
    """Number of features of each cluster."""
    return np.bincount(clusters[clusters >= 0], minlength=int(clusters.max(initial=-1)) + 1)


def one_of(labels: NDArray[np.integer], k: int) -> sparse.csr_matrix:
    """`(n, k)`: 1 at each row's label; nothing for -1."""
    inside = np.flatnonzero(labels >= 0)
    return sparse.csr_matrix((np.ones(len(inside)), (inside, labels[inside])), shape=(len(labels), k))


def on(values: sparse.csr_matrix, threshold: float) -> sparse.csr_matrix:
    """1 where a value is above a threshold."""
    above = (values.data > threshold).astype(np.float32)
    return sparse.csr_matrix((above, values.indices, values.indptr), shape=values.shape)


@dataclass(frozen=True)
class FeatureView:
    """Where in the data is a response concept rewarded?

    Attributes:
        clusters: `(d_sae,)` int32, the cluster `T_m` of each response feature, or -1.
        centroids: `(K, M)` float32, those of the data clusters, of unit norm.
        quiet: Norm of activity below which a pair is silent.
        tau: A feature is on in a span above this share of its tokens.
    """

    clusters: NDArray[np.int32]
    centroids: Float
    quiet: float
    tau: float

    def activity(self, shard: Shard) -> Float:
        """`s`, `(n, M)`: how much of each cluster a pair shows, whichever its side. Data clusters are made of it, and of it only."""
        return pooled(shard.chosen.freq, self.clusters) + pooled(shard.rejected.freq, self.clusters)

    def disparity(self, shard: Shard) -> Float:
        """`u`, `(n, M)`: by what share of a cluster's features more are on in the chosen than in the rejected completion."""
        chosen, rejected = (on(span.freq, self.tau) for span in (shard.chosen, shard.rejected))
        return pooled(chosen, self.clusters, mean=True) - pooled(rejected, self.clusters, mean=True)

    def data_clusters(self, shard: Shard) -> tuple[NDArray[np.int32], Float]:
        """Of each pair its data cluster, -1 if silent, and its cosine to the centroid."""
        activity = self.activity(shard)
        similar = unit(activity) @ self.centroids.T
        silent = np.linalg.norm(activity, axis=1) < self.quiet
        return np.where(silent, -1, similar.argmax(axis=1)).astype(np.int32), similar.max(axis=1)


@dataclass(frozen=True)
class PromptView:
    """When a prompt expresses A, what does the chosen response move toward?

    Attributes:
        prompts: `(d_sae,)` int32, the cluster `A_k` of each prompt feature, or -1.
        responses: `(d_sae,)` int32, the cluster `R_m` of each response feature, or -1.
        delta_sd: `(d_sae,)`, standard deviation of each feature's delta of frequency.
    """

    prompts: NDArray[np.int32]
    responses: NDArray[np.int32]
    delta_sd: NDArray[np.float64]

    def expression(self, shard: Shard) -> Float:
        """`(n, A)`: the share of a cluster's features that fire in the prompt."""
        return pooled(on(shard.prompt.freq, 0), self.prompts, mean=True)

    def movement(self, shard: Shard) -> Float:
        """`(n, R)`: mean standardised delta over a cluster's features.

        The deltas are divided by their standard deviation and not centred: it makes no difference to a comparison of rows, and
        leaves 0 for two sides that do not differ.
        """
        return self.moved(shard.chosen.freq) - self.moved(shard.rejected.freq)

    def moved(self, freq: sparse.csr_matrix) -> Float:
        """`(n, R)`: mean of the features' frequencies, `(n, d_sae)`, in standard deviations of their deltas."""
        return pooled(freq, self.responses, 1 / np.where(self.delta_sd > 0, self.delta_sd, 1), mean=True)
