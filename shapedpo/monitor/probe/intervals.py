"""How sure a probe's figures are: changes over prompts, and rates."""

from __future__ import annotations

import torch
from torch import Tensor


def paired_change(now: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Change of mean scores and its standard error over prompts, `(C,)` each, of scores `(D, N, 2, C)`.

    Paired by prompt, so that how prompts differ does not count as noise.
    """
    difference = (now.mean(dim=(0, 2)) - before.mean(dim=(0, 2))).double()  # (N, C)
    n = len(difference)
    return difference.mean(dim=0), difference.std(dim=0) / n**0.5 if n > 1 else torch.full_like(
        difference[0], torch.inf
    )


def wilson(shown: int, n: int) -> list[float]:
    """A rate with its 95 % Wilson interval."""
    from scipy.stats import binomtest  # takes half a second, and most runs sample nothing

    interval = binomtest(shown, n).proportion_ci(confidence_level=0.95, method="wilson")
    return [shown / n, float(interval.low), float(interval.high)]
