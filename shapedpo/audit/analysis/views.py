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


def membership(
    clusters: NDArray[np.int32], weights: NDArray[np.floating] | float = 1.0, mean: bool = False
) -> sparse.csr_matrix:
    """`(d_sae, clusters)` float32: each feature's weight in its own cluster; features of none (-1) have an empty row.

    A product with it sums over clusters; with `mean` the weights are divided by the cluster's size.
    """
    features = np.flatnonzero(clusters >= 0)
    values = np.broadcast_to(np.asarray(weights, np.float64), clusters.shape)[features]
    if mean:
        values = values / sizes(clusters)[clusters[features]]
    shape = (len(clusters), int(clusters.max(initial=-1)) + 1)
    return sparse.csr_matrix((values.astype(np.float32), (features, clusters[features])), shape=shape)


def numbered(groups: Sequence[Sequence[int]], d_sae: int) -> NDArray[np.int32]:
    """`(d_sae,)`: the number of each feature's cluster, -1 where it is in none; from the features of each cluster."""
    clusters = np.full(d_sae, -1, np.int32)
    for number, features in enumerate(groups):
        clusters[list(features)] = number
    return clusters


def sizes(clusters: NDArray[np.int32]) -> NDArray[np.int64]:
    """Number of features of each cluster."""
    return np.bincount(clusters[clusters >= 0], minlength=int(clusters.max(initial=-1)) + 1)


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
        members = membership(self.clusters)
        return ((shard.chosen.freq @ members) + (shard.rejected.freq @ members)).toarray()

    def disparity(self, shard: Shard) -> Float:
        """`u`, `(n, M)`: by what share of a cluster's features more are on in the chosen than in the rejected completion."""
        share = membership(self.clusters, mean=True)
        return (on(shard.chosen.freq, self.tau) @ share - on(shard.rejected.freq, self.tau) @ share).toarray()

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
        share = membership(self.prompts, mean=True)
        return (on(shard.prompt.freq, 0) @ share).toarray()

    def movement(self, shard: Shard) -> Float:
        """`(n, R)`: mean standardised delta over a cluster's features.

        The deltas are divided by their standard deviation and not centred: it makes no difference to a comparison of rows, and
        leaves 0 for two sides that do not differ.
        """
        scale = membership(self.responses, 1 / np.where(self.delta_sd > 0, self.delta_sd, 1), mean=True)
        return (shard.chosen.freq @ scale - shard.rejected.freq @ scale).toarray()
