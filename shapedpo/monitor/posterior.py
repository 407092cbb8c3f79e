"""How features go together, and what follows for two noisy readings of their change: the algebra behind [`estimators`]."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize


Array = NDArray[np.float64]

_FLOOR = 1e-3  # of an eigenvalue: a sample's smallest are far too small
_TINY = 1e-12  # of a variance, so that a logarithm is finite


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
        """Of a sample of completions, `(N, F)` standardised scores.

        What a run reads anyway will do: the calibration sample's completions together with the probe's base rollouts. A few hundred
        are too few to say anything (`best_estimate` then leaves the covariance out); from 1,500 on it helps. A `max_rank` of 256 gave as
        much as the whole in `benchmarks/estimates.py`'s runs.
        """
        centred = finite("scores", scores, 2)
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


def _noise(basis: Spectrum, se: Array, rows: Array | None) -> Array:
    """Variance of the probe along each direction, and at the end along one of the rest: half measured, half as scores have it."""
    f, r = basis.vectors.shape
    expected = np.mean(se**2) * np.append(basis.values, basis.rest)
    if rows is None or not r:
        return expected
    measured = (rows @ basis.vectors).var(axis=0, ddof=1) / len(rows)
    rest = max(float(np.sum(se**2) - measured.sum()), 0.0) / max(f - r, 1)
    return 0.5 * np.append(measured, rest) + 0.5 * expected


def posterior(
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


def finite(name: str, values: ArrayLike, dimensions: int) -> Array:
    array = np.asarray(values, np.float64)
    if array.ndim != dimensions or not np.isfinite(array).all():
        raise ValueError(
            f"Expected {name} as a finite array of {dimensions} dimensions, got shape {array.shape}, "
            f"{int((~np.isfinite(array)).sum())} values not finite."
        )
    return array
