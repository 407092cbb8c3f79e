"""The estimators on worlds whose truth is known in closed form."""

from __future__ import annotations

import numpy as np
import pytest

from shapedpo.monitor.estimators import (
    LIMIT,
    MAX_GROWTH,
    MIN_FEATURES,
    Estimate,
    Past,
    Spectrum,
    best_estimate,
    probe_change,
)


def tilted(draw: np.random.Generator, n0: int, n1: int, theta: np.ndarray) -> tuple[np.ndarray, ...]:
    """Rollouts of `N(0, I)` and of the same tilted by `exp(theta x)`, which is `N(theta, I)`, and their log-ratios."""
    base, now = draw.normal(size=(n0, len(theta))), theta + draw.normal(size=(n1, len(theta)))
    return base, now, base @ theta - theta @ theta / 2, now @ theta - theta @ theta / 2


# --- the probe ---------------------------------------------------------------------------------------------------------------------


def test_bridge_finds_the_change_with_a_fraction_of_the_noise_near_the_reference() -> None:
    draw, theta = np.random.default_rng(0), np.array([0.2, -0.1, 0.0])
    bridged, means, errors = [], [], []
    for _ in range(300):
        rollouts = tilted(draw, 200, 50, theta)
        probe = probe_change(*rollouts)
        bridged.append(probe.value)
        errors.append(probe.se)
        means.append(probe_change(*rollouts[:2]).value)
    found, noise = np.mean(bridged, axis=0), np.std(bridged, axis=0)
    np.testing.assert_allclose(found, theta, atol=4 * noise.max() / 300**0.5)  # unbiased
    assert (noise < 0.4 * np.std(means, axis=0)).all()
    np.testing.assert_allclose(np.mean(errors, axis=0), noise, rtol=0.2)  # and it knows how noisy it is


def test_far_from_the_reference_and_without_ratios_it_is_the_difference_of_means() -> None:
    draw = np.random.default_rng(1)
    base, now = draw.normal(size=(40, 5)), 1 + draw.normal(size=(16, 5))
    expected = now.mean(axis=0) - base.mean(axis=0)
    np.testing.assert_allclose(probe_change(base, now).value, expected, rtol=1e-12)
    far = probe_change(base, now, np.full(40, -2000.0), np.full(16, 2000.0))  # exp of either overflows or vanishes
    np.testing.assert_allclose(far.value, expected, rtol=1e-12)
    np.testing.assert_allclose(far.rows.mean(axis=0), far.value)


