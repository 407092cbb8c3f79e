r"""How much a run has changed each feature's mean score: the best estimate, with its interval, from what a run has at hand.

Three things are known of the change of F features at a moment of a run:

- their **amplification**, from the training pairs, at no cost: the first-order change, good in rank, of unknown scale;
- a **probe**: a few rollouts of the policy, whose scores are unbiased and noisy. [`probe_change`] reads more out of them than a
  difference of means does: with the log-ratios of policy and reference on both sets of rollouts, each rollout counts by how much likelier
  it has become (bridge sampling). While the policy is near the reference this takes most of the noise away;
- how features **go together** under the reference ([`Spectrum`]): a reward that lifts one feature lifts and lowers others through their
  covariance. If the reward's weights on features are anything, with covariance \\( \tau^2 I \\), then the change of the means has covariance
  \\( \tau^2 C^2 \\), \\( C \\) that of the scores, while sampling noise has covariance \\( C/n \\): most of the noise lies where there is
  little to expect.

[`best_estimate`] puts them together: in the eigenbasis of \\( C \\), the change is normal with variance \\( \tau^2 \lambda^p + \tau_0^2 \\); probe and
amplification are two noisy readings of it, the latter scaled and with an error of its own. The five numbers are fitted to the readings
themselves (empirical Bayes, over features), so that nothing needs to be set. `benchmarks/estimates.py` measures how true the result is.

Everything here is a function of arrays: scores are standardised (`shapedpo.calibration`), changes are in standard deviations. Leave out
features that never vary. No source: ours (METHOD, section 5).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.stats import norm


Array = NDArray[np.float64]

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
        half = float(norm.ppf(0.5 + level / 2)) * self.se
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
    base, now = _finite("base", base, 2), _finite("now", now, 2)
    if base.shape[1] != now.shape[1] or min(len(base), len(now)) < 2:
        raise ValueError(
            f"Expected at least two rollouts on each side with the same features, got scores of shape {base.shape} and {now.shape}."
        )
    n0, n1 = len(base), len(now)
    share = n1 / (n0 + n1)
    if base_ratios is None or ratios is None:
        weights = np.concatenate([np.full(n0, -1 / (1 - share)), np.full(n1, 1 / share)])
    else:
        log_ratios = np.concatenate([_finite("base_ratios", base_ratios, 1), _finite("ratios", ratios, 1)])
        if len(log_ratios) != n0 + n1:
            raise ValueError(f"Expected a log-ratio for each of {n0} + {n1} rollouts, got {len(log_ratios)}.")
        weights = _bridge_weights(log_ratios, share)
    scores = np.concatenate([base, now])
    # The weights' expectation is 0: what is taken from all scores changes nothing but the noise.
    rows = weights[:, None] * (scores - scores.mean(axis=0))
    return Probe(rows.mean(axis=0), _standard_error(rows), rows)


def _bridge_weights(log_ratios: Array, share: float) -> Array:
    """`(pi - ref) / ((1 - share) ref + share pi)`, from `log(pi / ref)`; written so that nothing overflows."""
    small = np.exp(-np.abs(log_ratios))
    grown = (1 - small) / ((1 - share) * small + share)
    shrunk = (small - 1) / ((1 - share) + share * small)
    return np.where(log_ratios > 0, grown, shrunk)


@dataclass(frozen=True)
class Spectrum:
    """Eigenvectors of the scores' covariance under the reference, scaled so that the mean eigenvalue is 1.

    Attributes:
        vectors: `(F, r)`, orthonormal.
        values: `(r,)`, of these.
        rest: Eigenvalue that is assumed for the `F - r` directions without one.
    """

    vectors: Array
    values: Array
    rest: float

    @classmethod
    def of(cls, scores: ArrayLike, max_rank: int = 1024) -> Spectrum:
        """Of a sample of completions, `(N, F)` standardised scores; `N` of a thousand or more is worth having.

        What a run reads anyway will do: the calibration sample's completions together with the probe's base rollouts.
        """
        centred = _finite("scores", scores, 2)
        centred = centred - centred.mean(axis=0)
        n, f = centred.shape
        if n < 2 or not centred.any():
            raise ValueError(f"Expected two completions or more whose scores differ, got scores of shape {(n, f)}.")
        if f <= n:
            values, vectors = np.linalg.eigh(centred.T @ centred)
        else:  # the same from the Gram matrix of the completions
            values, left = np.linalg.eigh(centred @ centred.T)
            keep = values > 1e-9 * values[-1]
            values, vectors = values[keep], centred.T @ left[:, keep] / np.sqrt(values[keep])
        keep = np.argsort(-values)[:max_rank]
        total = values.sum()
        values, vectors = values[keep], vectors[:, keep]
        rest = (total - values.sum()) / (f - len(values)) if f > len(values) else 0.0
        scale = f / total
        return cls(vectors, np.maximum(values * scale, _FLOOR), max(rest * scale, _FLOOR))

    @classmethod
    def flat(cls, n_features: int) -> Spectrum:
        """Of features of which nothing is known: they vary alike and independently."""
        return cls(np.zeros((n_features, 0)), np.zeros(0), 1.0)


_FLOOR = 1e-3  # of an eigenvalue: a sample's smallest are far too small
_TINY = 1e-12  # of a variance, so that a logarithm is finite


def best_estimate(
    amplification: ArrayLike,
    amplification_se: ArrayLike,
    probe: Probe | tuple[ArrayLike, ArrayLike] | None = None,
    spectrum: Spectrum | None = None,
    calibration: Calibration | None = None,
) -> Estimate:
    """The best estimate of each feature's change.

    Args:
        amplification: `(F,)`, with its standard error:
        amplification_se: `(F,)`.
        probe: What [`probe_change`] gives, or a change and its standard error, `(F,)` each. Without it the estimate is amplification,
            by `calibration`.
        spectrum: How the features go together. Without it each feature is taken by itself.
        calibration: What an earlier probe said of amplification ([`calibrate_amplification`]); only used without a probe.

    Raises:
        ValueError: If shapes do not fit or a number is not finite.
    """
    reading, reading_se = _finite("amplification", amplification, 1), _finite("amplification_se", amplification_se, 1)
    if probe is None:
        return (calibration or Calibration()).estimate(reading, reading_se)
    value, se = _finite("the probe's change", probe[0], 1), _finite("the probe's standard error", probe[1], 1)
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
    return Estimate(*_posterior(basis, value, se, rows, reading, reading_se), name)


def _covariance_helps(flat: Spectrum, spectrum: Spectrum, probe: Probe, reading: Array, reading_se: Array) -> bool:
    """Whether half of the rollouts tells more of the other half with the spectrum than without (cross-validation in two folds)."""
    losses = {True: 0.0, False: 0.0}
    first = np.arange(len(probe.rows)) % 2 == 0
    for half in (first, ~first):
        rows, unseen = probe.rows[half], probe.rows[~half].mean(axis=0)
        se = _standard_error(rows)
        for together, basis in ((True, spectrum), (False, flat)):
            guess, _ = _posterior(basis, rows.mean(axis=0), se, rows, reading, reading_se)
            losses[together] += float(np.sum((guess - unseen) ** 2))
    return losses[True] < losses[False]


def _standard_error(rows: Array) -> Array:
    """Of the mean over rows, `(F,)`; a variance of which few rollouts tell anything leans on the other features'."""
    variance = rows.var(axis=0, ddof=1)
    return np.sqrt((0.9 * variance + 0.1 * variance.mean()) / len(rows))


