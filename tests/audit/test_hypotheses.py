"""Both views on worlds with planted lessons, from harvest to hypotheses, and against the whole written out in loops."""

from __future__ import annotations

import dataclasses
from unittest.mock import Mock

import numpy as np
import pytest
from scipy import sparse, stats

from shapedpo.audit.analysis.hypotheses import Analysis
from shapedpo.audit.analysis.lessons import attribute, lessons
from shapedpo.audit.analysis.run import analyse
from shapedpo.audit.analysis.settings import AuditSettings
from shapedpo.audit.analysis.shadows import Beside
from shapedpo.audit.harvesting.passes import Passes
from shapedpo.audit.harvesting.store import Harvest
from shapedpo.audit.prediction.conditions import Things

from .worlds import GROUP, TOKENS, Planted, World, write_harvest


EVERYWHERE = Planted(0, rate=0.1)
CONDITIONAL = Planted(1, topic=3)
SUPPRESSED = Planted(2, topic=5, rate=0.5, chosen=False)
WORLD = World(1500, groups=8, lessons=(EVERYWHERE, CONDITIONAL, SUPPRESSED))
# within a group the features' normalised mutual information is 0.3; between a topic and what it is taught, 0.05
SETTINGS = AuditSettings.for_data(WORLD.n, WORLD.d_sae, resolution=0.1)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The planted world's analysis."""
    folder = tmp_path_factory.mktemp("planted")
    return analyse(WORLD.harvest(folder / "harvest"), SETTINGS, out=folder / "analysis", progress=False), folder


def responds_with(analysis, hypothesis, group: int) -> bool:
    """Whether most of a hypothesis' response features are those of a group."""
    features = analysis.response_features(hypothesis)
    return len(set(features) & set(WORLD.group_features(group))) > len(features) / 2


def test_each_planted_group_is_a_feature_cluster(found) -> None:
    analysis, _ = found
    clusters = [set(features) for features in analysis.clusters["feature"]]
    for group in range(WORLD.groups):
        own = set(WORLD.group_features(group))
        best = max(clusters, key=lambda features: len(features & own))
        assert len(best & own) >= GROUP - 1
        assert len(best - own) <= 1


def test_feature_view_ranks_the_conditional_lesson_first(found) -> None:
    analysis, _ = found
    first = analysis.of("feature")[0]
    assert responds_with(analysis, first, 1)
    assert first.delta > 0.5
    assert first.q < 1e-6
    in_topic = WORLD.topic_of_rows()[np.isin(analysis.rows, analysis.rows[analysis.data_clusters == first.condition])]
    assert (in_topic == 3).mean() > 0.9


def test_prompt_view_finds_conditions_and_directions(found) -> None:
    analysis, _ = found
    for planted in (CONDITIONAL, SUPPRESSED):
        first = next(h for h in analysis.of("prompt") if responds_with(analysis, h, planted.group))
        assert set(analysis.condition_features(first)) == set(WORLD.prompt_features(planted.topic))
        assert (first.delta > 0) == planted.chosen
        # beside these, rows of the topic whose completions differ in it by chance
        assert len(np.intersect1d(first.named, WORLD.planted_rows(planted))) >= 0.75 * first.n_named


def test_lessons_are_what_was_planted_and_nothing_else(found) -> None:
    analysis, _ = found
    three = lessons(analysis)
    assert len(three) == 3
    for planted in (EVERYWHERE, CONDITIONAL, SUPPRESSED):
        (lesson,) = (one for one in three if responds_with(analysis, one.first, planted.group))
        assert lesson.conditional == (planted.topic is not None)
        if planted is EVERYWHERE:  # more rows differ in it by chance, and look the same
            assert not len(lesson.rows)
            continue
        rows = WORLD.planted_rows(planted)
        right = len(np.intersect1d(lesson.rows, rows))
        assert right >= 0.85 * len(lesson.rows)
        assert right >= 0.8 * len(rows)
        assert (np.diff(lesson.log_odds) <= 0).all()


def test_hypotheses_without_rows_of_their_own_do_not_keep_a_lesson_from_being_found(found) -> None:
    analysis, folder = found
    draw = np.random.default_rng(0)
    first = analysis.of("feature")[0]
    shadows = [
        dataclasses.replace(
            first, rows=draw.choice(analysis.rows, 12, replace=False), contributions=np.ones(12, np.float32), n_named=0
        )
        for _ in range(5)
    ]
    crowded = dataclasses.replace(
        analysis,
        hypotheses=[*shadows, *analysis.hypotheses],
        settings=dataclasses.replace(analysis.settings, max_lessons=3),
    )
    passes = Passes(Harvest.open(folder / "harvest"), progress=False)
    things = Things.of(crowded)
    beside = Beside(crowded, things.feature_view, things.prompt_view)
    with_rows = [one for one in attribute(crowded, passes, beside) if len(one.rows)]
    assert [len(one.rows) for one in with_rows] == [len(one.rows) for one in lessons(analysis) if len(one.rows)]


