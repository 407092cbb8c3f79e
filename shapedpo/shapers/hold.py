r"""Hold: a controller that finds the strengths at which concepts stay where the reference has them.

Write \\( m_i \\) for a pair's unshaped margin, \\( l_i = m_i/\beta \\) for its log-ratio of chosen to rejected, \\( x_{ic} \\) for its gated
delta, and \\( w_{ic} \\) for what of that delta is above the readout's noise ([`clear`]). Under reward shaping of strengths \\( \lambda \\)
the loss still pushes concept c by the *shaped pressure* \\( P_c(\lambda) = \overline{\sigma(-m_i - \sum_k \lambda_k x_{ik})\, w_{ic}} \\).
What it has pushed so far is the unshaped amplification \\( A_c = \overline{l_i\, w_{ic}}/4 \\): the integral of the pressure, and of what
leaks in from other lessons. After each optimizer step the controller

1. reads \\( A_c \\) off recent pairs, as many as agree with the latest ([`recent_mean`]), shrunk by how much of it may be noise;
2. asks for the pressure that undoes it, \\( p_c = -\kappa\,(A_c - \mathrm{target}_c) - \epsilon\, P_c(0) \\), the last term for what the
   readout does not see;
3. finds the strengths that exert it, \\( P(\lambda) = p \\), for all held concepts together ([`solve_strengths`]).

Line 3 is a regression of the preference on the deltas (Bradley-Terry), with the margins as its offsets. On the calibration sample,
before the first step (\\( m = A = 0 \\)), its solution is the strength that explains away what the data says of the concepts: runs start
with it. Because line 2 speaks of pressure and not of strength, one gain fits all: how a strength translates into pressure differs by
orders of magnitude between concepts and along a run, and line 3 knows it.

Nothing winds up. The integrator is the policy itself, whose amplification is read and never summed; strengths at their bound come off
it in the first step that asks for less.

Source: ours (integral control on amplification); reward shaping is from Bergen et al. (arXiv 2606.12360).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


WINDOW = 512
"""Pairs looked back on, or those of one step where they are more."""
SHORTEST = 64
"""Pairs that amplification is read off at least, or those of one step where they are more."""
FEWEST = 8
"""Pairs that must count in it, effectively."""
AGREE = 1.5
"""Standard errors within which a mean over more pairs must agree with one over fewer."""
GAIN = 0.3
"""Pressure asked for (sd of the score) per amplification in excess (nats x sd)."""
BOUND = 8.0
"""Largest strength, either way, in nats of margin per sd of the score. Beyond it the margins would be the readout's noise."""
NOISE = 1.0
"""Deltas well below this many sd of the score are taken for the readout's noise."""
UNREAD = 0.03
"""Share of the unshaped pressure that is thought to go unread and is leant against."""
RIDGE = 1e-4
"""Pull of a strength towards 0, so that it is finite where deltas separate chosen from rejected."""
PRIOR_BIAS = 0.25
"""How far amplification is thought to be from the true change before any probe, sd."""
DRIFT = 0.1
"""How far its bias moves between two probes, sd."""


