r"""What is to be known of TRL's loss types where the signal is shaped. TRL computes them; `tests/test_losses.py` measures this on TRL's own.

A loss's *pull* on a pair is minus its derivative by the pair's margin, the rejected answer's log-ratio moved as far as the chosen one's the
other way. DPO's (`sigmoid`) is \\( \sigma(-m) \\).
"""

from __future__ import annotations

import math


SORTING_LOSSES = ("aot", "aot_unpaired")
"""Losses that sort a batch and compare ranks: its pairs have no losses of their own."""
NORMALISED_LOSSES = ("sigmoid_norm",)
"""Losses that compare log-ratios a token."""
DIVIDING_LOSSES = ("ipo", *NORMALISED_LOSSES)
"""Losses that divide what they compare by the completions' lengths."""
DPO_LIKE_LOSSES = ("sigmoid", "sigmoid_norm")
"""Losses whose pull is DPO's at every margin."""
_STARTS = {
    "sigmoid": 1.0,
    "sigmoid_norm": 1.0,
    "bco_pair": 1.0,
    "hinge": 2.0,
    "nca_pair": 0.5,
    "apo_zero": 0.5,
    "apo_down": 0.25,
}


def pull_at_start(loss: str, label_smoothing: float) -> float | None:
    """How hard a loss pulls where the policy is the reference, in units of DPO's pull there.

    Of [`DPO_LIKE_LOSSES`] that is the ratio at every margin. The others' fades in another way: `hinge` keeps it up to margin 1 and has none
    beyond, and `nca_pair` and `apo_down` pull back beyond a margin of 2.

    Args:
        loss: One of TRL's loss types that compare pairs.
        label_smoothing: `DPOConfig.label_smoothing`.

    Returns:
        `None` where no constant says it (`ipo` divides by length and `sppo_hard` by beta squared), or where it is no pull (`discopop` pushes
        pairs apart only beyond the margin that it starts at).
    """
    if loss in SORTING_LOSSES:
        return 1 - 2 * label_smoothing
    if loss == "robust":
        return 1 / (1 - 2 * label_smoothing) if label_smoothing < 0.5 else None
    if loss == "exo_pair":
        return math.log(1 / label_smoothing - 1) / 2 if 0 < label_smoothing < 0.5 else None
    return _STARTS.get(loss)