def _noise(basis: Spectrum, se: Array, rows: Array | None) -> Array:
    """Variance of the probe along each direction, and at the end along one of the rest: half measured, half as scores have it."""
    f, r = basis.vectors.shape
    expected = np.mean(se**2) * np.append(basis.values, basis.rest)
    if rows is None or not r:
        return expected
    measured = (rows @ basis.vectors).var(axis=0, ddof=1) / len(rows)
    rest = max(float(np.sum(se**2) - measured.sum()), 0.0) / max(f - r, 1)
    return 0.5 * np.append(measured, rest) + 0.5 * expected


def _posterior(
    basis: Spectrum, value: Array, se: Array, rows: Array | None, reading: Array, reading_se: Array
) -> tuple[Array, Array]:
    """Fit the model by maximum likelihood, along the basis's directions; gives the change's posterior mean and standard deviation.

    Along a direction of eigenvalue l the change is normal with variance `exp(t0) l^2 + exp(t1)`; the probe reads it with its noise,
    amplification reads `exp(t2)` times the change, with its noise and an error of `exp(t3)` times the variance of what it reads.
    """
    f, r = basis.vectors.shape
    inside = basis.vectors.T @ value, basis.vectors.T @ reading
    outside = value - basis.vectors @ inside[0], reading - basis.vectors @ inside[1]
    # The directions outside the basis are alike: one entry for all, with their products' means.
    count, rest = np.append(np.ones(r), f - r), max(f - r, 1)
    zz = np.append(inside[0] ** 2, outside[0] @ outside[0] / rest)
    za = np.append(inside[0] * inside[1], outside[0] @ outside[1] / rest)
    aa = np.append(inside[1] ** 2, outside[1] @ outside[1] / rest)
    vz, va = _noise(basis, se, rows), np.mean(reading_se**2) * np.append(basis.values, basis.rest)
    vz, va = np.maximum(vz, _TINY), np.maximum(va, _TINY)
    shape = np.append(basis.values, basis.rest) ** 2
    shape = shape / (count @ shape) * f

    def parts(theta: Array) -> tuple[Array, float, Array]:
        prior, scale = np.exp(theta[0]) * shape + np.exp(theta[1]), float(np.exp(theta[2]))
        return prior, scale, scale**2 * prior * np.exp(theta[3]) + va

    def loss(theta: Array) -> float:
        prior, scale, error = parts(theta)
        v11, v12, v22 = prior + vz, scale * prior, scale**2 * prior + error
        det = v11 * v22 - v12**2
        likelihood = 0.5 * count @ (np.log(det) + (v22 * zz - 2 * v12 * za + v11 * aa) / det)
        return float(
            likelihood + 0.5 * (theta[3] / 0.5) ** 2
        )  # amplification's error is about as large as what it reads

    signal = max(value.var() - vz @ count / f, 0.1 * value.var(), _TINY)
    read = max(reading.var() - va @ count / f, 0.1 * reading.var(), _TINY)
    start = np.array([np.log(signal / 2), np.log(signal / 20), 0.5 * np.log(read / signal), 0.0])
    simplex = start + np.vstack([np.zeros(4), np.diag([-1.5, -1.5, 1.0, 0.5])])
    options = {"initial_simplex": simplex, "maxiter": 400, "xatol": 0.02, "fatol": 0.02}
    prior, scale, error = parts(minimize(loss, start, method="Nelder-Mead", options=options).x)

    variance = 1 / (1 / prior + 1 / vz + scale**2 / error)
    by_probe, by_reading = variance / vz, variance * scale / error
    mean = basis.vectors @ (by_probe[:-1] * inside[0] + by_reading[:-1] * inside[1])
    mean += by_probe[-1] * outside[0] + by_reading[-1] * outside[1]
    spread = variance[-1] + basis.vectors**2 @ (variance[:-1] - variance[-1])
    return mean, np.sqrt(spread)


