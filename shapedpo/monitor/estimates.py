"""Running estimates of what a run teaches, over a window of recent pairs: sums on the device, standard errors beside them."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


QUANTITIES = ("amplification", "pressure", "delta")
"""What is estimated of each score, in the order of a [`Window`]'s rows."""


class Estimates(NamedTuple):
    """Means over a window and their standard errors, float32.

    Attributes:
        value: `(3, F)`, one row for each of [`QUANTITIES`], sd of the score; nan where more of the window is left out than is in them.
        se: `(3, F)`; infinite where fewer than two pairs have been seen.
        left_out: `()`, the share of the window whose log-ratios were not finite, which none of this knows of.
    """

    value: Tensor
    se: Tensor
    left_out: Tensor

    def amplification(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Amplification and its standard error, `(F,)` each, of estimates on the host."""
        return self.value[0].double().numpy(), self.se[0].double().numpy()


class Window:
    r"""Exponentially weighted means of amplification, pressure and delta of F scores.

    With \\( l \\) a completion's log-ratio of policy and reference, \\( m = \beta(l(y^+) - l(y^-)) \\) and \\( d \\) a score's
    delta: amplification is the mean of \\( (l(y^+) - l(y^-))\, d/4 \\), pressure that of \\( \sigma(-m)\, d \\). A pair that lies
    `size` pairs back counts \\( 1/e \\) as much as the newest, so the state is six numbers a score, whatever the window.
    A pair whose log-ratio is not finite, as of a batch that overflowed, is left out and counted.
    Nothing here waits for the device, and nothing is exchanged between processes until [`estimates`] is asked for.

    Args:
        n_scores: Number of scores, F.
        size: The window, in pairs over all processes.
        device: Where the sums live.
    """

    def __init__(self, n_scores: int, size: int, device: torch.device) -> None:
        self.size = size
        # Sums of the weighted terms, of their squares, of the weights and theirs, and of the weights of what is left out.
        self.sums = torch.zeros(3, n_scores, device=device)
        self.squares = torch.zeros(3, n_scores, device=device)
        self.weights = torch.zeros(3, device=device)

    def update(self, apart: Tensor, beta: float, delta: Tensor, world_size: int = 1) -> None:
        """Add a batch of B pairs.

        Args:
            apart: `(B,)`, log-ratio of the chosen completion minus that of the rejected one, nats, unshaped.
            beta: DPO's.
            delta: `(B, F)`, standardised score of chosen minus rejected, finite.
            world_size: Number of processes, each of which adds as many pairs.
        """
        decay = math.exp(-len(apart) * world_size / self.size)
        known = apart.isfinite()
        factors = torch.stack([apart / 4, torch.sigmoid(-beta * apart), torch.ones_like(apart)])  # (3, B)
        factors = torch.where(known, factors, 0.0)
        self.sums.mul_(decay).addmm_(factors, delta)
        self.squares.mul_(decay**2).addmm_(factors.square(), delta.square())
        # `squares` carries squared weights: see `estimates`.
        count = known.sum()
        self.weights[0].mul_(decay).add_(count)
        self.weights[1].mul_(decay**2).add_(count)
        self.weights[2].mul_(decay).add_(len(apart) - count)

    def state(self) -> Tensor:
        """All sums as one tensor, `(6, F + 1)`, which processes add up."""
        weights = self.weights.new_zeros(6, 1)
        weights[[0, 3, 1], 0] = self.weights
        return torch.cat([torch.cat([self.sums, self.squares]), weights], dim=1)

    def load_state(self, state: Tensor) -> None:
        """Take over what [`state`] gave."""
        # Into the tensors that are there: where one begins in memory decides the last digit of what is added to it.
        sums, squares = state[:, :-1].chunk(2)
        self.sums.copy_(sums)
        self.squares.copy_(squares)
        self.weights.copy_(state[[0, 3, 1], -1])

    @staticmethod
    def estimates(state: Tensor) -> Estimates:
        r"""Means and standard errors of a state, summed over processes.

        With weights \\( w_i \\) the mean is \\( \bar x = \sum w_i x_i / \sum w_i \\) and, the pairs being independent, its
        variance is estimated by \\( \sum w_i^2 (x_i - \bar x)^2 / (\sum w_i)^2 \\), scaled by \\( n/(n-1) \\) for
        the effective number of pairs \\( n = (\sum w_i)^2 / \sum w_i^2 \\). The cross term uses
        \\( \sum w_i^2 x_i \approx \bar x \sum w_i^2 \\).
        """
        sums, squares = state[:, :-1].chunk(2)
        weight, weight_square, missing = state[[0, 3, 1], -1]
        mean = sums / weight.clamp(min=1e-30)
        spread = (squares - mean.square() * weight_square).clamp(min=0)
        n = weight.square() / weight_square.clamp(min=1e-30)
        variance = spread / weight.square().clamp(min=1e-30) * n / (n - 1).clamp(min=1e-30)
        # What a policy that has diverged was like before is no news of it.
        mean = torch.where(missing > weight, torch.nan, mean)
        left_out = missing / (weight + missing).clamp(min=1e-30)
        return Estimates(mean, torch.where(n > 1.5, variance.sqrt(), torch.inf), left_out)
