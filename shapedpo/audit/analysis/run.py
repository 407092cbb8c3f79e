"""The analysis of a harvest: six passes over its shards, one of which is in memory at a time."""

from __future__ import annotations

import dataclasses
import os
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from ..harvesting.passes import Passes
from ..harvesting.shards import COMPLETIONS
from ..harvesting.store import Harvest
from .clusters import embedded_clusters, spherical_kmeans, unit
from .graph import feature_clusters
from .hypotheses import Analysis, Hypothesis, ranked
from .leading import Leading, Responsible, beyond_chance
from .lessons import attribute
from .sampling import sample, thinned
from .settings import AuditSettings
from .shadows import Beside
from .statistics import Moments
from .views import FeatureView, PromptView, difference, one_of, sizes


_LARGEST_SAMPLE = 2**28  # numbers of activity that k-means is fitted on: 1 GB


def analyse(
    harvest: Harvest,
    settings: AuditSettings | None = None,
    out: str | os.PathLike[str] | None = None,
    *,
    progress: bool = True,
) -> Analysis:
    """Both views of a harvest: what its data teaches, and where.

    Args:
        harvest: The harvest, with two pairs or more.
        settings: The constants; by default [`AuditSettings.for_data`]'s for the harvest's size.
        out: Folder to write the analysis to, for [`Analysis.load`].
        progress: Whether to show progress bars.

    Raises:
        ValueError: If the harvest has fewer than two pairs.

    Source: "Anatomy of Post-Training" (arXiv 2606.12360), feature-conditioned and prompt-conditioned pipelines.
    """
    if harvest.n_rows < 2:
        raise ValueError(f"The harvest has {harvest.n_rows} pair(s); an audit compares pairs and needs two at least.")
    settings = settings or AuditSettings.for_data(harvest.n_rows, harvest.d_sae)
    passes = Passes(harvest, progress)
    survey = _survey(passes, settings)
    features = feature_clusters(survey.completions, settings, progress)
    prompt_view = _prompt_view(survey, settings)
    del survey
    feature_view, leading = _conditions(passes, features, prompt_view, settings)
    analysis = _compare(passes, feature_view, prompt_view, leading, settings)
    analysis = dataclasses.replace(
        analysis, hypotheses=_responsible(passes, analysis, feature_view, prompt_view, leading)
    )
    beside = Beside(analysis, feature_view, prompt_view)
    analysis = dataclasses.replace(analysis, attributions=attribute(analysis, passes, beside, progress))
    if out is not None:
        analysis.save(out)
    return analysis


class _Survey(NamedTuple):
    """What the first pass finds: counts over all rows, and samples.

    Attributes:
        prompt_seen, response_seen: `(d_sae,)`, in how many prompts, and in how many pairs on either side, a feature fires.
        delta_sd, delta_abs: `(d_sae,)`, of the delta of frequency: standard deviation, mean absolute value.
        completions: `(n, d_sae)`, firing in both completions of sampled pairs.
        prompts, deltas: `(n, d_sae)`, firing in the prompts, and deltas, of sampled pairs.
    """

    prompt_seen: NDArray[np.int64]
    response_seen: NDArray[np.int64]
    delta_sd: NDArray[np.float64]
    delta_abs: NDArray[np.float64]
    completions: sparse.csr_matrix
    prompts: sparse.csr_matrix
    deltas: sparse.csr_matrix


