"""From the activations of tokens to the maximum and the frequency of each feature in each span."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...readouts.sae_reader import SAEReader


class Entries(NamedTuple):
    """The active features of slots, sorted by slot, then by feature.

    Attributes:
        slot: `(E,)` int64.
        feature: `(E,)` int64.
        counts: `(E,)` int64, on how many of the slot's tokens it is active.
        max: `(E,)` float32.
        peak: `(E,)` int64, the token of the maximum within the slot, counted from 0; the first of several.
    """

    slot: Tensor
    feature: Tensor
    counts: Tensor
    max: Tensor
    peak: Tensor


@torch.no_grad()
def pool(reader: SAEReader, x: Tensor, slot: Tensor) -> Entries:
    """Pool the SAE's features over the tokens of each slot.

    Args:
        reader: Reads all features.
        x: Activations of M tokens, `(M, d_in)`.
        slot: `(M,)` int64, which slot each belongs to; the tokens of a slot stand in order.
    """
    token, feature, value = reader.active(x)
    key = slot[token] * reader.n_features + feature
    # By slot and feature, within that the largest first, and of equals the first token.
    order = token.argsort(stable=True)
    order = order[value[order].argsort(stable=True, descending=True)]
    order = order[key[order].argsort(stable=True)]
    keys, counts = torch.unique_consecutive(key[order], return_counts=True)
    first = order[counts.cumsum(0) - counts]
    peak = place_in_slot(slot)[token[first]]
    return Entries(keys // reader.n_features, keys % reader.n_features, counts, value[first], peak)


def place_in_slot(slot: Tensor) -> Tensor:
    """`(M,)` int64: each token's place among those of its slot."""
    order = slot.argsort(stable=True)
    _, counts = torch.unique_consecutive(slot[order], return_counts=True)
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    place = torch.empty_like(slot)
    place[order] = torch.arange(len(slot), device=slot.device) - starts
    return place
