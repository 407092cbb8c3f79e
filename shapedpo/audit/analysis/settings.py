"""Every constant of the two views, with the paper's default, and the rule that scales them to smaller data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any


PAPER_ROWS = 260_000
PAPER_FEATURES = 65_536


def _constant(default: Any, *, rows: int | None = None, features: int | None = None) -> Any:
    """A field; one that scales names what with, and its floor."""
    scale = {"rows": rows} if rows is not None else {"features": features} if features is not None else None
    return field(default=default, metadata={"scale": scale})


@dataclass(frozen=True, kw_only=True)
class AuditSettings:
    r"""Constants of the feature-conditioned and the prompt-conditioned view.

    The defaults are for the paper's 260,000 pairs and 65,536 features. [`AuditSettings.for_data`] scales them to smaller data by
    one rule: **a count of rows, or of clusters that rows are divided into, goes with the square root of the number of rows, a count
    of features with the square root of the number of features, and neither falls below its floor.** With the square root, clusters
    become fewer and smaller alike, so that a small dataset still has clusters, and each still has rows to test. Nothing grows beyond
    the paper's. Shares, thresholds and sizes of samples stay as they are.

    Args:
        seed: Decides which rows are sampled, and the clusterings.

        cluster_sample: Completions in which features' joint firing is counted. Two features that fire `c` times each, independently,
            have a normalised mutual information of about \( \chi^2_1 / (2 c (1 + \ln(n/c))) \), which hardly depends on the sample
            size n: with `c` of 20 and more the noise is 0.003, and a larger sample only adds rarer features.
        max_joint: Joint firings that are counted at most, which bounds the time (20 billion are some five minutes on one core): where
            completions show thousands of features, fewer of them are sampled.
        min_firing: Completions of the sample that a feature must fire in, and must not fire in, to be clustered.
        edge_share: Share of all pairs of features, those of highest normalised mutual information, that become edges. It scales so that
            the mean number of neighbours, 655 in the paper, is the count of features that the rule speaks of.
        max_edges: No more than these (the strongest), to bound Leiden's time and memory: 1 % of 65,000 features' pairs are 21M.
        edge_p: An edge's p value (a likelihood-ratio test of independence) must be below this. It matters where 1 % of the pairs is
            more than the data can tell from noise.
        resolution: Mean normalised mutual information within a cluster that Leiden asks for; higher gives more and smaller clusters.
        min_cluster_features: Features of a cluster `T_m` that is kept.

        tau: A feature is on in a span if it fires on more than this share of its tokens.
        silent_percentile: Pairs whose activity has a norm below this percentile are left out of the data clusters, as silent.
        data_clusters: K of spherical k-means.
        kmeans_sample: Rows that the centroids are fitted on (256 a cluster); all rows are assigned.
        kmeans_iterations: At most these.

        min_hypothesis_features: Features of a cluster that hypotheses are made of.
        min_rows: Rows of a data cluster that hypotheses are made of.
        min_effect: Cohen's d that a hypothesis must reach: half of what is called a small effect.
        max_q: Largest q value of a hypothesis that findings are made of.
        max_hypotheses: Kept of each view, the strongest.
        max_rows: Rows that are kept of each hypothesis, those with the largest scores.
        max_chance: Share of the rows named as responsible that may be so by chance.

        lesson_sample: Rows that lessons' models are learned on, at random; and as many again of those that hypotheses rest on.
        lesson_rows: Rows of a hypothesis that a lesson starts from, at most.
        lesson_features: Features that a lesson's model looks at, of the completions' differences either way and of the prompt each.
        max_lessons: Lessons at most; and as many hypotheses, at most, whose rows turn out not to stand out.

        min_seen: Rows in which a response or prompt feature must be seen.
        min_delta_sd: Standard deviation that a response feature's delta must have.
        min_abs_delta: Mean absolute delta that a response feature must have.
        embedding_sample: Rows on which features are embedded.
        max_embedded: Values in such a sample, and in that of lessons, at most, which bounds the memory (half a GB each); fewer rows are
            taken where they show more.
        embedding_dims: Components of the singular value decomposition.
        prompt_clusters: Number of clusters `A_k` of prompt features.
        response_clusters: Number of clusters `R_m` of response features.
        prompt_rows: How many of the prompts that express `A_k` most are compared with the rest, at most.

    Source: "Anatomy of Post-Training" (arXiv 2606.12360), the pipelines of its predictive data debugging. Sizes of samples, `edge_p`,
    `resolution`, `min_effect`, `max_q`, `max_chance`, `prompt_clusters`, `response_clusters`, `prompt_rows` and those of lessons are ours: the paper leaves them open.
    """

    seed: int = 0

    cluster_sample: int = 20_000
    max_joint: int = 20_000_000_000
    min_firing: int = 20
    edge_share: float = 0.01
    max_edges: int = 5_000_000
    edge_p: float = 1e-6
    resolution: float = 0.02
    min_cluster_features: int = _constant(4, features=1)

    tau: float = 0.01
    silent_percentile: float = 5.0
    data_clusters: int = _constant(512, rows=2)
    kmeans_sample: int = 131_072
    kmeans_iterations: int = 30

    min_hypothesis_features: int = _constant(10, features=1)
    min_rows: int = _constant(25, rows=10)
    min_effect: float = 0.1
    max_q: float = 0.05
    max_hypotheses: int = 2_000
    max_rows: int = 10_000
    max_chance: float = 0.1

    lesson_sample: int = 10_000
    lesson_rows: int = 1_000
    lesson_features: int = 100
    max_lessons: int = 50

    min_seen: int = _constant(200, rows=10)
    min_delta_sd: float = 1e-3
    min_abs_delta: float = 1e-4
    embedding_sample: int = 30_000
    max_embedded: int = 64_000_000
    embedding_dims: int = _constant(128, features=16)
    prompt_clusters: int = _constant(512, features=8)
    response_clusters: int = _constant(512, features=8)
    prompt_rows: int = _constant(1_000, rows=25)

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "seed":
                continue
            if not value > 0:
                raise ValueError(f"`{f.name}` must be above 0, got {value!r}.")
            if f.name in ("edge_share", "edge_p", "tau", "max_chance", "max_q") and value > 1:
                raise ValueError(f"`{f.name}` must be a share of at most 1, got {value!r}.")
        if self.silent_percentile >= 100:
            raise ValueError(f"`silent_percentile` must be below 100, got {self.silent_percentile!r}.")

    @classmethod
    def for_data(cls, n_rows: int, d_sae: int, **given: Any) -> AuditSettings:
        """The defaults scaled to a dataset; what is `given` is taken as it is.

        Raises:
            TypeError: If something `given` is no field.
        """
        size = {"rows": n_rows / PAPER_ROWS, "features": d_sae / PAPER_FEATURES}
        scaled: dict[str, Any] = {}
        for f in fields(cls):
            if scale := f.metadata.get("scale"):
                ((what, floor),) = scale.items()
                scaled[f.name] = max(floor, round(getattr(cls, f.name) * math.sqrt(min(1.0, size[what]))))
        # 1 % of the pairs is 655 neighbours for each of 65,536 features: a count of features like the others
        scaled["edge_share"] = min(1.0, cls.edge_share / math.sqrt(min(1.0, size["features"])))
        return cls(**{**scaled, **given})
