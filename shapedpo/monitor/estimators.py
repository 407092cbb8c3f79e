r"""How much a run has changed each feature's mean score: the best estimate, with its interval, from what a run has at hand.

Three things are known of the change of F features at a moment of a run:

- their **amplification**, from the training pairs, at no cost: the first-order change, good in rank, of unknown scale;
- a **probe**: a few rollouts, unbiased and noisy. [`probe_change`] reads more out of them than a difference of means does: by the log-ratios
  of policy and reference, each rollout counts by how much likelier it has become (bridge sampling, Meng and Wong 1996), which takes most
  of the noise away while the policy is near the reference;
- how features **go together** ([`Spectrum`]): a reward on some features moves others through the covariance \\( C \\) of the scores. If the
  reward's weights have covariance \\( \tau^2 I \\), the change has \\( \tau^2 C^2 \\), and sampling noise \\( C/n \\): most of the noise lies where
  there is little to expect.

[`best_estimate`] puts them together: along the eigenvectors of \\( C \\) the change is normal, and probe and amplification are two noisy readings
of it, the latter scaled and with an error of its own. What the model needs to know is fitted to the readings, over features (empirical
Bayes); whether \\( C \\) helps is decided by cross-validation. `benchmarks/estimates.py` measures how true the result is.

Everything is a function of arrays: scores are standardised on the training data, changes are in its standard deviations. Leave out
features that never vary. Source: ours.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtri

from .posterior import Array, Spectrum, finite, posterior


LIMIT = 1.5
"""How far an estimate may be from what the rollouts alone say, in their standard errors."""
UNPROBED_SE = 0.1
"""Standard deviations by which a feature may have changed of which amplification says nothing."""
CARRIED_ERROR = 0.3
"""Error of an estimate that was carried forward, as a share of the features' root mean square change (of a few, of each one's own)."""
MAX_GROWTH = 3.0
"""Bound on the growth since the last probe: amplification near a run's start is mostly noise."""
MIN_FEATURES = 16
"""With fewer features there is nothing to learn amplification's scale from, and the probe is taken as it is."""


class Estimate(NamedTuple):
    """Estimates of F features' changes.

    Attributes:
        value: `(F,)` change of the mean score, standard deviations.
        se: `(F,)` its standard error: `value ± 1.64 se` is meant to hold the truth 90 times in 100.
        name: What was estimated from what, for people.
    """

    value: Array
    se: Array
    name: str

    def interval(self, level: float = 0.9) -> tuple[Array, Array]:
        """Lower and upper end of the interval at `level`, `(F,)` each."""
        half = float(ndtri(0.5 + level / 2)) * self.se
        return self.value - half, self.value + half


class Probe(NamedTuple):
    """The change that rollouts show.

    Attributes:
        value: `(F,)`, standard deviations.
        se: `(F,)`.
        rows: `(N, F)` what each rollout adds: `value` is their mean and `se` its standard error.
    """

    value: Array
    se: Array
    rows: Array


def probe_change(
    base: ArrayLike, now: ArrayLike, base_ratios: ArrayLike | None = None, ratios: ArrayLike | None = None
) -> Probe:
    r"""The change of the mean scores from reference to policy, from rollouts of both.

    With log-ratios, all rollouts are taken as drawn from the mixture of both models, \\( q = (n_0\,\text{ref} + n_1\,\pi)/(n_0 + n_1) \\),
    and the change \\( E_q[s\,(\pi - \text{ref})/q] \\) is their mean; the weight of a rollout needs its log-ratio only. Without them it is the
    difference of the means. The prompts of both sets should be drawn alike; they need not be the same.

    Args:
        base: `(n0, F)` standardised scores of rollouts of the reference, sampled once, before training.
        now: `(n1, F)` those of the policy's.
        base_ratios: `(n0,)` log-ratio of policy and reference, nats, of each base rollout: one forward pass of the policy over them.
        ratios: `(n1,)` the same of the policy's rollouts.

    Raises:
        ValueError: If shapes do not fit, a number is not finite, or there are fewer than two rollouts on a side.
    """
    base, now = finite("base", base, 2), finite("now", now, 2)
    if base.shape[1] != now.shape[1] or min(len(base), len(now)) < 2:
        raise ValueError(
            f"Expected at least two rollouts on each side with the same features, got scores of shape {base.shape} and {now.shape}."
        )
    n0, n1 = len(base), len(now)
    share = n1 / (n0 + n1)
    if base_ratios is None or ratios is None:
        weights = np.concatenate([np.full(n0, -1 / (1 - share)), np.full(n1, 1 / share)])
    else:
        log_ratios = np.concatenate([finite("base_ratios", base_ratios, 1), finite("ratios", ratios, 1)])
        if len(log_ratios) != n0 + n1:
            raise ValueError(f"Expected a log-ratio for each of {n0} + {n1} rollouts, got {len(log_ratios)}.")
        weights = bridge_weights(log_ratios, share)
    scores = np.concatenate([base, now])
    # The weights' expectation is 0: what is taken from all scores changes nothing but the noise.
    rows = weights[:, None] * (scores - scores.mean(axis=0))
    return Probe(rows.mean(axis=0), _standard_error(rows), rows)


def bridge_weights(log_ratios: Array, share: float) -> Array:
    """`(pi - ref) / ((1 - share) ref + share pi)`, from `log(pi / ref)`; written so that nothing overflows."""
    small = np.exp(-np.abs(log_ratios))
    grown = (1 - small) / ((1 - share) * small + share)
    shrunk = (small - 1) / ((1 - share) + share * small)
    return np.where(log_ratios > 0, grown, shrunk)


