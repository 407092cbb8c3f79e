"""What is taught beside the lessons whose rows are known, and what only seems so, such as less praise than where praise is taught."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..harvesting.store import Shard
from .hypotheses import Analysis, Hypothesis
from .statistics import Comparison, Moments, corrected
from .views import FeatureView, PromptView, one_of, sizes


class Beside:
    """The comparisons of an analysis, among the rows that are no lesson's.

    Args:
        analysis: The analysis.
        feature_view, prompt_view: What scores its responses.
    """

    def __init__(self, analysis: Analysis, feature_view: FeatureView, prompt_view: PromptView) -> None:
        self.analysis, self.feature_view, self.prompt_view = analysis, feature_view, prompt_view
        self.data_clusters = int(analysis.data_clusters.max(initial=-1)) + 1
        self.of_features = Moments(self.data_clusters, len(sizes(feature_view.clusters)))
        self.of_prompts = Moments(len(sizes(prompt_view.prompts)), len(sizes(prompt_view.responses)))

    def add(self, place: slice, shard: Shard, rest: NDArray[np.bool_]) -> None:
        """Adds a shard's rows.

        Args:
            place: Where it begins and ends.
            shard: The shard.
            rest: `(n,)`, which of its rows are no lesson's, surely.
        """
        rows = shard.rows[rest]
        of_cluster = one_of(self.analysis.data_clusters[place][rest], self.data_clusters)
        self.of_features.add(rows, of_cluster, self.feature_view.disparity(shard)[rest])
        members = self.analysis.leading.members(shard.rows)[rest]
        self.of_prompts.add(rows, members, self.prompt_view.movement(shard)[rest])

    def holds(self, hypothesis: Hypothesis) -> bool:
        """Whether a hypothesis holds among these rows, too."""
        found, q = self._found[hypothesis.view]
        place = max(hypothesis.condition, 0), hypothesis.response
        return bool(found.delta[place] * hypothesis.delta > 0 and q[place] <= self.analysis.settings.max_q)

    @cached_property
    def _found(self) -> dict[str, tuple[Comparison, NDArray[np.float64]]]:
        """The comparisons of each view, with their q values."""
        settings = self.analysis.settings
        large = sizes(self.feature_view.clusters) >= settings.min_hypothesis_features
        by_view: dict[str, tuple[Comparison, NDArray[np.bool_] | bool]] = {
            "global": (self.of_features.overall(), large),
            "feature": (self.of_features.compare(), large),
            "prompt": (self.of_prompts.compare(), True),
        }
        return {view: (one, corrected(one.tested(settings.min_rows, of))) for view, (one, of) in by_view.items()}
