"""Predictions: effects against a slow reference, weights and held features, and the file."""

from __future__ import annotations

import numpy as np
import pytest

from shapedpo.audit import Analysis, Harvest, Prediction, PredictionSettings, analyse, predict
from shapedpo.audit.prediction.conditions import Conditions
from shapedpo.audit.prediction.effects import measure
from shapedpo.audit.prediction.reward import answer_pairs
from shapedpo.audit.rollouts.run import Rollouts

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
    conditions = Conditions.of(analysis)
    effects = measure(harvest, conditions, weights, analysis.settings, 1000, 10, progress=False)
    parts = {(part.kind, part.view): part for part in effects.parts}
    chosen, rejected = frequencies()

    def check(part, chosen, rejected, shown, other, rows) -> None:
        shown, other = shown.astype(float), other.astype(float)
        everything = np.concatenate([chosen, rejected])
        weighted = weights[rows, None] * (chosen - rejected)[rows]
        sd = np.where(everything.std(axis=0) > 0, everything.std(axis=0), 1)
        np.testing.assert_allclose(part.delta, weighted.mean(axis=0) / sd, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(part.rate, (shown[rows].mean(axis=0) + other[rows].mean(axis=0)) / 2, atol=1e-6)
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


ANSWERING = World(450, topics=4, groups=6, loners=12, base=0.1, seed=2)


def spread(sides: tuple[np.ndarray, np.ndarray], sd: np.ndarray) -> np.ndarray:
    """Covariance within prompts, from two completions of each."""
    z = (sides[0] - sides[1]) / sd
    return z.T @ z / len(z) / 2


def solved(effect: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    return np.linalg.solve(covariance + PredictionSettings().ridge * np.eye(len(effect)), effect)


def expected(sides: tuple[np.ndarray, np.ndarray], sd: np.ndarray, reward: np.ndarray, scores, sd_of) -> np.ndarray:
    """Mean product of the reward's and the scores' differences, halved: their covariance within prompts."""
    moved = (sides[0] - sides[1]) / sd @ reward
    return np.mean(moved[:, None] * (scores[0] - scores[1]) / sd_of, axis=0) / 2


@pytest.mark.parametrize("told", ["the data alone", "answers"])
def test_a_score_moves_by_its_covariance_with_the_reward_that_explains_the_data(audited, tmp_path, told) -> None:
    harvest, analysis = audited
    data, counts = frequencies(), ANSWERING.counts()
    answers = counts["chosen"] / TOKENS, counts["rejected"] / TOKENS
    sd = np.concatenate(data).std(axis=0)
    reward = solved((data[0] - data[1]).mean(axis=0) / sd, spread(data, sd))
    own, rollouts = data, None
    if told == "answers":
        own, rollouts = answers, Rollouts(ANSWERING.harvest(tmp_path), np.zeros((ANSWERING.n, 2)), both=False)
    found = predict(harvest, analysis, PredictionSettings(scale=2.0), rollouts=rollouts, progress=False)
    feature = found.of("feature")
    np.testing.assert_allclose(feature.score, 2 * expected(own, sd, reward, own, sd), rtol=1e-3, atol=1e-5)
    on = tuple((side > 0).astype(float) for side in own)
    rate = np.concatenate(on).mean(axis=0)
    if told == "answers":
        rate = (ANSWERING.n * rate + 20 * np.concatenate([side > 0 for side in data]).mean(axis=0)) / (ANSWERING.n + 20)
    np.testing.assert_allclose(feature.base_rate, rate, rtol=1e-5)
    rate = np.clip(rate, 0.01, 0.99)
    moved = 2 * expected(own, sd, reward, on, 1) / rate / (1 - rate)
    np.testing.assert_allclose(feature.log_odds, moved, rtol=1e-3, atol=1e-4)
    shares, everywhere = (
        [np.stack([(x[:, c] > 0.01).mean(axis=1) for c in analysis.clusters["feature"]], axis=1) for x in of]
        for of in (own, data)
    )
    score = 2 * expected(own, sd, reward, shares, np.concatenate(everywhere).std(axis=0))
    np.testing.assert_allclose(found.of("feature_cluster").score, score, rtol=1e-3, atol=1e-5)


def test_a_lesson_of_a_condition_is_predicted_there(audited) -> None:
    harvest, analysis = audited
    found = predict(harvest, analysis, progress=False)
    most = found.of("response_cluster", "prompt")
    taught = set(WORLD.group_features(2).tolist())  # where the topic is the third, and nowhere else
    cluster = max(
        range(len(analysis.clusters["response"])), key=lambda c: len(taught & set(analysis.clusters["response"][c]))
    )
    prompts = set(WORLD.prompt_features(3).tolist())
    there = [2 * len(prompts & set(features)) > len(features) for features in analysis.clusters["prompt"]]
    scores = {c: most.at("response_cluster", cluster, "prompt", c)["score"] for c in np.unique(most.condition).tolist()}
    inside, outside = ([score for c, score in scores.items() if there[c] == where] for where in (True, False))
    assert min(inside) > 3 * max(outside)
    assert min(inside) > found.at("response_cluster", cluster)["score"]


def test_features_that_are_held_behind_a_gate_stay_there_and_move_elsewhere(audited) -> None:
    harvest, analysis = audited
    data = frequencies()
    sd = np.concatenate(data).std(axis=0)
    apart = (data[0] - data[1]) / sd
    reward = solved(apart.mean(axis=0), spread(data, sd))
    held, inside = WORLD.group_features(1)[:4], np.random.default_rng(0).random(WORLD.n) < 0.3
    covariance = spread(tuple(side[inside] for side in data), sd)
    still = reward.copy()
    still[held] -= np.linalg.pinv(covariance[np.ix_(held, held)]) @ (covariance @ reward)[held]
    products = np.where(inside, apart @ still, apart @ reward)[:, None] * apart / 2
    assert np.abs(products[inside][:, held].mean(axis=0)).max() < 1e-6 < products[~inside][:, held].mean(axis=0).min()
    how = PredictionSettings(scale=1.0)
    found = predict(harvest, analysis, how, held=held.tolist(), held_on=inside, progress=False).of("feature")
    np.testing.assert_allclose(found.score, products.mean(axis=0), rtol=1e-3, atol=1e-5)
    # a gate whose rows are dropped holds nothing
    dropped = np.where(inside, 0.0, 1.0)
    plain, same = (
        predict(harvest, analysis, how, weights=dropped, held=some, held_on=inside, progress=False)
        for some in ([], held.tolist())
    )
    np.testing.assert_array_equal(plain.score, same.score)
    with pytest.raises(ValueError, match="takes 600 booleans"):
        predict(harvest, analysis, held=held.tolist(), held_on=inside[:9])


def test_a_pilot_says_how_the_model_generalises_and_how_far(audited, tmp_path) -> None:
    harvest, analysis = audited
    counts, data = ANSWERING.counts(), frequencies()
    spilt = WORLD.group_features(5)  # the data says nothing of it
    shows = [(counts[side][:, spilt] > 0).mean(axis=1) for side in ("chosen", "rejected")]
    ratios = 0.2 * np.stack(shows, axis=1)
    ratios -= np.log(np.exp(ratios).mean())
    answers = Rollouts(ANSWERING.harvest(tmp_path), ratios, both=False)
    how = PredictionSettings(pilot_share=0.1)
    found = predict(harvest, analysis, how, rollouts=answers, progress=False).of("feature")

    own = counts["chosen"] / TOKENS, counts["rejected"] / TOKENS
    sd = np.concatenate(data).std(axis=0)
    z = np.concatenate(own) / sd
    change = (np.expm1(ratios).T.reshape(-1, 1) * (z - z.mean(axis=0))).mean(axis=0)
    covariance = spread(own, sd)
    rewards = solved((data[0] - data[1]).mean(axis=0) / sd, spread(data, sd)), solved(change, covariance)
    sizes = [np.linalg.norm(covariance @ reward) for reward in rewards]
    both = covariance @ (rewards[0] / sizes[0] + rewards[1] / sizes[1])
    assert np.corrcoef(found.score, both)[0, 1] > 0.9999
    assert found.score[spilt].min() > 0.25 * found.score.max()
    # the pilot has moved by what is predicted of a tenth of the run, as far as they agree
    slope = found.score @ change / (found.score @ found.score)
    assert slope == pytest.approx(0.1, rel=0.35)
    assert found.scaled.all()
    # with rows left out the pilot no longer fits, and the data is asked alone
    left = predict(harvest, analysis, how, weights=np.ones(WORLD.n), rollouts=answers, progress=False).of("feature")
    assert np.abs(left.score[spilt]).mean() < 0.2 * found.score[spilt].mean()
    assert not left.scaled.any()


def test_two_answers_of_the_reference_to_a_prompt_follow_each_other_where_both_models_answered(tmp_path) -> None:
    harvest = ANSWERING.harvest(tmp_path, shard_rows=128)
    rejected = ANSWERING.counts()["rejected"] / TOKENS
    pairs = [pair for _, pair in answer_pairs(Rollouts(harvest, np.zeros((ANSWERING.n, 2))), progress=False)]
    for side, start in enumerate((0, 1)):
        np.testing.assert_allclose(
            np.concatenate([pair[side].toarray() for pair in pairs]), rejected[start::2], rtol=1e-6
        )


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
    assert found.scaled.all()
    places = [("response_cluster", int(line.number[3]), "prompt", int(line.condition[3])), ("feature", 5, "global", -1)]
    lines = found.lines([*places, ("feature", WORLD.d_sae, "global", -1)])
    assert {place: found.score[line] for place, line in lines.items()} == {p: found.at(*p)["score"] for p in places}
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
