"""What an audit scores, and the conditions under which it looks: the same in its pairs and in a model's answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from ..analysis.hypotheses import Analysis
from ..analysis.leading import Leading
from ..analysis.views import FeatureView, PromptView, numbered, on, one_of, pooled
from ..harvesting.store import Shard


Array = NDArray[np.float64]

VIEWS = (
    ("feature", "global"),
    ("feature_cluster", "global"),
    ("response_cluster", "global"),
    ("response_cluster", "prompt"),
    ("feature_cluster", "feature"),
)
"""What is predicted where: kinds and views."""
OBSERVED = VIEWS[:-1]
"""Of these, what rollouts can show: a prompt alone is in no data cluster."""
APPEARS = 0.5 - 1e-6
"""Share of a cluster's features that are on where it is said to appear: half, less what float32 rounds off."""


@dataclass(frozen=True)
class Things:
    """What predictions are made of: features, and the clusters of both views.

    Attributes:
        feature_view, prompt_view: The views, of which only what scores completions is needed.
    """

    feature_view: FeatureView
    prompt_view: PromptView

    @classmethod
    def of(cls, analysis: Analysis) -> Things:
        feature, prompt, response = (
            numbered(analysis.clusters[name], len(analysis.delta_sd)) for name in ("feature", "prompt", "response")
        )
        none = np.zeros((0, len(analysis.clusters["feature"])), np.float32)
        return cls(
            FeatureView(feature, none, 0.0, analysis.settings.tau), PromptView(prompt, response, analysis.delta_sd)
        )

    def scores(self, freq: Any) -> dict[str, tuple[Any, Any]]:
        """Of completions' frequencies, `(n, d_sae)`, the scores of each kind and where it appears, `(n, things)` each; features' are sparse."""
        features, responses = self.feature_view.clusters, self.prompt_view.responses
        active = on(freq, 0)
        shares = pooled(on(freq, self.feature_view.tau), features, mean=True)
        moving = pooled(active, responses, mean=True)
        return {
            "feature": (freq, active),
            "feature_cluster": (shares, (shares >= APPEARS).astype(np.float32)),
            "response_cluster": (self.prompt_view.moved(freq), (moving >= APPEARS).astype(np.float32)),
        }


@dataclass(frozen=True)
class Conditions:
    """Where an audit looks, and at what.

    Attributes:
        things: What is scored.
        leading: The rows that express each prompt cluster most.
        data_clusters: `(n_rows,)`, the data cluster of each row.
        least: `(A,)`, how much a prompt must express of each prompt cluster to be as one of these rows.
        n_data_clusters: How many of these there are.
    """

    things: Things
    leading: Leading
    data_clusters: NDArray[np.int32]
    least: NDArray[np.floating]
    n_data_clusters: int

    @classmethod
    def of(cls, analysis: Analysis) -> Conditions:
        """The conditions of an analysis."""
        leading = analysis.leading
        least = np.where(leading.scores > 0, leading.scores, np.inf).min(axis=0, initial=np.inf)
        k = int(analysis.data_clusters.max(initial=-1)) + 1
        return cls(Things.of(analysis), leading, analysis.data_clusters, least, k)

    def of_pairs(self, place: slice, shard: Shard) -> dict[str, Any]:
        """Of pairs of the harvest, `(n, groups)` of each view: 1 where a pair is in a group."""
        return {
            "global": sparse.csr_matrix(np.ones((len(shard.rows), 1))),
            "prompt": self.leading.members(shard.rows),
            "feature": one_of(self.data_clusters[place], self.n_data_clusters),
        }

    def of_answers(self, shard: Shard) -> dict[str, Any]:
        """The same of answers to other prompts, by what the prompt expresses; data clusters are made of what a pair's two sides say."""
        expressed = self.things.prompt_view.expression(shard)
        # ties were broken by less than a millionth
        prompt = sparse.csr_matrix((expressed > 0) & (expressed >= self.least - 1e-6))
        return {"global": sparse.csr_matrix(np.ones((len(shard.rows), 1))), "prompt": prompt.astype(np.float64)}
