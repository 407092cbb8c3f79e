"""Pair weights: which pairs the loss listens to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import ConceptSignal, Shaper, check_number, register


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
        return torch.nanquantile(gated, 1 - self.fraction, interpolation="higher")


def hand_pair_weights(outputs: Any, weights: Tensor, completion_mask: Tensor, wpo: bool) -> None:
    """Hand pair weights to TRL's loss by way of its WPO weights.

    With `use_weighting`, TRL multiplies a pair's loss by `exp(mean over tokens of (log_probs - log_sum_sq_probs))` of both its
    completions (the WPO weight, arXiv 2406.11827). Writing a `log_sum_sq_probs` that makes this mean half the logarithm of our
    weight on either side makes the product the weight itself, in the value of the loss as in its gradient, for each
    loss type that TRL can weight.

    Args:
        outputs: The policy's output. Its `log_sum_sq_probs` is written.
        weights: `(B,)`, not negative.
        completion_mask: `(2B, T)`.
        wpo: Whether the user asked for WPO weighting as well; the weights are then multiplied.
    """
    log_probs = outputs.log_probs.detach()
    # exp(-1e4) is 0 in any float type, and no infinity meets a mask of zeros.
    log_weights = weights.log().clamp(min=-1e4)
    chosen_empty, rejected_empty = (completion_mask[:, 1:].sum(dim=1) == 0).chunk(2)
    # A completion without tokens has no mean that could carry its half: the other one carries both.
    chosen_share = torch.where(rejected_empty, 1.0, torch.where(chosen_empty, 0.0, 0.5))
    share = torch.cat([chosen_share, 1.0 - chosen_share])  # (2B,)
    base = outputs.log_sum_sq_probs if wpo else log_probs
    outputs.log_sum_sq_probs = base - (share * log_weights.repeat(2))[:, None].to(base.dtype)
