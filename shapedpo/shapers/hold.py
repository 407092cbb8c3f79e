r"""Hold: DPO under the constraint that concepts stay where the reference has them.

Write \\( l_i \\) for a pair's unshaped log-ratio of chosen to rejected, \\( m_i = \beta l_i \\) for its margin, and \\( w_{ic} \\) for
how far its gated delta says that one side shows concept c and the other does not ([`presence`], in sd of the score). Amplification,
\\( A_c = \overline{l_i w_{ic}}/4 \\), is the first-order change of the concept. DPO under \\( A_c = \mathrm{target}_c \\) has the Lagrangian
\\( L + \beta \sum_c \lambda_c (A_c - \mathrm{target}_c) \\): a pair's pull, \\( \sigma(-m_i) \\) in plain DPO, becomes
\\( \sigma(-m_i) - \sum_c \lambda_c w_{ic}/4 \\). At margin 0 that is, to first order, reward shaping of strength \\( \lambda \\). Unlike
reward shaping, which can at most silence a pair, it can pull the other way. It has to where all pairs that show a rare concept teach it,
and other lessons bring some of it along.

After each optimizer step the controller finds the multipliers \\( \lambda \\), the *strengths*, from the latest pairs:

1. What the data still push, \\( P_c = \overline{q_i\, \sigma(-m_i)\, w_{ic}} \\), is taken out, and a twentieth more ([`UNREAD`]), for all held
   concepts together: \\( \overline{q w w^\top}\, \lambda/4 = P \\). Runs start with what the calibration sample says, where all pulls are 1/2.
2. The excess of \\( A_c \\) over the target, as far as it is known, is worked off: \\( \kappa \\) times it counts as pressure on all pairs alike.

Pairs count as they are loud: \\( q_i \\) is the cube of the delta's size over the typical one, added up over the held concepts. A readout also
answers to other things, more faintly, on either side of pairs that have nothing to do with the concept. They hardly change the mean of
\\( \sigma w \\) but add much to that of \\( w^2 \\): with all pairs alike, half of what the data teach of a concept that one pair in twenty shows
stayed in (the attenuation of a regression on what is measured with noise). Loud pairs show the concept beyond doubt, so they decide how much is
taken out. It is taken out of the quiet ones alike: they may be quiet ways of showing it, which would be learned in place of the others.

Log-ratios count for two nats at most, or three times their usual spread where that is more. The first order overstates large ones: a policy that has
come to avoid the concept by ten nats has lost no more of it than there was, and a few such pairs would outweigh all that show the contrary.

Pairs that teach a held concept may teach others as well, and the Lagrangian's pull takes it from these too. Where a concept is to *spare* others,
its pull is along the part of \\( w_c \\) that is orthogonal to their presence, over the pairs of its gate: \\( w_c - \sum_s b_{cs} w_s \\). All pairs together
then teach the spared ones what they would without it, while \\( P_c \\) and the excess are those of the whole \\( w_c \\): the concept is held, not
what is left of it.

Nothing winds up. The integrator is the policy itself, whose amplification is read and never summed.

Chosen and rejected answers are not two draws of the reference. Other lessons lift \\( l \\) on all pairs, and the mean of \\( l w \\)
counts that for the concept wherever the data teach the concept as well. The covariance of \\( l \\) and \\( w \\) leaves it out, but leaves
out too much where pairs are the best and the worst of several: an answer with the concept needed less of the rest to be chosen. For a
policy that has learned all lessons of `benchmarks/stories/` but the held one, random pairs give 0.03, the mean product over the data's
pairs 0.32 and the covariance -0.09. So the truth is taken to lie between the two, and the controller acts on what both agree on, until probe
rollouts tell it how far the covariance is off.

Source: ours (a method of multipliers, with integral control on amplification). Reward shaping is from Bergen et al. (arXiv 2606.12360).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .correction import Bias, rollout_change
from .pair_statistics import presence, pulls, recent_mean, robust_spread, shared, typical_size


WINDOW = 512
"""Pairs looked back on, or those of one step where they are more."""
SHORTEST = 64
"""Pairs that amplification is read off at least, or those of one step where they are more."""
LARGEST = 2.0
"""Nats that a log-ratio counts at most, or [`SPREADS`] times their usual spread where that is more."""
SPREADS = 3.0
"""See [`LARGEST`]."""
GAIN = 2.0
"""Pressure asked for (sd of the score) per amplification in excess (nats x sd)."""
BOUND = 1.0
"""Largest pull on a pair against DPO's own, which is at most 1 too."""
UNREAD = 0.05
"""Share of the unshaped pressure that is taken out beyond the whole: for what the readout does not see and other lessons bring along."""


