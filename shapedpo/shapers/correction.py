"""Correction: what probe rollouts tell the controller of held concepts, from time to time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


DRIFT = 0.1
"""How far a bias moves between two probes, sd of the score, where nothing says that it has moved further."""


def rollout_change(
    weights: Callable[[Tensor], Tensor], now: Tensor, before: Tensor, gates: Tensor
) -> tuple[Tensor, Tensor]:
    """How far rollouts of N prompts show C concepts more than the reference's do, and its standard error: `(C,)` float64 each.

    Each of the policy's rollouts is weighed against each of the reference's for the same prompt, as the two sides of a pair are, and
    prompts count as the gate lets them in.

    Args:
        weights: Of deltas, `(..., C)` alike: [`HoldController.weights`].
        now: `(N, K, C)`, scores of the policy's rollouts.
        before: `(N, M, C)`, of the reference's.
        gates: `(N, C)`. Not a number where nothing says how far the gate lets a prompt in: then nothing is known of the concept.
    """
    deltas = (now[:, :, None] - before[:, None]).cpu().double()  # (N, K, M, C)
    shown = weights(deltas).mean(dim=(1, 2))  # (N, C)
    gates = gates.cpu().double()
    total = gates.sum(dim=0)
    mean = (gates * shown).sum(dim=0) / total
    n = total**2 / gates.square().sum(dim=0)  # prompts, effectively
    error = (gates * (shown - mean)).square().sum(dim=0).sqrt() / total * (n / (n - 1)).sqrt()
    return mean, torch.where(n > 1, error, torch.nan)


class Bias:
    """Tracks what to add to a reading of C concepts to get the true change of their mean scores: a Kalman filter.

    Before training the bias is none, for sure. Between two probes doubt about it grows by a drift and by the reading's own noise, and where
    rollouts are more of a surprise than that and their own error explain, to what does explain them (maximum likelihood): so what moves
    far is followed at once, and noise is not.

    Source: ours; adaptive noise as in R. K. Mehra, "On the identification of variances and adaptive Kalman filtering", IEEE Transactions on
    Automatic Control 15 (1970).

    Attributes:
        value: `(C,)` float64, sd of the score.
        doubt: `(C,)` float64, its variance after the last probe.
        probed: `(C,)` float64, 1 where a probe has shown it.
    """

    def __init__(self, concepts: int) -> None:
        self.value, self.doubt, self.probed = torch.zeros(3, concepts, dtype=torch.float64)

    def correct(self, reading: Tensor, noise: Tensor, change: Tensor, error: Tensor) -> None:
        """Learn from a probe.

        Args:
            reading: `(C,)`, not corrected, sd of the score.
            noise: `(C,)`, its standard errors.
            change: `(C,)`, what the rollouts show.
            error: `(C,)`, its standard errors. Not finite: not measured.
        """
        known = change.isfinite() & error.isfinite()
        surprise = change.where(known, 0) - reading - self.value
        variance = error.where(known, 1) ** 2
        doubt = torch.maximum(self.doubt + DRIFT**2 + noise**2, surprise**2 - variance)
        gain = doubt / (doubt + variance)
        self.value = torch.where(known, self.value + gain * surprise, self.value)
        self.doubt = torch.where(known, (1 - gain) * doubt, self.doubt)
        self.probed = torch.where(known, 1.0, self.probed)

    def state(self) -> dict[str, Tensor]:
        """All that it goes on from, by name."""
        return {"bias": self.value, "doubt": self.doubt, "probed": self.probed}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state."""
        self.value, self.doubt, self.probed = (state[name] for name in ("bias", "doubt", "probed"))
