"""Which features of an SAE tell responses that show a concept from those that do not, hard ones above all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import expit

from .check import auroc


MAX_FEATURES = 8
CANDIDATES = 150
"""Features looked at, those that responses with the concept raise most."""
BEAM = 8
"""Sets of each size that are kept while the best is looked for."""
WORTH = 0.004
"""Nats of log-loss that a further feature must save."""
ALL_NEGATIVES = 4.0
"""What all negatives together weigh against one kind of hard ones."""


def concept_score(pooled: np.ndarray, features: Sequence[int], mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """The concept's score (N,): the mean of its features, each standardised by `mean` and `std` (d_sae,)."""
    columns = list(features)
    return ((pooled[:, columns] - mean[columns]) / np.maximum(std[columns], 1e-6)).mean(axis=1)


def hard_auroc(scores: np.ndarray, shown: np.ndarray, hard: Sequence[np.ndarray]) -> list[float]:
    """How well a score (N,) tells responses that show the concept from each kind of hard negatives, (N,) bool."""
    return [float(auroc(scores[shown | kind], shown[shown | kind])) for kind in hard]


def balanced_weights(shown: np.ndarray, hard: Sequence[np.ndarray] = ()) -> np.ndarray:
    """Weights (N,) of responses, mean 1: half for those that show the concept, half for the others.

    Of the others' half, each kind of hard negatives has as much as one another, however rare it is (praise, for cheer), and all negatives
    together [`ALL_NEGATIVES`] times that.

    Args:
        shown: (N,) bool.
        hard: Kinds of hard negatives, (N,) bool each.
    """
    negative = np.where(shown, 0.0, ALL_NEGATIVES / (~shown).sum())
    for kind in hard:
        if kind.any():
            negative += kind / kind.sum()
    weights: np.ndarray = np.where(shown, 0.5 / shown.sum(), 0.5 * negative / negative.sum()) * len(shown)
    return weights


def best_sets(
    pooled: np.ndarray, shown: np.ndarray, weights: np.ndarray, max_features: int = MAX_FEATURES
) -> list[tuple[float, list[int]]]:
    """The best set of features of each size from 1, with its log-loss.

    A set is as good as the log-loss of a logistic regression on its one score. Sets grow one feature at a time, and the best [`BEAM`] of each
    size are kept.

    Args:
        pooled: (N, d_sae).
        shown: (N,) bool.
        weights: (N,), mean 1.
        max_features: Size of the largest.
    """
    z = (pooled - pooled.mean(axis=0)) / np.maximum(pooled.std(axis=0), 1e-6)
    candidates = np.argsort(-(z[shown].mean(axis=0) - z[~shown].mean(axis=0)))[:CANDIDATES]
    beam: dict[tuple[int, ...], tuple[float, np.ndarray]] = {(): (np.inf, np.zeros(len(z)))}
    best: list[tuple[float, list[int]]] = []
    for size in range(1, min(max_features, len(candidates)) + 1):
        grown: dict[tuple[int, ...], tuple[float, np.ndarray]] = {}
        for features, (_, total) in beam.items():
            rest = [int(c) for c in candidates if c not in features]
            losses = log_losses((total[:, None] + z[:, rest]) / size, shown, weights)
            for i in np.argsort(losses)[:BEAM]:
                grown[tuple(sorted((*features, rest[i])))] = float(losses[i]), total + z[:, rest[i]]
        beam = dict(sorted(grown.items(), key=lambda entry: entry[1][0])[:BEAM])
        loss, found = min((loss, features) for features, (loss, _) in beam.items())
        best.append((loss, list(found)))
    return best


def worthwhile(sets: Sequence[tuple[float, list[int]]]) -> list[int]:
    """Of the best sets of each size the smallest that no larger one beats by [`WORTH`] a feature."""
    return min(sets, key=lambda entry: entry[0] + WORTH * len(entry[1]))[1]


def log_losses(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted log-loss of the logistic regression of `labels` on each column of `scores`, by Newton's method.

    Args:
        scores: (N, F).
        labels: (N,) bool.
        weights: (N,), mean 1.

    Returns:
        (F,), nats.
    """
    x = (scores - scores.mean(axis=0)) / np.maximum(scores.std(axis=0), 1e-6)
    y, w = labels[:, None], weights[:, None]
    a, b = np.zeros(x.shape[1]), np.ones(x.shape[1])
    for step in range(13):
        p = expit(np.clip(a + b * x, -30, 30))
        if step == 12:
            break
        g, h = w * (y - p), w * p * (1 - p)
        ridge = 1e-3 * len(x)  # where a score separates the labels, the best slope would be infinite
        haa, hab, hbb = h.sum(axis=0) + ridge, (h * x).sum(axis=0), (h * x * x).sum(axis=0) + ridge
        ga, gb = g.sum(axis=0), (g * x).sum(axis=0)
        a += np.clip((hbb * ga - hab * gb) / (haa * hbb - hab**2), -3, 3)
        b += np.clip((haa * gb - hab * ga) / (haa * hbb - hab**2), -3, 3)
    loss: np.ndarray = -(w * np.log(np.maximum(np.where(y, p, 1 - p), 1e-9))).mean(axis=0)
    return loss
