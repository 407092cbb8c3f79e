"""Predictions: effects against a slow reference, weights and held features, and the file."""

from __future__ import annotations

import numpy as np
import pytest

from shapedpo.audit import Analysis, Harvest, Prediction, PredictionSettings, analyse, predict
from shapedpo.audit.conditions import Conditions
from shapedpo.audit.effects import measure
from shapedpo.audit.rollouts import Rollouts

from .worlds import TOKENS, Planted, World


WORLD = World(
    600, topics=4, groups=6, loners=12, lessons=(Planted(1, rate=0.3), Planted(2, topic=3), Planted(3, chosen=False))
)


@pytest.fixture(scope="module")
def audited(tmp_path_factory) -> tuple[Harvest, Analysis]:
    harvest = WORLD.harvest(tmp_path_factory.mktemp("harvest"), shard_rows=128)
    return harvest, analyse(harvest, progress=False)


def frequencies() -> tuple[np.ndarray, np.ndarray]:
    counts = WORLD.counts()
    return counts["chosen"] / TOKENS, counts["rejected"] / TOKENS


def test_effects_of_features_and_clusters_are_weighted_means_of_deltas(audited) -> None:
    harvest, analysis = audited
    weights = np.random.default_rng(0).random(WORLD.n)
    conditions = Conditions.of(harvest, analysis, progress=False)
    effects = measure(harvest, conditions, weights, np.zeros(0, np.int64), analysis.settings, 1000, 10, progress=False)
    parts = {(part.kind, part.view): part for part in effects.parts}
    chosen, rejected = frequencies()

    def check(part, chosen, rejected, shown, other, rows) -> None:
        shown, other = shown.astype(float), other.astype(float)
        everything = np.concatenate([chosen, rejected])
        weighted = weights[rows, None] * (chosen - rejected)[rows]
        sd = np.where(everything.std(axis=0) > 0, everything.std(axis=0), 1)
        np.testing.assert_allclose(part.delta, weighted.mean(axis=0) / sd, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(part.rate, (shown[rows].mean(axis=0) + other[rows].mean(axis=0)) / 2, atol=1e-6)
        np.testing.assert_allclose(part.rate_delta, (weights[:, None] * (shown - other))[rows].mean(axis=0), atol=1e-6)
        # where no pair differs, as if half a pair did
        variance = np.maximum(weighted.var(axis=0) / sd**2, 0.5 / len(rows))
        np.testing.assert_allclose(part.se, np.sqrt(variance / len(rows)), rtol=1e-3)

    every = np.arange(WORLD.n)
    check(parts["feature", "global"], chosen, rejected, chosen > 0, rejected > 0, every)
    clusters = analysis.clusters["feature"]
    shares = [np.stack([(side[:, c] > 0.01).mean(axis=1) for c in clusters], axis=1) for side in (chosen, rejected)]
    on = [share >= 0.5 for share in shares]
    check(parts["feature_cluster", "global"], *shares, *on, every)
    conditional = parts["feature_cluster", "feature"]
    for condition in np.unique(conditional.condition)[:3]:
        which = conditional.condition == condition
        part = type(conditional)(
            *(value[which] if isinstance(value, np.ndarray) else value for value in vars(conditional).values())
        )
        check(part, *shares, *on, np.flatnonzero(analysis.data_clusters == condition))


def test_dropped_rows_teach_nothing(audited) -> None:
    harvest, analysis = audited
    planted = WORLD.planted_rows(WORLD.lessons[0])
    features = WORLD.group_features(1)
    plain = predict(harvest, analysis, progress=False).of("feature")
    dropped = predict(harvest, analysis, weights=~np.isin(analysis.rows, planted) * 1.0, progress=False).of("feature")
    assert np.abs(dropped.score[features]).max() < 0.25 * plain.score[features].min()
    other = WORLD.group_features(3)  # taught to fall, in all rows
    np.testing.assert_allclose(dropped.score[other], 0.7 * plain.score[other], rtol=0.3)  # fewer rows, less of it
    assert (dropped.score_high[other] < 0).all()


def test_held_features_do_not_move_and_take_along_what_goes_with_them(audited) -> None:
    harvest, analysis = audited
    features = WORLD.group_features(1)
    held = features[:6].tolist()
    plain, still = (predict(harvest, analysis, held=some, progress=False) for some in ([], held))
    assert np.abs(still.of("feature").score[held]).max() < 0.01 * plain.of("feature").score[held].min()
    with_them = features[6:]
    ratio = still.of("feature").score[with_them] / plain.of("feature").score[with_them]
    assert np.abs(ratio).max() < 0.35
    other = WORLD.group_features(3)
    np.testing.assert_allclose(still.of("feature").score[other], plain.of("feature").score[other], rtol=0.3)


def test_what_the_reference_never_varies_in_does_not_move(audited, tmp_path) -> None:
    harvest, analysis = audited
    answering = World(300, topics=4, groups=6, loners=12, base=0.05, seed=2)
    answers = Rollouts(answering.harvest(tmp_path), np.zeros((300, 2)), both=False)
    chosen, rejected = frequencies()
    both, own = np.concatenate([chosen, rejected]), answering.counts()
    n, prior = 600, PredictionSettings().prior_answers
    said = np.concatenate([own["chosen"], own["rejected"]]) / TOKENS
    varies = (n * said.var(axis=0) / both.var(axis=0) + prior) / (n + prior)
    expected = 0.5 * (chosen - rejected).mean(axis=0) / both.std(axis=0) * np.minimum(varies, 4)
    found = predict(harvest, analysis, rollouts=answers, progress=False).of("feature")
    np.testing.assert_allclose(found.score, expected, rtol=1e-3, atol=1e-6)


def test_a_pilot_says_how_the_model_generalises_and_how_far(audited, tmp_path) -> None:
    harvest, analysis = audited
    answering = World(900, topics=4, groups=6, loners=12, seed=2)
    counts = answering.counts()
    taught, spilt = WORLD.group_features(1), WORLD.group_features(5)  # the data says nothing of the second
    shows = [
        (counts[side][:, taught] > 0).mean(axis=1) + (counts[side][:, spilt] > 0).mean(axis=1)
        for side in ("chosen", "rejected")
    ]
    ratios = 0.2 * np.stack(shows, axis=1)
    ratios -= np.log(np.exp(ratios).mean())
    answers = Rollouts(answering.harvest(tmp_path), ratios, both=False)
    share = 0.1
    how = PredictionSettings(pilot_share=share)
    found = predict(harvest, analysis, how, rollouts=answers, progress=False).of("feature")
    z = np.concatenate([counts["chosen"], counts["rejected"]]) / TOKENS
    z = (z - z.mean(axis=0)) / np.concatenate(frequencies()).std(axis=0)
    change = (np.expm1(ratios).T.reshape(-1, 1) * z).mean(axis=0) * share**-how.growth
    for features in (taught, spilt):
        np.testing.assert_allclose(found.score[features].mean(), change[features].mean(), rtol=0.3)
        assert (found.score[features] > 0).all()
    # with rows left out the pilot no longer fits, and the data is asked alone
    weights = np.ones(WORLD.n)
    left = predict(harvest, analysis, how, weights=weights, rollouts=answers, progress=False).of("feature")
    assert np.abs(left.score[spilt]).mean() < 0.2 * found.score[spilt].mean()


def test_prediction_is_a_file_of_lines(audited, tmp_path) -> None:
    harvest, analysis = audited
    prediction = predict(harvest, analysis, PredictionSettings(scale=1.0), progress=False)
    prediction.save(tmp_path)
    found = Prediction.load(tmp_path)
    for name, values in vars(prediction).items():
        np.testing.assert_array_equal(getattr(found, name), values)
    assert len(found.of("feature")) == WORLD.d_sae
    line = found.of("response_cluster", "prompt")
    assert found.at("response_cluster", int(line.number[3]), "prompt", int(line.condition[3]))["score"] == line.score[3]
    assert found.at("feature", WORLD.d_sae) is None
    with pytest.raises(FileNotFoundError, match=r"prediction\.parquet"):
        Prediction.load(tmp_path / "nowhere")


def test_prediction_refuses_what_does_not_fit(audited) -> None:
    harvest, analysis = audited
    with pytest.raises(ValueError, match="600 numbers"):
        predict(harvest, analysis, weights=np.ones(3))
    with pytest.raises(ValueError, match="Feature 9999 cannot be held"):
        predict(harvest, analysis, held=[9999])
    with pytest.raises(ValueError, match="`scale` must be above 0"):
        PredictionSettings(scale=0.0)