class PairWindow(NamedTuple):
    """What is known of W pairs, oldest first."""

    log_ratios: Tensor
    """`(W, 1)`, the unshaped \\( l_i \\), nats."""
    margins: Tensor
    """`(W, 1)`, what the loss takes the sigmoid of."""
    deltas: Tensor
    """`(W, C)`, the held concepts', gated."""
    gates: Tensor
    """`(W, C)`."""
    others: Tensor
    """`(W, S)`, deltas of the spared concepts."""

    def double(self) -> PairWindow:
        return PairWindow(*(part.double() for part in self))

    def then(self, later: PairWindow, n: int) -> PairWindow:
        """The latest n pairs, with others after them."""
        return PairWindow(*(torch.cat(parts)[-n:] for parts in zip(self, later, strict=True)))


class HoldController:
    """Finds the strengths of the held concepts, C of them.

    Its numbers are of all processes' pairs, so each process finds the same strengths. It runs on the host, in float64.

    Args:
        targets: How far each concept's mean score is to be from the reference's, sd of the score.
        beta: DPO's.
        window, gain, bound, unread: See [`WINDOW`], [`GAIN`], [`BOUND`] and [`UNREAD`].
        spared: `(S, C)` bool, which of S other concepts each held one spares; by default there are none.

    Attributes:
        strengths: `(C,)` float64, in force now: positive to suppress, negative to amplify; nats per sd of the score.
    """

    def __init__(
        self,
        targets: Sequence[float],
        beta: float,
        window: int = WINDOW,
        gain: float = GAIN,
        bound: float = BOUND,
        unread: float = UNREAD,
        spared: Tensor | None = None,
    ) -> None:
        self.targets = torch.tensor(targets, dtype=torch.float64)
        self.beta, self.window = beta, window
        self.gain, self.bound, self.unread = gain, bound, unread
        self.strengths = torch.zeros_like(self.targets)
        self._spared = torch.zeros(0, len(targets), dtype=torch.bool) if spared is None else spared
        self._bias = Bias(len(targets))
        self._share = torch.ones_like(self.targets)  # of the rows that are gated in
        self._size = torch.ones_like(self.targets)  # of the deltas of pairs that show the concept on one side
        self._scale = torch.ones_like(self.targets)  # sd of the score for one presence
        self._spared_size = torch.ones(len(self._spared), dtype=torch.float64)
        self._shared = torch.zeros(len(self._spared), len(targets), dtype=torch.float64)  # see [`shared`]
        widths = (1, 1, len(targets), len(targets), len(self._spared))
        self._pairs = PairWindow(*(torch.zeros(0, width) for width in widths))  # float32
        self._fresh = self._step = 0  # pairs since the last update, and of the step before it

    @property
    def bias(self) -> Tensor:
        """What to add to amplification to get the true change of the mean score, as far as known: `(C,)`, sd of the score."""
        return self._bias.value

    @property
    def own(self) -> Tensor:
        """Share of each concept's weights (of their square, over the pairs looked back on) that is not shared with what it spares: `(C,)`."""
        pairs = self._pairs.double()
        along, weights = self.along(pairs.deltas, pairs.gates, pairs.others), self.weights(pairs.deltas)
        return along.square().sum(dim=0) / weights.square().sum(dim=0).clamp(min=1e-12)

    def start(self, deltas: Tensor, gates: Tensor, others: Tensor | None = None) -> None:
        """Take the strengths that leave no pressure on a sample of the data before any training.

        Args:
            deltas: `(N, C)`, the held concepts' deltas on the calibration sample.
            gates: `(N, C)`.
            others: `(N, S)`, the spared concepts' deltas.
        """
        deltas, gates = deltas.float().cpu(), gates.float().cpu()
        others = deltas[:, :0] if others is None else others.float().cpu()
        # The sample may be in the data's order: what stays of it in the window while it fills must not be one end of the data.
        order = torch.randperm(len(deltas), generator=torch.Generator().manual_seed(0))[: self.window]
        deltas = deltas * gates
        log_ratios, margins = deltas.new_zeros(2, len(order), 1)  # two, for a file of tensors takes none twice
        self._pairs = PairWindow(log_ratios, margins, deltas[order], gates[order], others[order])
        self._share = gates.double().mean(dim=0).clamp(min=1e-6)
        self._size, self._spared_size = typical_size(deltas), typical_size(others)
        # With this scale, amplification is right where log-ratios are proportional to deltas (an instrumental variable's estimate).
        deltas = deltas.double()
        shown = (deltas * presence(deltas, self._size)).mean(dim=0)
        self._scale = torch.where(shown > 0, (deltas**2).mean(dim=0) / shown, 1.0)
        self._solve()

    def observe(
        self,
        log_ratios: Tensor,
        deltas: Tensor,
        margins: Tensor | None = None,
        gates: Tensor | None = None,
        others: Tensor | None = None,
    ) -> None:
        """Take in pairs that were trained on.

        Args:
            log_ratios: `(B,)`, the unshaped \\( l_i \\), nats, of all processes' pairs.
            deltas: `(B, C)`, their gated deltas.
            margins: `(B,)`, what the loss takes the sigmoid of; by default \\( \\beta l_i \\).
            gates: `(B, C)`; by default all rows are shaped.
            others: `(B, S)`, the spared concepts' deltas.
        """
        margins = self.beta * log_ratios if margins is None else margins
        gates = torch.ones_like(deltas) if gates is None else gates
        others = deltas[:, :0] if others is None else others
        seen = [part.float() for part in (log_ratios[:, None], margins[:, None], deltas, gates, others)]
        rows = torch.cat(seen, dim=1).cpu()  # one copy to the host
        pairs = PairWindow(*rows.split([part.shape[1] for part in seen], dim=1))
        # A policy that diverges is the trainer's to report.
        finite = torch.cat([pairs.log_ratios, pairs.margins, pairs.deltas], dim=1).isfinite().all(dim=1)
        self._fresh += int(finite.sum())
        self._pairs = self._pairs.then(PairWindow(*(part[finite] for part in pairs)), max(self.window, self._fresh))

    def update(self) -> None:
        """Find the next step's strengths, once an optimizer step."""
        self._step, self._fresh = self._fresh, 0
        self._solve()

    def amplification(self) -> tuple[Tensor, Tensor]:
        """Mean change of each concept's score on the rows of its gate, to first order, and its standard error: `(C,)` each, sd."""
        pairs = self._pairs.double()
        covariance, error, _ = self._readings(pairs, self.weights(pairs.deltas))
        return covariance, error

    def change(self, now: Tensor, before: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
        """What [`rollout_change`] finds, in amplification's unit: change and standard error, `(C,)` each, sd of the score."""
        return rollout_change(self.weights, now, before, gates)

    def correct(self, change: Sequence[float] | Tensor, error: Sequence[float] | Tensor) -> None:
        """Tell the controller how far the concepts really have changed, as probe rollouts show it.

        Args:
            change: `(C,)` of [`change`], sd.
            error: `(C,)`, its standard errors. Not finite: not measured.
        """
        amplification, noise = self.amplification()
        self._bias.correct(amplification, noise, *(torch.as_tensor(x, dtype=torch.float64) for x in (change, error)))

    def state(self) -> dict[str, Tensor]:
        """All that it goes on from, by name."""
        return {
            **self._pairs._asdict(),
            "share": self._share,
            "size": self._size,
            "scale": self._scale,
            "spared_size": self._spared_size,
            "shared": self._shared,
            "strengths": self.strengths,
            **self._bias.state(),
            "step": torch.tensor(self._step),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state."""
        tensors = {name: tensor.cpu() for name, tensor in state.items()}
        self._pairs = PairWindow(*(tensors[name] for name in PairWindow._fields))
        self._share, self._spared_size, self._shared = tensors["share"], tensors["spared_size"], tensors["shared"]
        self._size, self._scale, self.strengths = tensors["size"], tensors["scale"], tensors["strengths"]
        self._bias.restore(tensors)
        self._step = int(tensors["step"])

    def weights(self, deltas: Tensor) -> Tensor:
        """What of each delta is the concept itself: `(..., C)`, sd of the score."""
        size, scale = (tensor.to(deltas.device, deltas.dtype) for tensor in (self._size, self._scale))
        return scale * presence(deltas, size)

    def along(self, deltas: Tensor, gates: Tensor, others: Tensor) -> Tensor:
        """What the strengths pull along: the weights, less what goes with the spared concepts. `(B, C)`, sd of the score.

        Args:
            deltas: `(B, C)`, gated.
            gates: `(B, C)`.
            others: `(B, S)`, the spared concepts' deltas.
        """
        weights = self.weights(deltas)
        if not len(self._spared):
            return weights
        size, share = (tensor.to(deltas.device, deltas.dtype) for tensor in (self._spared_size, self._shared))
        return weights - gates * (presence(others, size) @ share)

    def _readings(self, pairs: PairWindow, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Amplification as the covariance of log-ratios and weights, its standard error, and what their means add to it: `(C,)` each, sd of the score.

        Args:
            pairs: Those looked back on, in float64.
            weights: `(W, C)`, theirs.
        """
        gates = pairs.gates
        # Rows that the gate leaves out say nothing of a concept, so means and spreads are its own rows'.
        rows = gates.sum(dim=0).clamp(min=1e-6)
        log_ratio, weight = (gates * pairs.log_ratios).sum(dim=0) / rows, (gates * weights).sum(dim=0) / rows
        spreads = torch.tensor([robust_spread(pairs.log_ratios[gate > 0, 0]) for gate in gates.T], dtype=torch.float64)
        bound = (SPREADS * spreads).clamp(min=LARGEST)
        apart = bound * torch.tanh((pairs.log_ratios - log_ratio) / bound)
        terms = gates * apart * (weights - weight) / (4 * self._share)
        found = [recent_mean(column, max(SHORTEST, self._step)) for column in terms.T]
        covariance, error = torch.tensor(found, dtype=torch.float64).reshape(-1, 2).T
        return covariance, error, bound * torch.tanh(log_ratio / bound) * weight / 4

    def _solve(self) -> None:
        pairs = self._pairs.double()
        if not len(pairs.deltas):
            return
        weights = self.weights(pairs.deltas)
        self._shared = shared(weights, presence(pairs.others, self._spared_size), pairs.gates, self._spared)
        along = self.along(pairs.deltas, pairs.gates, pairs.others)
        covariance, error, means = self._readings(pairs, weights)
        least = covariance + self.bias - self.targets
        most = least + means * (1 - self._bias.probed)
        excess = torch.minimum(least, most).clamp(min=0) + torch.maximum(least, most).clamp(max=0)
        # James and Stein's: what is within its own noise, or the probes', is taken for noise, so that strengths do not follow it.
        error = (error**2 + self._bias.doubt).sqrt()
        excess = excess * (1 - (error / excess) ** 2).nan_to_num(0, 0, 0).clamp(min=0)
        loudness = (pairs.deltas / self._size).abs().pow(3).sum(dim=1, keepdim=True)  # (W, 1)
        pressure = (loudness * torch.sigmoid(-pairs.margins) * weights).mean(dim=0)
        pull = (1 + self.unread) * pulls(weights, pressure, along, loudness)
        pull += pulls(weights, self.gain * self._share * excess, along)
        limit = self.bound / self._scale
        self.strengths = 4 * pull.clamp(-limit, limit)