@dataclass(frozen=True)
class Calibration:
    """What amplification means for the change, as long as there is no probe.

    Its error is taken as normal with variance `(slope se)^2 + (relative slope A)^2 + floor^2`. The defaults are those of
    `benchmarks/estimates.py`'s runs, taken together: the slope differs from run to run by several times.

    Attributes:
        slope: Change for an amplification of 1.
        relative: Error that grows with the amplification.
        floor: Error that all features have, standard deviations.
        name: What the estimate is called.
    """

    slope: float = 1.0
    relative: float = 1.0
    floor: float = 0.1
    name: str = "amplification"

    def estimate(self, amplification: Array, amplification_se: Array) -> Estimate:
        value = self.slope * amplification
        variance = (self.slope * amplification_se) ** 2 + (self.relative * value) ** 2 + self.floor**2
        return Estimate(value, np.sqrt(variance), self.name)


def calibrate_amplification(
    amplification: ArrayLike, amplification_se: ArrayLike, change: ArrayLike, change_se: ArrayLike
) -> Calibration:
    """What a probe says of amplification, to read it by until the next one.

    Args:
        amplification: `(F,)` at the moment of the probe, with its standard error:
        amplification_se: `(F,)`.
        change: `(F,)` that the probe showed, or the best estimate of it, with its standard error:
        change_se: `(F,)`.

    Returns:
        The default if there are fewer than `MIN_FEATURES` features or nothing has changed yet.
    """
    a, a_se = _finite("amplification", amplification, 1), _finite("amplification_se", amplification_se, 1)
    z, z_se = _finite("change", change, 1), _finite("change_se", change_se, 1)
    slope = float(a @ z / (a @ a)) if len(a) >= MIN_FEATURES and a.any() else 0.0
    if slope <= 0:
        return Calibration()
    error = (z - slope * a) ** 2 - z_se**2 - (slope * a_se) ** 2
    design = np.stack([(slope * a) ** 2, np.ones(len(a))], axis=1)
    (relative, floor), *_ = np.linalg.lstsq(design, error, rcond=None)
    if relative < 0 or floor < 0:
        relative, floor = (0.0, float(error.mean())) if relative < 0 else (float(error.sum() / design[:, 0].sum()), 0.0)
    return Calibration(
        slope, max(relative, 0.0) ** 0.5, max(floor, 0.0) ** 0.5, "amplification, scaled by the last probe"
    )


def _finite(name: str, values: ArrayLike, dimensions: int) -> Array:
    array = np.asarray(values, np.float64)
    if array.ndim != dimensions or not np.isfinite(array).all():
        raise ValueError(
            f"Expected {name} as a finite array of {dimensions} dimensions, got shape {array.shape}, "
            f"{int((~np.isfinite(array)).sum())} values not finite."
        )
    return array