def test_what_holds_beside_the_lessons_is_corrected_for_the_hypotheses_that_were_tested(found) -> None:
    analysis, _ = found
    clusters = {
        **analysis.clusters,
        "feature": [list(range(10)), *(list(range(10 + i, 14 + i)) for i in range(0, 80, 4))],
    }
    settings = dataclasses.replace(SETTINGS, min_hypothesis_features=10)  # the first one only is tested
    tested = dataclasses.replace(analysis, settings=settings, clusters=clusters)
    things = Things.of(tested)
    beside = Beside(tested, things.feature_view, things.prompt_view)
    scores = np.random.default_rng(0).normal(size=(WORLD.n, 21))
    scores[:, 0] = (scores[:, 0] - scores[:, 0].mean()) / scores[
        :, 0
    ].std() + 2.4 / WORLD.n**0.5  # z of 2.4: p of 0.017
    beside.of_features.add(analysis.rows, sparse.csr_matrix((WORLD.n, beside.data_clusters)), scores)
    one = dataclasses.replace(analysis.of("global")[0], response=0, delta=0.1)
    assert beside.holds(one)
    assert not beside.holds(dataclasses.replace(one, delta=-0.1))
    assert not beside.holds(dataclasses.replace(one, response=1))


def test_global_view_finds_what_is_taught_everywhere(found) -> None:
    analysis, _ = found
    groups = [
        next((g for g in range(WORLD.groups) if responds_with(analysis, h, g)), None) for h in analysis.of("global")[:2]
    ]
    assert set(groups) == {EVERYWHERE.group, CONDITIONAL.group}  # 10 and 12 % of the rows


