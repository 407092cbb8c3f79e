"""Reward shaping: the concept's term is taken out of the reward, so that nothing is left to gain from expressing it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .base import ConceptSignal, Shaper, register


@register
@dataclass(frozen=True)
class Reward(Shaper):
    r"""Shift each completion's reward by its concept score ("explaining away").

    For the sigmoid loss this is \\( -\log\sigma(m_i + \lambda d_i) \\): with \\( \lambda > 0 \\) the pair's margin is
    already explained by the concept, and the policy has that much less to learn from it. It enters as a tilted reference,
    \\( \log \mathrm{ref}'(y) = \log \mathrm{ref}(y) - (\lambda/\beta)\, s(y) \\), and so has a meaning for every loss type
    that reads the reference. The strength is \\( \lambda \\), in nats of margin per standard deviation of the score.
    Losses that divide by a completion's length (`ipo`, `sigmoid_norm`) divide the shift too: they take as many times the strength.

    Action `hold` does the same to first order, by a term of the loss instead of the reference (see `hold.py`).

    Source: Bergen, Bhalla, Baskaran et al., "Anatomy of Post-Training" (arXiv 2606.12360), reward shaping and its gated form;
    `abs(lambda)` 0.5 to 5 there.
    """

    name: ClassVar[str] = "reward"
    needs_strength: ClassVar[bool] = True
    actions: ClassVar[tuple[str, ...]] = ("suppress", "amplify", "hold")

    def reward(self, signal: ConceptSignal, strength: float) -> Tensor:
        return strength * signal.gate.repeat(2) * signal.scores