def _survey(passes: Passes, settings: AuditSettings) -> _Survey:
    n, d = passes.harvest.n_rows, passes.harvest.d_sae
    clustered = sample(n, max(1, settings.cluster_sample // 2), settings.seed)
    embedded = sample(n, settings.embedding_sample, settings.seed + 1)
    prompt_seen, response_seen = np.zeros(d, np.int64), np.zeros(d, np.int64)
    total, square, absolute = np.zeros(d), np.zeros(d), np.zeros(d)
    completions, prompts, deltas = [], [], []
    for place, (_, prompt, chosen, rejected) in passes("Surveying features"):
        delta = chosen.freq - rejected.freq
        prompt_seen += np.bincount(prompt.freq.indices, minlength=d)
        response_seen += np.bincount((chosen.freq + rejected.freq).indices, minlength=d)
        total += np.bincount(delta.indices, delta.data, d)
        square += np.bincount(delta.indices, np.square(delta.data, dtype=np.float64), d)
        absolute += np.bincount(delta.indices, np.abs(delta.data), d)
        completions += [_firing(span.freq[clustered[place]]) for span in (chosen, rejected)]
        prompts.append(_firing(prompt.freq[embedded[place]]))
        deltas.append(delta[embedded[place]])
    variance = np.maximum(square / n - (total / n) ** 2, 0)
    return _Survey(
        prompt_seen,
        response_seen,
        np.sqrt(variance),
        absolute / n,
        completions=thinned(_stacked(completions), settings.max_joint, settings.seed, power=2),
        prompts=thinned(_stacked(prompts), settings.max_embedded, settings.seed),
        deltas=thinned(_stacked(deltas), settings.max_embedded, settings.seed),
    )


def _stacked(parts: list[sparse.csr_matrix]) -> sparse.csr_matrix:
    """The parts as one matrix; they are given up, as they take as much memory."""
    whole = sparse.vstack(parts, format="csr")
    parts.clear()
    return whole


def _firing(values: sparse.csr_matrix) -> sparse.csr_matrix:
    """Where values are above 0, as small as can be."""
    return sparse.csr_matrix((np.ones(values.nnz, np.int8), values.indices, values.indptr), shape=values.shape)


def _prompt_view(survey: _Survey, settings: AuditSettings) -> PromptView:
    """Clusters of prompt features and of response features."""
    d = len(survey.prompt_seen)
    moving = (
        (survey.response_seen >= settings.min_seen)
        & (survey.delta_sd >= settings.min_delta_sd)
        & (survey.delta_abs >= settings.min_abs_delta)
    )

    def clustered(values: sparse.csr_matrix, which: NDArray[np.bool_], k: int, seed: int) -> NDArray[np.int32]:
        clusters = np.full(d, -1, np.int32)
        columns = np.flatnonzero(which)
        values = values[:, columns].astype(np.float32)
        clusters[columns] = embedded_clusters(values, k, settings.embedding_dims, seed)
        return clusters

    return PromptView(
        prompts=clustered(
            survey.prompts, survey.prompt_seen >= settings.min_seen, settings.prompt_clusters, settings.seed
        ),
        responses=clustered(survey.deltas, moving, settings.response_clusters, settings.seed + 1),
        delta_sd=survey.delta_sd,
    )


def _conditions(
    passes: Passes, features: NDArray[np.int32], prompt_view: PromptView, settings: AuditSettings
) -> tuple[FeatureView, Leading]:
    """The second pass: data clusters, and the prompts that express each cluster of prompt features most."""
    n, n_clusters = passes.harvest.n_rows, len(sizes(features))
    view = FeatureView(features, np.zeros((0, n_clusters), np.float32), 0.0, settings.tau)
    norm = np.zeros(n)
    size = min(settings.kmeans_sample, _LARGEST_SAMPLE // max(1, n_clusters))
    sampled = sample(n, size, settings.seed + 2)
    luck = np.random.default_rng(settings.seed + 3).random(n)
    leading = Leading(len(sizes(prompt_view.prompts)), settings.prompt_rows)
    activity = []
    for place, shard in passes("Conditions"):
        leading.add(shard.rows, prompt_view.expression(shard), luck[place])
        s = view.activity(shard)
        norm[place] = np.linalg.norm(s, axis=1)
        activity.append(unit(s[sampled[place]]))
    # a pair with no activity at all is silent, however many there are
    quiet = max(float(np.percentile(norm, settings.silent_percentile)), float(np.finfo(np.float32).tiny))
    directions = np.concatenate(activity)
    activity.clear()
    directions = directions[norm[sampled] >= quiet]
    if not len(directions):
        return dataclasses.replace(view, quiet=quiet), leading
    centroids = spherical_kmeans(directions, settings.data_clusters, settings.seed, settings.kmeans_iterations)
    return dataclasses.replace(view, centroids=centroids, quiet=quiet), leading


def _compare(
    passes: Passes, feature_view: FeatureView, prompt_view: PromptView, leading: Leading, settings: AuditSettings
) -> Analysis:
    """The third pass: every condition against the rest, in every response."""
    n, k = passes.harvest.n_rows, len(feature_view.centroids)
    of_features = Moments(k, len(sizes(feature_view.clusters)))
    of_prompts = Moments(len(sizes(prompt_view.prompts)), len(sizes(prompt_view.responses)))
    of_singles = Moments(0, passes.harvest.d_sae)
    rows, typicality = np.zeros(n, np.int64), np.zeros(n, np.float32)
    labels = np.full(n, -1, np.int32)
    for place, shard in passes("Comparing", COMPLETIONS):
        rows[place] = shard.rows
        if k:
            labels[place], typicality[place] = feature_view.data_clusters(shard)
        of_features.add(shard.rows, one_of(labels[place], k), feature_view.disparity(shard))
        of_prompts.add(shard.rows, leading.members(shard.rows), prompt_view.movement(shard))
        of_singles.add_sparse(shard.rows, difference(shard, settings.tau))
    large = sizes(feature_view.clusters) >= settings.min_hypothesis_features
    everywhere, everywhere_tested = ranked("global", of_features.overall(), settings, responses=large)
    differ = of_singles.square.sum(axis=(0, 1)) >= settings.min_rows  # the sides do, in so many rows
    singles, singles_tested = ranked("single", of_singles.overall(), settings, responses=differ)
    singles = [one for one in singles if one.q <= settings.max_q]
    conditional, conditional_tested = ranked("feature", of_features.compare(), settings, responses=large)
    prompted, prompted_tested = ranked("prompt", of_prompts.compare(), settings)
    named = {
        "feature": feature_view.clusters,
        "prompt": prompt_view.prompts,
        "response": prompt_view.responses,
    }
    return Analysis(
        settings=settings,
        n_rows=n,
        hypotheses=[
            *everywhere,
            *(dataclasses.replace(one, response=number) for number, one in enumerate(singles)),
            *conditional,
            *prompted,
        ],
        clusters={
            **{
                name: [np.flatnonzero(of == number).tolist() for number in range(len(sizes(of)))]
                for name, of in named.items()
            },
            "single": [[one.response] for one in singles],
        },
        rows=rows,
        data_clusters=labels,
        typicality=typicality,
        leading=leading,
        delta_sd=prompt_view.delta_sd,
        tested={
            "global": everywhere_tested,
            "single": singles_tested,
            "feature": conditional_tested,
            "prompt": prompted_tested,
        },
    )


def _responsible(
    passes: Passes, analysis: Analysis, feature_view: FeatureView, prompt_view: PromptView, leading: Leading
) -> list[Hypothesis]:
    """The fourth pass: the rows of each hypothesis whose response goes its way, and how many of them it names."""
    asked: dict[tuple[str, int], list[int]] = {}  # by view and condition, so that each condition's rows are taken once
    for number, hypothesis in enumerate(analysis.hypotheses):
        asked.setdefault((hypothesis.view, hypothesis.condition), []).append(number)
    response = np.array([hypothesis.response for hypothesis in analysis.hypotheses], np.int64)
    sign = np.array([np.sign(hypothesis.delta) for hypothesis in analysis.hypotheses], np.float32)
    alone = np.array([feature for (feature,) in analysis.clusters["single"]], np.int64)
    most = Responsible(len(analysis.hypotheses), analysis.settings.max_rows)
    for place, shard in passes("Responsible rows", COMPLETIONS):
        u, moved = feature_view.disparity(shard), prompt_view.movement(shard)
        single = difference(shard, analysis.settings.tau)[:, alone].toarray()
        scored = {"global": u, "single": single, "feature": u, "prompt": moved}
        every = sparse.csc_matrix(np.ones((len(shard.rows), 1)))
        groups = {
            "global": every,
            "single": every,
            "feature": one_of(analysis.data_clusters[place], len(feature_view.centroids)).tocsc(),
            "prompt": leading.members(shard.rows).tocsc(),
        }
        for (view, condition), numbers in asked.items():
            start, end = groups[view].indptr[max(condition, 0) : max(condition, 0) + 2]
            inside = groups[view].indices[start:end]
            if len(inside):
                scores = scored[view][np.ix_(inside, response[numbers])] * sign[numbers]
                most.add(np.array(numbers), shard.rows[inside], scores)
    finished = []
    for number, (hypothesis, (rows, scores)) in enumerate(zip(analysis.hypotheses, most.each(), strict=True)):
        own = scores > 0
        finished.append(
            dataclasses.replace(
                hypothesis,
                n_named=beyond_chance(scores, analysis.settings.max_chance),
                rows=rows[own],
                contributions=scores[own] * sign[number],
            )
        )
    return finished
