"""What a batch says of its concepts: amplification and pressure, and TRL's own rewards where we have shaped them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .calibration import raise_non_finite
from .concept import Concept
from .shapers import ConceptSignal


_REWARDS = ("chosen", "rejected", "accuracies", "margins")


class Pairs(NamedTuple):
    """What metrics need of B pairs.

    Attributes:
        policy_logps: `(B,)` of the chosen and of the rejected completions.
        ref_logps: The same of the reference, never tilted.
        signals: The concepts' scores.
        non_finite: `(C,)`, how many of a concept's raw scores are not finite.
        empty: `(B,)` bool, whether a completion has no tokens.
        weights: `(B,)`, the pair weights in force, or `None`.
    """

    policy_logps: tuple[Tensor, Tensor]
    ref_logps: tuple[Tensor, Tensor]
    signals: Sequence[ConceptSignal]
    non_finite: Tensor
    empty: Tensor
    weights: Tensor | None


def concept_metrics(
    pairs: Pairs,
    concepts: list[Concept],
    strengths: Sequence[float],
    beta: float,
    reduce: Callable[[Tensor], Tensor],
    where: str,
    shares: Mapping[str, tuple[Tensor, Tensor]],
) -> tuple[dict[str, float], int, dict[str, float]]:
    r"""A batch's metrics, over all processes.

    With \\( l \\) a completion's log-ratio of policy and reference, \\( m = \beta(l(y^+) - l(y^-)) \\) and \\( d \\) the
    concept's delta: amplification is the mean of \\( (l(y^+) - l(y^-))\, d/4 \\), pressure that of \\( \sigma(-m)\, d \\).
    Both are of the unshaped margin.

    Args:
        pairs: The batch.
        concepts: The concepts.
        strengths: The strength of each to log.
        beta: DPO's.
        reduce: Sums a tensor over processes.
        where: What to call the batch in an error.
        shares: Further metrics by name, each a part and the whole that it is a part of, on this process.

    Returns:
        The metrics, the number of pairs with an empty completion, and TRL's `rewards/*` and `logps/*` of all tokens against the
        reference as it is, for a batch whose loss saw a tilted one or fewer tokens.

    Raises:
        FloatingPointError: If a score is not finite, on any process; on all processes alike.
    """
    (chosen, rejected), (ref_chosen, ref_rejected) = pairs.policy_logps, pairs.ref_logps
    apart = ((chosen - ref_chosen) - (rejected - ref_rejected)).float()
    push = torch.sigmoid(-beta * apart)
    # All concepts at once: on an accelerator each operation costs as much as a thousand concepts.
    deltas = torch.stack([signal.delta for signal in pairs.signals]) if pairs.signals else push.new_zeros(0, len(push))
    terms = torch.stack([apart * deltas / 4, push * deltas, deltas])  # (3, C, B)
    sums = torch.cat([terms.sum(dim=2), pairs.non_finite[None]]).T  # (C, 4)
    weight = push.new_zeros(()) if pairs.weights is None else pairs.weights.sum()
    count = torch.ones_like(push).sum()
    rewards = [beta * (logps - ref).float() for logps, ref in zip(pairs.policy_logps, pairs.ref_logps, strict=True)]
    right = (rewards[0] > rewards[1]).float().sum()
    # One reduction and one copy to the host; spare columns make a row as long as the others.
    rows = [
        *(torch.stack([part, whole, 0 * whole, 0 * whole]).to(count.dtype) for part, whole in shares.values()),
        torch.stack([chosen.float().sum(), rejected.float().sum(), 0 * count, 0 * count]),
        torch.stack([rewards[0].sum(), rewards[1].sum(), right, (rewards[0] - rewards[1]).sum()]),
        torch.stack([count, pairs.empty.float().sum(), weight, 0 * count]),
    ]
    totals = reduce(torch.cat([sums, torch.stack(rows)])).tolist()
    size, empty, weight_sum, _ = totals.pop()
    unshaped = {f"rewards/{name}": value / size for name, value in zip(_REWARDS, totals.pop(), strict=True)}
    unshaped |= {
        f"logps/{name}": value / size for name, value in zip(("chosen", "rejected"), totals.pop(), strict=False)
    }
    found = [(totals.pop(), name) for name in reversed(list(shares))]
    raise_non_finite(concepts, [row[3] for row in totals], where)
    metrics = {name: part / max(whole, 1.0) for (part, whole, *_), name in found}
    for concept, strength, (amplification, pressure, delta, _) in zip(concepts, strengths, totals, strict=True):
        prefix = f"concepts/{concept.name}"
        metrics[f"{prefix}/amplification"] = amplification / size
        metrics[f"{prefix}/pressure"] = pressure / size
        metrics[f"{prefix}/delta"] = delta / size
        metrics[f"{prefix}/strength"] = strength
    if pairs.weights is not None:
        metrics["concepts/pair_weight"] = weight_sum / size
    return metrics, int(empty), unshaped