class HoldController:
    """Finds the strengths of the held concepts, C of them.

    Its numbers are of all processes' pairs, so each process finds the same strengths. It runs on the host, in float64.

    Args:
        targets: How far each concept's mean score is to be from the reference's, sd of the score.
        beta: DPO's.
        window, gain, bound, noise, unread: See [`WINDOW`], [`GAIN`], [`BOUND`], [`NOISE`] and [`UNREAD`].

    Attributes:
        strengths: `(C,)` float64, in force now: positive to suppress, negative to amplify.
        bias: `(C,)` float64, what to add to amplification to get the true change of the mean score, as far as known.
    """

    def __init__(
        self,
        targets: Sequence[float],
        beta: float,
        window: int = WINDOW,
        gain: float = GAIN,
        bound: float = BOUND,
        noise: float = NOISE,
        unread: float = UNREAD,
    ) -> None:
        self.targets = torch.tensor(targets, dtype=torch.float64)
        self.beta, self.window = beta, window
        self.gain, self.bound, self.noise, self.unread = gain, bound, noise, unread
        self.strengths = torch.zeros_like(self.targets)
        self.bias = torch.zeros_like(self.targets)
        self._doubt = torch.full_like(self.targets, PRIOR_BIAS**2)  # variance of the bias
        self._share = torch.ones_like(self.targets)  # of the rows that are gated in
        self._scale = torch.ones_like(self.targets)  # makes up for what `clear` takes
        self._pairs = torch.zeros(0, 1 + len(targets))  # (W, 1 + C) float32: log-ratio and gated deltas
        self._fresh = self._step = 0  # pairs since the last update, and of the step before it

    def start(self, deltas: Tensor, gates: Tensor) -> None:
        """Take the strengths that leave no pressure on a sample of the data before any training.

        Args:
            deltas: `(N, C)`, the held concepts' deltas on the calibration sample.
            gates: `(N, C)`.
        """
        deltas, gates = deltas.float().cpu(), gates.float().cpu()
        # The sample may be in the data's order: what stays of it in the window while it fills must not be one end of the data.
        order = torch.randperm(len(deltas), generator=torch.Generator().manual_seed(0))[: self.window]
        deltas = deltas * gates
        self._pairs = torch.cat([deltas.new_zeros(len(order), 1), deltas[order]], dim=1)
        self._share = gates.double().mean(dim=0).clamp(min=1e-6)
        # With this scale, amplification is right where log-ratios are proportional to deltas (an instrumental variable's estimate).
        deltas = deltas.double()
        above = (deltas * clear(deltas, self.noise)).mean(dim=0)
        self._scale = torch.where(above > 0, (deltas**2).mean(dim=0) / above, 1.0)
        self._solve()

    def observe(self, log_ratios: Tensor, deltas: Tensor) -> None:
        """Take in pairs that were trained on.

        Args:
            log_ratios: `(B,)`, the unshaped \\( l_i \\), nats, of all processes' pairs.
            deltas: `(B, C)`, their gated deltas.
        """
        rows = torch.cat([log_ratios[:, None], deltas], dim=1).float().cpu()
        rows = rows[rows.isfinite().all(dim=1)]  # a policy that diverges is the trainer's to report
        self._fresh += len(rows)
        self._pairs = torch.cat([self._pairs, rows])[-max(self.window, self._fresh) :]

    def update(self) -> None:
        """Find the next step's strengths, once an optimizer step."""
        self._step, self._fresh = self._fresh, 0
        self._solve()

    def amplification(self) -> tuple[Tensor, Tensor]:
        """Mean change of each concept's score on the rows of its gate, to first order, and its standard error: `(C,)` each, sd."""
        pairs = self._pairs.double()
        terms = pairs[:, :1] * self._weights() / (4 * self._share)
        means = [recent_mean(column, max(SHORTEST, self._step)) for column in terms.T]
        mean, error = torch.tensor(means, dtype=torch.float64).reshape(-1, 2).T
        return mean, error

    def correct(self, change: Sequence[float], error: Sequence[float]) -> None:
        """Tell the controller what the change of the mean scores really is, as probe rollouts show it.

        The difference from amplification is taken for its bias from now on, weighed against what earlier probes said
        (a Kalman filter).

        Args:
            change: `(C,)`, mean score of the policy's rollouts less that of the reference's, sd.
            error: `(C,)`, its standard errors. Not finite: not measured.
        """
        amplification, noise = self.amplification()
        found = torch.as_tensor(change, dtype=torch.float64) - amplification
        variance = torch.as_tensor(error, dtype=torch.float64) ** 2 + noise**2
        self._doubt += DRIFT**2
        weight = self._doubt / (self._doubt + variance)
        known = found.isfinite() & weight.isfinite()
        self.bias = torch.where(known, self.bias + weight * (found - self.bias), self.bias)
        self._doubt = torch.where(known, (1 - weight) * self._doubt, self._doubt)

    def state(self) -> dict[str, Tensor]:
        """All that it goes on from, by name."""
        return {
            "pairs": self._pairs,
            "share": self._share,
            "scale": self._scale,
            "strengths": self.strengths,
            "bias": self.bias,
            "doubt": self._doubt,
            "step": torch.tensor(self._step),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state."""
        tensors = {name: tensor.cpu() for name, tensor in state.items()}
        self._pairs, self._share, self.strengths = tensors["pairs"], tensors["share"], tensors["strengths"]
        self.bias, self._scale, self._doubt = tensors["bias"], tensors["scale"], tensors["doubt"]
        self._step = int(tensors["step"])

    def _weights(self) -> Tensor:
        return self._scale * clear(self._pairs[:, 1:].double(), self.noise)

    def _solve(self) -> None:
        amplification, error = self.amplification()
        excess = amplification + self.bias - self.targets
        # James and Stein's: what is within its own noise is taken for noise, so that strengths do not follow it.
        excess = excess * (1 - (error / excess) ** 2).nan_to_num(0, 0, 0).clamp(min=0)
        pairs, weights = self._pairs.double(), self._weights()
        margins, deltas = self.beta * pairs[:, 0], pairs[:, 1:]
        unread = self.unread * (torch.sigmoid(-margins)[:, None] * weights).mean(dim=0)
        pressure = -self.gain * self._share * excess - unread
        self.strengths = solve_strengths(margins, deltas, weights, pressure, self.bound, self.strengths)


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


def clear(deltas: Tensor, noise: float) -> Tensor:
    r"""Deltas less the readout's noise, \\( d^3/(d^2 + \nu^2) \\): small ones vanish, large ones stay.

    Without it a concept's amplification would be diluted: in sparse data a few pairs show it, and all the others' small deltas are
    what the readout makes of other things. Learning these counts against learning the concept, and the two would be held in balance.
    """
    return deltas**3 / (deltas**2 + noise**2) if noise else deltas


def solve_strengths(
    margins: Tensor, deltas: Tensor, weights: Tensor, pressure: Tensor, bound: float, start: Tensor
) -> Tensor:
    r"""The strengths in `[-bound, bound]` that leave a given shaped pressure, or come closest.

    Solves \\( \overline{\sigma(-m_i - x_i \lambda)\, w_{ic}} = p_c + \rho\lambda_c \\), \\( \rho \\) the ridge, for one concept after the
    other until none moves. Each has one solution, since its left side falls and its right side rises; it is found by Newton's method
    inside a bracket.

    Args:
        margins: `(N,)` float64, \\( m_i \\).
        deltas: `(N, C)` float64, \\( x_i \\).
        weights: `(N, C)` float64, \\( w_i \\), each of its delta's sign.
        pressure: `(C,)` float64, \\( p \\).
        bound: Of the strengths.
        start: `(C,)` float64, where to look first.

    Returns:
        `(C,)` float64.
    """
    strengths = start.clamp(-bound, bound)
    if not len(margins):
        return strengths
    for _ in range(50):
        before = strengths.clone()
        for c in range(len(strengths)):
            x, w = deltas[:, c], weights[:, c] / len(margins)
            offset = margins + deltas @ strengths - x * strengths[c]
            value, low, high = (
                float(strengths[c]),
                -2 * bound,
                2 * bound,
            )  # where it was last found too small, too large
            for _ in range(100):
                push = torch.sigmoid(-offset - x * value)
                excess = float(push @ w) - float(pressure[c]) - RIDGE * value
                if excess == 0 or value == (bound if excess > 0 else -bound):
                    break  # found, or the bound is the best there is
                low, high = (value, high) if excess > 0 else (low, value)
                fall = float((push * (1 - push) * x) @ w) + RIDGE
                following = min(max(value + excess / fall, -bound), bound)
                if not low < following < high:
                    following = (low + high) / 2
                moved, value = abs(following - value), following
                if moved < 1e-10:
                    break
            strengths[c] = value
        if float((strengths - before).abs().max()) < 1e-6:
            break
    return strengths