def test_analysis_comes_back_from_its_files(found) -> None:
    analysis, folder = found
    back = Analysis.load(folder / "analysis")
    assert (back.settings, back.n_rows, back.clusters) == (analysis.settings, 1500, analysis.clusters)
    assert back.tested == analysis.tested
    assert analysis.tested["global"] == len(analysis.clusters["feature"])
    assert back.hypotheses == analysis.hypotheses
    for one, other in zip(back.hypotheses, analysis.hypotheses, strict=True):
        np.testing.assert_array_equal(one.named, other.named)
        np.testing.assert_array_equal(one.contributions, other.contributions)
    assert back.attributions == analysis.attributions
    for one, other in zip(back.attributions, analysis.attributions, strict=True):
        np.testing.assert_array_equal(one.rows, other.rows)
        np.testing.assert_array_equal(one.log_odds, other.log_odds)
    for name in ("rows", "data_clusters", "typicality", "delta_sd"):
        np.testing.assert_array_equal(getattr(back, name), getattr(analysis, name))
    for name in ("scores", "rows", "most"):
        np.testing.assert_array_equal(getattr(back.leading, name), getattr(analysis.leading, name))
    (folder / "analysis" / "rows.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"rows\.parquet"):
        Analysis.load(folder / "analysis")


def test_a_write_that_is_cut_off_leaves_no_mixture_of_two_analyses(found, tmp_path, monkeypatch) -> None:
    analysis, _ = found
    analysis.save(tmp_path)
    (tmp_path / "prediction.parquet").write_bytes(b"of the first analysis")
    monkeypatch.setattr("pyarrow.parquet.write_table", Mock(side_effect=OSError("No space left on device")))
    with pytest.raises(OSError, match="No space"):
        dataclasses.replace(analysis, hypotheses=analysis.hypotheses[:1]).save(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"hypotheses\.json"):
        Analysis.load(tmp_path)
    assert not (tmp_path / "prediction.parquet").exists()


def test_the_same_again_and_whatever_the_size_of_shards(found, tmp_path) -> None:
    analysis, _ = found
    again = analyse(WORLD.harvest(tmp_path, shard_rows=97), SETTINGS, progress=False)
    assert again.clusters == analysis.clusters
    np.testing.assert_array_equal(again.data_clusters, analysis.data_clusters)
    assert len(again.hypotheses) == len(analysis.hypotheses)
    for one, other in zip(again.hypotheses, analysis.hypotheses, strict=True):
        assert (one.view, one.condition, one.response) == (other.view, other.condition, other.response)
        np.testing.assert_array_equal(one.named, other.named)
        np.testing.assert_allclose([one.delta, one.z, one.p], [other.delta, other.z, other.p], rtol=1e-5, atol=1e-12)
    assert again.attributions == analysis.attributions
    for one, other in zip(again.attributions, analysis.attributions, strict=True):
        np.testing.assert_array_equal(one.rows, other.rows)


def test_lessons_are_found_on_as_much_as_memory_holds(tmp_path) -> None:
    settings = dataclasses.replace(SETTINGS, max_embedded=36 * WORLD.n)  # of some 55 entries a row
    fewer = analyse(WORLD.harvest(tmp_path, shard_rows=400), settings, progress=False)
    conditional = next(one for one in lessons(fewer) if responds_with(fewer, one.first, CONDITIONAL.group))
    rows = WORLD.planted_rows(CONDITIONAL)
    assert len(np.intersect1d(conditional.rows, rows)) >= 0.8 * len(rows)


def test_every_number_is_what_loops_give(found, tmp_path) -> None:
    """Scores, tests and halves of the hypotheses, from dense float64 frequencies."""
    analysis, _ = found
    counts = WORLD.counts()
    freq = {span: counts[span] / TOKENS for span in counts}
    delta_freq = freq["chosen"] - freq["rejected"]
    everywhere = analysis.of("global")[:3] + analysis.of("single")[:8]
    assert len(everywhere) == 11
    for hypothesis in everywhere + analysis.of("feature")[:8] + analysis.of("prompt")[:8]:
        features = analysis.response_features(hypothesis)
        if hypothesis.view == "prompt":
            score = np.mean([delta_freq[:, f] / delta_freq[:, f].std() for f in features], axis=0)
        else:
            score = np.mean(
                [1.0 * (freq["chosen"][:, f] > 0.01) - (freq["rejected"][:, f] > 0.01) for f in features], axis=0
            )
        if not hypothesis.conditional:
            expected = stats.ttest_1samp(score, 0)
            inside, outside = np.ones(WORLD.n, bool), np.zeros(WORLD.n, bool)
        else:
            if hypothesis.view == "feature":
                inside = analysis.data_clusters == hypothesis.condition
            else:
                share = np.mean([freq["prompt"][:, f] > 0 for f in analysis.condition_features(hypothesis)], axis=0)
                least = np.sort(share)[-hypothesis.n_in]
                inside = share > least
                ties = np.flatnonzero(share == least)  # some of these
                inside[np.intersect1d(ties, hypothesis.rows)] = True
                missing = hypothesis.n_in - inside.sum()
                if missing:  # those whose response does not go the hypothesis' way are not listed
                    continue
            outside = ~inside
            expected = stats.ttest_ind(score[inside], score[outside], equal_var=False)
        assert hypothesis.n_in == inside.sum()
        np.testing.assert_allclose(hypothesis.z, expected.statistic, rtol=1e-4)
        np.testing.assert_allclose(hypothesis.p, expected.pvalue, rtol=1e-2, atol=1e-300)
        for half in (0, 1):
            which = np.arange(WORLD.n) % 2 == half
            rest = score[outside & which].mean() if outside.any() else 0
            np.testing.assert_allclose(hypothesis.halves[half], score[inside & which].mean() - rest, rtol=1e-4)
        assert (np.diff(np.abs(hypothesis.contributions)) <= 0).all()
        np.testing.assert_allclose(hypothesis.contributions, score[hypothesis.rows], rtol=1e-4)
        assert inside[hypothesis.rows].all()


def test_what_a_single_feature_shows_in_no_cluster_is_a_lesson(tmp_path) -> None:
    world = dataclasses.replace(WORLD, n=900, lessons=(CONDITIONAL,))
    counts, alone = world.counts(), world.d_sae - 1
    draw = np.random.default_rng(0)
    taught = draw.random(world.n) < 0.08
    for span, shown in (("chosen", taught), ("rejected", False)):
        counts[span][:, alone] = shown | (draw.random(world.n) < 0.003)
    settings = dataclasses.replace(SETTINGS, min_cluster_features=4)  # as of a larger SAE
    analysis = analyse(write_harvest(tmp_path, counts), settings, progress=False)
    assert alone not in {feature for features in analysis.clusters["feature"] for feature in features}
    (lesson,) = (one for one in lessons(analysis) if one.first.view == "single")
    assert analysis.response_features(lesson.first) == [alone]
    assert analysis.predicted_as(lesson.first) == ("feature", alone, "global", -1)
    assert not lesson.conditional
    right = np.intersect1d(lesson.rows, np.flatnonzero(taught))
    assert len(right) >= 0.85 * len(lesson.rows)
    assert len(right) >= 0.7 * taught.sum()
    differ = ((counts["chosen"] > 0) != (counts["rejected"] > 0)).sum(axis=0)
    assert analysis.tested["single"] == (differ >= 10).sum()
    assert all(one.q <= 0.05 for one in analysis.of("single"))
    assert len(lessons(analysis)) == 2  # other features of the condition's are shadows of its lesson
    strict = dataclasses.replace(settings, max_q=1e-300)
    assert not lessons(analyse(write_harvest(tmp_path, counts), strict, progress=False))


def test_data_clusters_do_not_depend_on_which_side_is_chosen(tmp_path) -> None:
    """Otherwise the test of their rows' difference would be circular."""
    counts = dataclasses.replace(WORLD, n=600).counts()
    swap = np.random.default_rng(0).random(600) < 0.5
    swapped = {
        "prompt": counts["prompt"],
        "chosen": np.where(swap[:, None], counts["rejected"], counts["chosen"]),
        "rejected": np.where(swap[:, None], counts["chosen"], counts["rejected"]),
    }
    one, other = (
        analyse(write_harvest(tmp_path / name, part), progress=False)
        for name, part in (("one", counts), ("other", swapped))
    )
    assert one.clusters["feature"] == other.clusters["feature"]
    assert (one.data_clusters == other.data_clusters).mean() > 0.99  # sums in another order may round otherwise


def test_a_clean_world_teaches_nothing(tmp_path) -> None:
    discovered = tested = 0
    for seed in range(3):
        analysis = analyse(World(600, seed=seed).harvest(tmp_path / str(seed)), progress=False)
        tested += 1
        discovered += any(h.q < 0.05 for h in analysis.hypotheses)
        assert sum(h.q < 0.05 for h in analysis.hypotheses) <= 2
        assert not any(len(lesson.rows) for lesson in lessons(analysis))
    assert discovered < tested


def test_silent_rows_are_in_no_data_cluster(tmp_path) -> None:
    counts = dataclasses.replace(WORLD, n=300).counts()
    for span in counts:
        counts[span][:60] = 0  # more than the percentile
    analysis = analyse(write_harvest(tmp_path / "a", counts), progress=False)
    assert (analysis.data_clusters[:60] == -1).all()
    assert (analysis.data_clusters[60:] >= 0).mean() > 0.9
    for cluster in np.unique(analysis.data_clusters[analysis.data_clusters >= 0]):
        assert set(analysis.exemplars(cluster, 3)) <= set(np.flatnonzero(analysis.data_clusters == cluster))


def test_a_harvest_in_which_nothing_fires_teaches_nothing(tmp_path) -> None:
    empty = {span: np.zeros((30, 50), int) for span in ("prompt", "chosen", "rejected")}
    analysis = analyse(write_harvest(tmp_path / "empty", empty), out=tmp_path / "out", progress=False)
    assert analysis.hypotheses == []
    assert (analysis.data_clusters == -1).all()
    assert Analysis.load(tmp_path / "out").hypotheses == []
    one = {span: np.ones((1, 5), int) for span in empty}
    with pytest.raises(ValueError, match="two at least"):
        analyse(write_harvest(tmp_path / "one", one), progress=False)


# --- constants ---------------------------------------------------------------------------------------------------------


def test_constants_are_the_papers_at_its_size_and_scale_by_the_rule() -> None:
    assert AuditSettings.for_data(260_000, 65_536) == AuditSettings() == AuditSettings.for_data(10**7, 10**6)
    small = AuditSettings.for_data(65_000, 65_536)  # a quarter of the rows: half of each count
    assert (small.data_clusters, small.min_rows, small.min_seen) == (256, 12, 100)
    assert small.min_cluster_features == 4
    few = AuditSettings.for_data(260_000, 16_384)
    assert (few.min_cluster_features, few.min_hypothesis_features, few.response_clusters) == (2, 5, 256)
    assert few.edge_share == 0.02
    assert AuditSettings.for_data(100, 512).min_rows == 10  # its floor
    assert AuditSettings.for_data(100, 512, data_clusters=7).data_clusters == 7


@pytest.mark.parametrize(
    ("name", "value"), [("tau", 0), ("edge_share", 1.5), ("data_clusters", -1), ("silent_percentile", 100)]
)
def test_constants_out_of_range_are_refused(name, value) -> None:
    with pytest.raises(ValueError, match=name):
        AuditSettings(**{name: value})
