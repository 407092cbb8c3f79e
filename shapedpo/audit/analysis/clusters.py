"""Clusters of rows by what is active in them, and of features by where they are."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import sparse


Float = NDArray[np.float32]

_CHUNK = 16_384  # rows
_INITIAL = 32_768  # rows that the first centroids are chosen from


def unit(x: NDArray[np.floating]) -> Float:
    """Rows scaled to norm 1; rows of zeros stay."""
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    return (x / np.where(norm > 0, norm, 1)).astype(np.float32)


def nearest(x: Float, centroids: Float) -> tuple[NDArray[np.int32], Float]:
    """Of each row of `x` the centroid of highest cosine, and the cosine; `x` and centroids have unit norm."""
    labels, cosine = np.empty(len(x), np.int32), np.empty(len(x), np.float32)
    for start in range(0, len(x), _CHUNK):
        part = slice(start, start + _CHUNK)
        similar = x[part] @ centroids.T
        labels[part] = similar.argmax(axis=1)
        cosine[part] = similar.max(axis=1)
    return labels, cosine


def spherical_kmeans(x: Float, k: int, seed: int, iterations: int = 30) -> Float:
    """Spherical k-means: clusters of directions, each centroid the unit vector of its members' sum (Dhillon and Modha, 2001).

    scikit-learn has no spherical k-means; its k-means++ chooses the first centroids.

    Args:
        x: `(n, m)` float32, rows of unit norm.
        k: Number of clusters; fewer come back where there are fewer distinct rows.
        seed: Of the initialisation.
        iterations: At most these; it stops when hardly a row (one in 10,000) moves.

    Returns:
        `(k, m)` float32 centroids of unit norm.
    """
    from sklearn.cluster import kmeans_plusplus

    draw = np.random.RandomState(seed)
    some = x if len(x) <= _INITIAL else x[np.sort(draw.choice(len(x), _INITIAL, replace=False))]
    k = min(k, len(np.unique(some, axis=0)))
    centroids, _ = kmeans_plusplus(some, k, random_state=draw)
    labels = np.full(len(x), -1, np.int32)
    for _ in range(iterations):
        before, (labels, cosine) = labels, nearest(x, unit(centroids))
        members = sparse.csr_matrix((np.ones(len(x), np.float32), (labels, np.arange(len(x)))), shape=(k, len(x)))
        centroids = members @ x
        empty = np.flatnonzero(np.bincount(labels, minlength=k) == 0)
        if len(empty):  # they start again from the rows that fit their own cluster least
            centroids[empty] = x[np.argsort(cosine, kind="stable")[: len(empty)]]
        elif (labels != before).mean() < 1e-4:
            break
    return unit(centroids)


def feature_embedding(x: sparse.csr_matrix, dims: int, seed: int) -> Float:
    """Where features are, as directions: the columns of `x`, standardised, by a randomised SVD, scaled to unit norm.

    The columns' means are taken off implicitly, so that `x` stays sparse (Halko, Martinsson and Tropp, 2011, with four power
    iterations).

    Args:
        x: `(n, F)` float32 of n sampled rows.
        dims: Number of components; fewer where `x` has fewer rows or columns.
        seed: Of the random projection.

    Returns:
        `(F, dims)` float32; zeros for a column that is constant.
    """
    n, f = x.shape
    dims = min(dims, n, f)
    mean = np.bincount(x.indices, x.data, f) / n
    square = np.bincount(x.indices, np.square(x.data, dtype=np.float64), f) / n
    variance = square - mean**2
    varies = variance > 1e-9 * square  # else it is rounding
    scale = np.where(varies, 1 / np.sqrt(np.where(varies, variance, 1)), 0).astype(np.float32)
    shift = (mean * scale).astype(np.float32)
    of_feature = x.T.tocsr()

    def forward(
        v: Float,
    ) -> Float:  # (F, r) -> (n, r); by columns, as the sums of n rows stay in the cache where the F rows of v do not
        return of_feature.T @ (v * scale[:, None]) - (shift @ v)[None, :]

    def backward(v: Float) -> Float:  # (n, r) -> (F, r)
        return (of_feature @ v) * scale[:, None] - shift[:, None] * v.sum(axis=0)[None, :]

    draw = np.random.default_rng(seed)
    basis = forward(draw.standard_normal((f, min(dims + 10, n, f)), dtype=np.float32))
    for _ in range(4):
        basis, _ = np.linalg.qr(basis)
        basis, _ = np.linalg.qr(backward(basis))
        basis = forward(basis)
    basis, _ = np.linalg.qr(basis)
    _, values, right = np.linalg.svd(backward(basis).T, full_matrices=False)
    return unit(np.where(varies[:, None], (right[:dims] * values[:dims, None]).T, 0))


def embedded_clusters(x: sparse.csr_matrix, k: int, dims: int, seed: int) -> NDArray[np.int32]:
    """Clusters of features by their embedding, with scikit-learn's MiniBatchKMeans.

    Args:
        x: `(n, F)`, values of the features in n sampled rows.
        k: Number of clusters; fewer where there are fewer features.
        dims: Of the embedding.
        seed: Of the embedding and of the clustering.

    Returns:
        `(F,)`: each feature's cluster; -1 for a constant one.
    """
    from sklearn.cluster import MiniBatchKMeans

    labels = np.full(x.shape[1], -1, np.int32)
    if not x.shape[1]:
        return labels
    embedding = feature_embedding(x, dims, seed)
    varies = np.flatnonzero(np.any(embedding != 0, axis=1))
    if len(varies):
        k = min(k, len(np.unique(embedding[varies], axis=0)))
        means = MiniBatchKMeans(k, random_state=seed, n_init=3, batch_size=4096).fit(embedding[varies])
        _, labels[varies] = np.unique(means.labels_, return_inverse=True)
    return labels
