"""Pair weights: which pairs the loss listens to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import ConceptSignal, Shaper, check_number, register, top_threshold


@register
@dataclass(frozen=True)
class Reweight(Shaper):
    r"""Weight each pair by a smooth, decreasing function of its concept delta.

    \\( w_i = \sigma(-\lambda d_i) / \bar\sigma \\), where \\( \bar\sigma \\) is the mean of the numerator over the calibration
    sample, so that the mean weight over the data is 1. To amplify, the function increases. Outside the gate the delta
    counts as 0.

    Source: Bergen et al. (arXiv 2606.12360), pair reweighting.
    """

    name: ClassVar[str] = "reweight"
    needs_strength: ClassVar[bool] = True
    per_pair: ClassVar[bool] = True

    def pair_weight(self, signal: ConceptSignal, strength: float, calibration: ConceptSignal) -> Tensor:
        mean = torch.sigmoid(-strength * calibration.gate * calibration.delta).mean()
        return torch.sigmoid(-strength * signal.gate * signal.delta) / mean


@register
@dataclass(frozen=True)
class Mask(Shaper):
    """Leave the pairs out of the loss that teach the concept most (to amplify: that teach against it most).

    A masked pair counts as a pair of loss 0: the others are not scaled up.

    Args:
        fraction: The top fraction of the (gated) pairs to mask, between 0 and 1. The threshold is that quantile of the
            calibration sample. A pair whose delta is not positive is never masked, however large the fraction.
        threshold: Mask pairs whose delta is at least this, in standard deviations of the score. Give one of the two.

    Source: Bergen et al. (arXiv 2606.12360), example filtering (1, 3 or 5 %) and pair masking.
    """

    name: ClassVar[str] = "mask"
    per_pair: ClassVar[bool] = True

    fraction: float | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        if (self.fraction is None) == (self.threshold is None):
            raise ValueError(
                "Method 'mask' takes either `fraction` or `threshold`, for example {name: mask, fraction: 0.05}; got "
                f"fraction={self.fraction!r} and threshold={self.threshold!r}."
            )
        if self.fraction is not None:
            check_number("Method 'mask'", "fraction", self.fraction, 0, 1)
        else:
            check_number("Method 'mask'", "threshold", self.threshold, 0)

    def pair_weight(self, signal: ConceptSignal, strength: float, calibration: ConceptSignal) -> Tensor:
        sign = 1.0 if strength > 0 else -1.0
        delta = sign * signal.delta
        masked = (
            (signal.gate > 0) & (delta > 0) & (delta >= self._threshold(sign * calibration.delta, calibration.gate))
        )
        return 1.0 - masked.float()

    def _threshold(self, deltas: Tensor, gate: Tensor) -> float | Tensor:
        if self.threshold is not None:
            return self.threshold
        assert self.fraction is not None  # by __post_init__
        gated = torch.where(gate > 0, deltas, torch.nan)
        return top_threshold(gated, self.fraction)
