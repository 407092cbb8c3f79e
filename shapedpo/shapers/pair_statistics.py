"""Statistics of pairs that the controller of held concepts acts on."""

from __future__ import annotations

import math

import torch
from torch import Tensor


FEWEST = 8
"""Values that must count in a mean, effectively."""
AGREE = 1.5
"""Standard errors within which a mean over more pairs must agree with one over fewer."""
MIDDLE = 0.3
"""Share of their typical size at which deltas count half."""
RIDGE = 1e-3
"""Of the second moments, relative, so that concepts that go together share the work."""
LEAST = 0.05
"""Share of its second moment that a concept is taken to have of its own at least: pulls are never more than 20 times those without sparing, nor reversed."""


def presence(deltas: Tensor, size: Tensor) -> Tensor:
    r"""Whether one side of a pair shows the concept and the other does not: about 1, -1 (the rejected one does) or 0.

    That is \\( x^8/(x^8 + 1) \\) of the delta's sign, with \\( x = d/(0.3\,\text{size}) \\). The readout's noise vanishes, and loud and quiet
    ways of showing the concept count the same. If deltas counted as they are, only the sum of the scores would be held: loud ways would
    become rare and quiet ones frequent.

    Args:
        deltas: `(N, C)`.
        size: `(C,)`, of [`typical_size`].
    """
    x = (deltas / (MIDDLE * size)) ** 8
    return deltas.sign() * (x / (1 + x)).nan_to_num(1.0)


def robust_spread(values: Tensor) -> float:
    """Standard deviation of a bell that has the same median absolute deviation: what a few large values do not change. 0 of no values."""
    return 1.4826 * float((values - values.median()).abs().median()) if len(values) else 0.0


def typical_size(deltas: Tensor) -> Tensor:
    """Size of the deltas of pairs that show the concept on one side: `(N, C)` to `(C,)`.

    The root mean square, each delta weighted by its own square: a few large ones count, and many small ones do not.
    """
    square = deltas.double().square()
    return (square.square().sum(dim=0) / square.sum(dim=0)).sqrt().nan_to_num(1.0).clamp(min=1e-6)


def pulls(weights: Tensor, pressure: Tensor, along: Tensor | None = None, counts: Tensor | float = 1.0) -> Tensor:
    """What to take off pulls for one sd of what they act along, `(C,)`, so that no pressure is left: weighted least squares.

    Args:
        weights: `(N, C)`.
        pressure: `(C,)`, the mean of pulls times what their pair counts times the weights.
        along: `(N, C)`, what the pulls act along: by default the weights, else a part of them.
        counts: `(N, 1)`, what each pair counts.
    """
    weighted = counts * weights
    moments = weighted.T @ (weights if along is None else along) / len(weights)
    own = moments.diag()
    floor = torch.maximum(own, LEAST * (weighted * weights).mean(dim=0)) - own
    return torch.linalg.solve(moments + torch.diag(floor + RIDGE * (own + floor) + 1e-12), pressure)


def shared(weights: Tensor, others: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
    """How much of each of C concepts' weights goes with others, by least squares on the rows of its gate: `(S, C)`.

    What is left of the weights has mean products of 0 with the others: to pull along it changes nothing of what all pairs together teach of them.

    Args:
        weights: `(N, C)`.
        others: `(N, S)`.
        gates: `(N, C)`.
        chosen: `(S, C)` bool, which of the others each concept is told apart from.
    """
    found = torch.zeros_like(chosen, dtype=weights.dtype)
    for c, which in enumerate(chosen.T):
        gate = gates[:, c : c + 1]
        both = (gate * others[:, which] * weights[:, c : c + 1]).mean(dim=0)
        found[which, c] = pulls(others[:, which], both, counts=gate)
    return found


def recent_mean(values: Tensor, shortest: int) -> tuple[float, float]:
    """Mean of the latest values and its standard error: of as many as agree with the latest of all.

    Looks back twice as far, again and again, while the intervals of all the means so far have a point in common (Lepski's rule). So it
    follows what moves fast without delay, and averages over all there is where nothing moves.

    Args:
        values: `(N,)`, oldest first.
        shortest: How far to look back in any case.
    """
    low, high, best, length = -math.inf, math.inf, (0.0, 0.0), shortest
    while len(values):
        part = values[-length:]
        # A rare concept's values are mostly 0: too few others, and neither mean nor error would mean anything.
        few = float(part.abs().sum() ** 2) < FEWEST * float(part.square().sum()) or not part.any()
        if few and length < len(values):
            length *= 2
            continue
        mean, error = float(part.mean()), float(part.std(correction=0)) / math.sqrt(len(part))
        low, high = max(low, mean - AGREE * error), min(high, mean + AGREE * error)
        if low > high:
            break
        best = mean, error
        if length >= len(values):
            break
        length *= 2
    return best