class Past(NamedTuple):
    """What was known at an earlier probe.

    Attributes:
        estimate: The best estimate then.
        amplification: `(F,)`, as it was then.
    """

    estimate: Estimate
    amplification: ArrayLike


def best_estimate(
    amplification: ArrayLike,
    amplification_se: ArrayLike,
    probe: Probe | tuple[ArrayLike, ArrayLike] | None = None,
    spectrum: Spectrum | None = None,
    past: Past | None = None,
) -> Estimate:
    """The best estimate of each feature's change.

    Args:
        amplification: `(F,)`, with its standard error:
        amplification_se: `(F,)`.
        probe: What [`probe_change`] gives, or a change and its standard error, `(F,)` each.
        spectrum: How the features go together. Without it each feature is taken by itself.
        past: The estimate at an earlier probe, for a moment without one.

    Returns:
        With a probe, the posterior; of fewer than `MIN_FEATURES` features, the probe's own figures. Named concepts are best asked for
        apart from the features: they are chosen because they move, so what most features do says little of them. Without a probe,
        the past estimate, grown as amplification has grown since; without that, amplification itself, with an interval as wide as the
        spread between runs calls for.

    Raises:
        ValueError: If shapes do not fit or a number is not finite.
    """
    reading, reading_se = finite("amplification", amplification, 1), finite("amplification_se", amplification_se, 1)
    if probe is None:
        return _unprobed(reading, reading_se) if past is None else _carried(past, reading)
    value, se = finite("the probe's change", probe[0], 1), finite("the probe's standard error", probe[1], 1)
    if not len(value) == len(se) == len(reading) == len(reading_se):
        raise ValueError(
            f"Expected one value a feature, got {len(reading)} amplifications ({len(reading_se)} standard errors) and {len(value)} "
            f"changes of a probe ({len(se)} standard errors)."
        )
    if len(value) < MIN_FEATURES:
        return Estimate(value, se, "probe rollouts")
    if spectrum is not None and len(spectrum.vectors) != len(value):
        raise ValueError(f"The spectrum is of {len(spectrum.vectors)} features, the estimates of {len(value)}.")
    flat = Spectrum.flat(len(value))
    together = (
        spectrum is not None
        and isinstance(probe, Probe)
        and _covariance_helps(flat, spectrum, probe, reading, reading_se)
    )
    basis = spectrum if spectrum is not None and together else flat
    rows = probe.rows if isinstance(probe, Probe) else None
    name = "probe rollouts with amplification" + (" and the features' covariance" if together else "")
    mean, spread = posterior(basis, value, se, rows, reading, reading_se)
    # A feature that most others say nothing of is not drawn in to them (limited translation, Efron and Morris 1972).
    limited = np.clip(mean, value - LIMIT * se, value + LIMIT * se)
    return Estimate(limited, np.where(limited == mean, spread, se), name)


def unprobed(amplification: Array, amplification_se: Array, past: Past | None = None) -> Estimate:
    """The best estimate at a moment without a probe: nan where amplification is not finite, of a single pair or a policy that has diverged."""
    if not np.isfinite([amplification, amplification_se]).all():
        unknown = np.full(len(amplification), np.nan)
        return Estimate(unknown, unknown, "amplification")
    return best_estimate(amplification, amplification_se, past=past)


def _covariance_helps(flat: Spectrum, spectrum: Spectrum, probe: Probe, reading: Array, reading_se: Array) -> bool:
    """Whether half of the rollouts tells more of the other half with the spectrum than without (cross-validation in two folds)."""
    losses = {True: 0.0, False: 0.0}
    first = np.arange(len(probe.rows)) % 2 == 0
    for half in (first, ~first):
        rows, unseen = probe.rows[half], probe.rows[~half].mean(axis=0)
        se = _standard_error(rows)
        for together, basis in ((True, spectrum), (False, flat)):
            guess, _ = posterior(basis, rows.mean(axis=0), se, rows, reading, reading_se)
            losses[together] += float(np.sum((guess - unseen) ** 2))
    return losses[True] < losses[False]


def _standard_error(rows: Array) -> Array:
    """Of the mean over rows, `(F,)`; a variance of which few rollouts tell anything leans on the other features'."""
    variance = rows.var(axis=0, ddof=1)
    return np.sqrt((0.9 * variance + 0.1 * variance.mean()) / len(rows))


def _unprobed(reading: Array, reading_se: Array) -> Estimate:
    """Amplification as it stands. Its scale differs from run to run by several times, so its error is as large as itself."""
    return Estimate(reading, np.sqrt(reading_se**2 + reading**2 + UNPROBED_SE**2), "amplification")


def _carried(past: Past, reading: Array) -> Estimate:
    """The past estimate times amplification's growth along itself."""
    then = finite("the past amplification", past.amplification, 1)
    if not len(then) == len(past.estimate.value) == len(reading):
        raise ValueError(
            f"Expected one value a feature, got {len(reading)} amplifications, and of the past {len(then)} and "
            f"{len(past.estimate.value)} estimates."
        )
    if np.array_equal(reading, then):  # nothing has been trained on since
        return Estimate(past.estimate.value, past.estimate.se, "last probe")
    growth = float(np.clip(reading @ then / (then @ then), 0.0, MAX_GROWTH)) if then.any() else 1.0
    value = growth * past.estimate.value
    # Of many features the usual change; a few named concepts have little to do with each other.
    size = np.sqrt(np.mean(value**2)) if len(value) >= MIN_FEATURES else np.abs(value)
    error = np.hypot(growth * past.estimate.se, CARRIED_ERROR * size)
    return Estimate(value, error, "last probe, carried forward by amplification")