def test_a_model_that_has_not_moved_shows_no_change_at_all() -> None:
    draw = np.random.default_rng(2)
    probe = probe_change(draw.normal(size=(20, 3)), draw.normal(size=(20, 3)), np.zeros(20), np.zeros(20))
    assert (probe.value == 0).all()
    assert (probe.se == 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((4, 3)), np.zeros((4, 2))), "same features"),
        ((np.zeros((4, 3)), np.zeros((1, 3))), "at least two rollouts"),
        ((np.zeros((4, 3)), np.full((4, 3), np.nan)), "12 values not finite"),
        ((np.zeros((4, 3)), np.zeros((4, 3)), np.zeros(3), np.zeros(4)), "log-ratio for each of 4 \\+ 4"),
        ((np.zeros(4), np.zeros((4, 3))), "2 dimensions"),
    ],
)
def test_probe_refuses_what_does_not_fit(arguments: tuple[np.ndarray, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        probe_change(*arguments)


# --- the spectrum ------------------------------------------------------------------------------------------------------------------


def test_spectrum_is_the_covariance_whichever_side_is_longer() -> None:
    draw = np.random.default_rng(3)
    scores = draw.normal(size=(30, 12)) @ draw.normal(size=(12, 12))
    covariance = np.cov(scores.T)
    spectrum = Spectrum.of(scores)
    rebuilt = spectrum.vectors * spectrum.values @ spectrum.vectors.T
    np.testing.assert_allclose(
        rebuilt, covariance * 12 / np.trace(covariance), atol=2e-3
    )  # up to the smallest ones' floor
    wide = Spectrum.of(scores[:8])  # fewer completions than features: by their Gram matrix
    assert wide.vectors.shape == (12, 7)
    np.testing.assert_allclose(wide.vectors.T @ wide.vectors, np.eye(7), atol=1e-9)
    few = np.cov(scores[:8].T)
    np.testing.assert_allclose(wide.vectors * wide.values @ wide.vectors.T, few * 12 / np.trace(few), atol=2e-3)


def test_cut_spectrum_keeps_the_total_variance() -> None:
    spectrum = Spectrum.of(np.random.default_rng(4).normal(size=(100, 20)), max_rank=5)
    assert spectrum.vectors.shape == (20, 5)
    np.testing.assert_allclose(spectrum.values.sum() + 15 * spectrum.rest, 20)


def test_spectrum_refuses_completions_that_do_not_differ() -> None:
    with pytest.raises(ValueError, match="whose scores differ"):
        Spectrum.of(np.ones((5, 3)))


# --- the estimate ------------------------------------------------------------------------------------------------------------------


class World:
    """Features with a few strong directions, moved by a reward on all of them; amplification is off in scale, and in part of what it says."""

    def __init__(self, seed: int, n: int = 64, strength: float = 0.05, gauge_error: float = 0.7) -> None:
        draw = np.random.default_rng(seed)
        f = 200
        mix = draw.normal(size=(f, f)) / (1 + np.arange(f)) ** 0.4
        mix /= np.linalg.norm(mix, axis=1, keepdims=True)  # scores have variance 1
        covariance = mix @ mix.T
        self.change, wrong = (strength * covariance @ draw.normal(size=f) for _ in range(2))
        base, now = draw.normal(size=(256, f)) @ mix.T, self.change + draw.normal(size=(n, f)) @ mix.T
        self.probe = probe_change(base, now)
        self.reading = 3 * (self.change + gauge_error * wrong)
        self.reading_se = np.full(f, 0.05 * self.reading.std())
        self.spectrum = Spectrum.of(draw.normal(size=(1000, f)) @ mix.T)

    def error(self, guess: np.ndarray) -> float:
        return float(np.mean((guess - self.change) ** 2))


def test_best_estimate_beats_what_it_is_made_of_and_its_intervals_hold() -> None:
    worlds = [World(seed) for seed in range(12)]
    best = [best_estimate(world.reading, world.reading_se, world.probe, world.spectrum) for world in worlds]
    alone = [best_estimate(world.reading, world.reading_se, world.probe) for world in worlds]

    def mean_error(guesses: list[np.ndarray]) -> float:
        return float(np.mean([world.error(guess) for world, guess in zip(worlds, guesses, strict=True)]))

    probe = mean_error([world.probe.value for world in worlds])
    scaled = mean_error([world.reading / 3 for world in worlds])  # as if its scale were known
    without = mean_error([guess.value for guess in alone])
    assert without < 0.8 * min(probe, scaled)
    assert mean_error([guess.value for guess in best]) < without
    assert sum("covariance" in guess.name for guess in best) >= 6

    for level in (0.9, 0.95):
        inside = []
        for world, guess in zip(worlds, best, strict=True):
            low, high = guess.interval(level)
            inside.append(np.mean((low <= world.change) & (world.change <= high)))
        assert np.mean(inside) == pytest.approx(level, abs=0.07)
    slopes = [np.polyfit(guess.value, world.change, 1)[0] for world, guess in zip(worlds, best, strict=True)]
    assert np.mean(slopes) == pytest.approx(1, abs=0.2)


def test_amplification_that_says_nothing_does_little_harm() -> None:
    draw, ratios = np.random.default_rng(5), []
    for seed in range(6):
        world = World(seed, n=256, strength=0.1)
        nonsense = draw.normal(size=len(world.change))
        guess = best_estimate(nonsense, np.full_like(nonsense, 0.1), world.probe)
        ratios.append(world.error(guess.value) / world.error(world.probe.value))
    assert np.mean(ratios) < 1.1


def test_a_feature_unlike_the_others_stays_near_what_the_rollouts_say() -> None:
    world = World(6)
    value, se = world.probe.value.copy(), world.probe.se
    value[0] = 5.0
    guess = best_estimate(world.reading, world.reading_se, (value, se))
    assert (np.abs(guess.value - value) <= LIMIT * se + 1e-12).all()
    assert guess.value[0] > 4.5


def test_before_the_first_step_nothing_has_changed() -> None:
    f = 2 * MIN_FEATURES
    rollouts = np.random.default_rng(7).normal(size=(20, f))
    probe = probe_change(rollouts, rollouts, np.zeros(20), np.zeros(20))
    guess = best_estimate(np.zeros(f), np.zeros(f), probe, Spectrum.of(rollouts))
    np.testing.assert_allclose(guess.value, 0, atol=1e-6)
    assert np.isfinite(guess.se).all()


def test_few_features_are_taken_as_the_rollouts_have_them() -> None:
    value, se = np.array([0.3, -0.1]), np.array([0.1, 0.2])
    guess = best_estimate([5.0, 5.0], [0.1, 0.1], (value, se))
    assert guess.name == "probe rollouts"
    np.testing.assert_array_equal(guess.value, value)
    np.testing.assert_array_equal(guess.se, se)


def test_without_a_probe_or_a_past_it_is_amplification_with_a_wide_interval() -> None:
    guess = best_estimate([1.0, -2.0, 0.0], [0.1, 0.1, 0.1])
    assert guess.name == "amplification"
    np.testing.assert_array_equal(guess.value, [1.0, -2.0, 0.0])
    assert (guess.se > [1.0, 2.0, 0.1]).all()


def test_between_probes_the_last_estimate_grows_as_amplification_does() -> None:
    draw = np.random.default_rng(8)
    reading = draw.normal(size=500)
    past = Past(Estimate(draw.normal(size=500), np.full(500, 0.1), "then"), reading)
    guess = best_estimate(1.5 * reading, np.zeros(500), past=past)
    np.testing.assert_allclose(guess.value, 1.5 * past.estimate.value)
    assert (guess.se > 0.15).all()
    still = best_estimate(np.zeros(500), np.zeros(500), past=Past(past.estimate, np.zeros(500)))
    np.testing.assert_array_equal(still.value, past.estimate.value)  # nothing to measure growth by
    wild = best_estimate(100 * reading, np.zeros(500), past=past)
    np.testing.assert_allclose(wild.value, MAX_GROWTH * past.estimate.value)
    with pytest.raises(ValueError, match="of the past 500 and 500 estimates"):
        best_estimate(np.zeros(3), np.zeros(3), past=past)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros(20), np.zeros(20), (np.zeros(19), np.zeros(19))), "one value a feature"),
        ((np.full(20, np.inf), np.zeros(20), None), "20 values not finite"),
        ((np.zeros(20), np.zeros(20), (np.zeros(20), np.ones(20)), Spectrum.flat(3)), "spectrum is of 3 features"),
    ],
)
def test_best_estimate_refuses_what_does_not_fit(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        best_estimate(*arguments)
