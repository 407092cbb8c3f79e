"""Where clusters lie on a map, how many rows they have, which way they lean, and which rows show them best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from ..harvesting.store import Harvest, Shard
from .clusters import unit
from .hypotheses import Analysis
from .views import FeatureView, PromptView, numbered, on, pooled


Float = NDArray[np.float32]

EXEMPLARS = 25
_SHARDS, _ROWS = 16, 512  # that are read, and rows of each: all of it is in memory
_EMBEDDED = 50  # dimensions that t-SNE starts from


@dataclass(frozen=True)
class ClusterMap:
    """The clusters of one kind.

    Attributes:
        place: `(n, 2)`, in [-1, 1]. Clusters that are near each other are about the same rows.
        rows: `(n,)`, number of rows that show the cluster; from a sample of them, except for data clusters.
        lean: `(n,)`, mean response score over its standard deviation, above 0 where chosen has more; NaN for a condition.
        exemplars: Row numbers that show it best.
    """

    place: Float
    rows: NDArray[np.int64]
    lean: Float
    exemplars: list[list[int]]


def cluster_maps(analysis: Analysis, harvest: Harvest) -> dict[str, ClusterMap]:
    """Maps of the clusters of each kind: `feature`, `response`, `prompt` and `data`; single features have no place. A sample of shards is read.

    Args:
        analysis: The analysis.
        harvest: What it was made of.
    """
    sample = _Sample(analysis, harvest)
    share = analysis.n_rows / max(1, len(sample.rows))
    maps = {}
    for kind in sample.shown:
        shown, signed = sample.shown[kind], sample.signed.get(kind)
        lean = np.full(shown.shape[1], np.nan, np.float32) if signed is None else _over_sd(signed)
        # much of a single feature is no sign of what one side shows and the other does not
        best = signed * np.sign(lean) if kind == "single" and signed is not None else shown
        maps[kind] = ClusterMap(
            place=np.zeros((shown.shape[1], 2), np.float32)
            if kind == "single"
            else layout(unit((shown - shown.mean(axis=0)).T), analysis.settings.seed),
            rows=np.rint((shown > 0).sum(axis=0) * share).astype(np.int64),
            lean=lean,
            exemplars=[sample.rows[_top(column)].tolist() for column in best.T],
        )
    k = int(analysis.data_clusters.max(initial=-1)) + 1
    labels = analysis.data_clusters[np.searchsorted(analysis.rows, sample.rows)]
    inside = np.flatnonzero(labels >= 0)
    members = sparse.csr_matrix((np.ones(len(inside), np.float32), (labels[inside], inside)), shape=(k, len(labels)))
    maps["data"] = ClusterMap(
        place=layout(unit(members @ unit(sample.shown["feature"])), analysis.settings.seed),
        rows=np.bincount(analysis.data_clusters[analysis.data_clusters >= 0], minlength=k),
        lean=np.full(k, np.nan, np.float32),
        exemplars=[analysis.exemplars(number, EXEMPLARS).tolist() for number in range(k)],
    )
    return maps


class _Sample:
    """What sampled rows show of each cluster, `shown` `(n, clusters)`, and their response scores, `signed`."""

    def __init__(self, analysis: Analysis, harvest: Harvest) -> None:
        groups = {"single": [], **analysis.clusters}  # an older analysis has none
        clusters = {kind: numbered(of, harvest.d_sae) for kind, of in groups.items()}
        indices = np.unique(np.linspace(0, harvest.n_shards - 1, min(_SHARDS, harvest.n_shards)).astype(int))
        shards = [_head(shard) for shard in harvest.shards(("freq",), indices=[int(index) for index in indices])]
        self.rows = np.concatenate([shard.rows for shard in shards])
        features, singles = (
            FeatureView(clusters[kind], np.zeros((0, 0), np.float32), 0.0, analysis.settings.tau)
            for kind in ("feature", "single")
        )
        deltas = sparse.vstack([shard.chosen.freq - shard.rejected.freq for shard in shards], format="csr")
        mean = np.asarray(deltas.mean(axis=0)).ravel()
        square = np.asarray(deltas.multiply(deltas).mean(axis=0)).ravel()
        prompts = PromptView(clusters["prompt"], clusters["response"], np.sqrt(np.maximum(square - mean**2, 0)))
        shown: dict[str, Callable[[Shard], Float]] = {
            "feature": features.activity,
            "prompt": prompts.expression,
            "response": partial(_active, clusters["response"]),
            "single": singles.activity,
        }
        signed = {"feature": features.disparity, "response": prompts.movement, "single": singles.disparity}
        self.shown: dict[str, Float] = {k: np.concatenate([f(s) for s in shards]) for k, f in shown.items()}
        self.signed: dict[str, Float] = {k: np.concatenate([f(s) for s in shards]) for k, f in signed.items()}


def _active(clusters: NDArray[np.int32], shard: Shard) -> Float:
    """`(n, clusters)`: the share of a cluster's features that fire, of both completions together."""
    chosen, rejected = (pooled(on(span.freq, 0), clusters, mean=True) for span in (shard.chosen, shard.rejected))
    return chosen + rejected


def _head(shard: Shard) -> Shard:
    """Its first rows."""
    few = (span._replace(freq=span.freq[:_ROWS], tokens=span.tokens[:_ROWS]) for span in shard[1:])
    return Shard(shard.rows[:_ROWS], *few)


def _over_sd(values: Float) -> Float:
    sd = values.std(axis=0)
    return (values.mean(axis=0) / np.where(sd > 0, sd, 1)).astype(np.float32)


def _top(values: Float) -> NDArray[np.int64]:
    best = np.argsort(-values, kind="stable")[:EXEMPLARS]
    return best[values[best] > 0]


def layout(directions: Float, seed: int) -> Float:
    """Places of some directions in the plane, neighbours near each other: t-SNE from their principal components.

    Args:
        directions: `(n, m)`, of unit norm; rows of zeros are all right.
        seed: Of t-SNE.

    Returns:
        `(n, 2)` float32 in [-1, 1].
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    n, m = directions.shape
    if n < 2 or m == 0:
        return np.zeros((n, 2), np.float32)
    places = PCA(min(n, m, _EMBEDDED), random_state=seed).fit_transform(directions)
    places = np.pad(places, ((0, 0), (0, max(0, 2 - places.shape[1]))))
    if n > 8:
        perplexity = min(30.0, (n - 1) / 4)
        places = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(places)
    places = places[:, :2] - places[:, :2].mean(axis=0)
    reach = np.abs(places).max(axis=0)
    return (places / np.where(reach > 0, reach, 1)).astype(np.float32)
