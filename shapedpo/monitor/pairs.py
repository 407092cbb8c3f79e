"""The rows behind a figure: the pairs of the window that contribute most to each concept."""

from __future__ import annotations

import math

import torch
from torch import Tensor


FIELDS = ("key", "row", "delta", "apart", "contribution", "age")
"""What is kept of a pair: its decayed rank, its row in the data set, its delta, log-ratios and contribution, and how many batches ago it was met."""


class TopPairs:
    r"""The k pairs of each concept whose contribution to the pressure, \\( \sigma(-m)\, d \\), is largest in size.

    The pressure is the concept's part of the gradient, so these are the rows that teach it (or teach against it). A pair's
    rank decays with its age as its weight in the [`~shapedpo.monitor.estimates.Window`] does. A row appears once, as it was met last.
    Kept on the device; nothing waits for it.

    Args:
        n_scores: Number of concepts (or features), C.
        k: How many pairs to keep of each.
        size: The window, in pairs over all processes.
        device: Where it lives.
    """

    def __init__(self, n_scores: int, k: int, size: int, device: torch.device) -> None:
        self.k, self.size = k, size
        # (C, k) of each field; float32 holds row numbers exactly up to 16 million.
        self.table = torch.zeros(n_scores, k, len(FIELDS), device=device)
        self.table[:, :, 1] = -1

    def update(self, rows: Tensor, apart: Tensor, beta: float, delta: Tensor, world_size: int = 1) -> None:
        """Add a batch of B pairs.

        Args:
            rows: `(B,)` int, where they are in the data set.
            apart: `(B,)`, log-ratio of the chosen completion minus that of the rejected one, nats.
            beta: DPO's.
            delta: `(B, C)`, the concepts' deltas, finite.
            world_size: Number of processes, each of which adds as many pairs.
        """
        # A pair without a finite log-ratio contributes nothing, and is no row to show.
        push = torch.where(apart.isfinite(), torch.sigmoid(-beta * apart), 0.0)
        contribution = push[:, None] * delta  # (B, C)
        row, apart_ = (column[:, None].expand_as(delta).float() for column in (rows, apart))
        new = [contribution.abs(), row, delta, apart_, contribution, torch.zeros_like(delta)]
        self.table[:, :, 5] += 1
        self.table[:, :, 0] *= math.exp(-len(rows) * world_size / self.size)
        if self.k == 1:  # of every feature of an SAE: a comparison, not a sort
            best = _best(contribution.abs().T, row.T)
            found = torch.stack(
                [column[best, torch.arange(delta.shape[1], device=best.device)] for column in new], dim=1
            )
            better = found[:, 0] > self.table[:, 0, 0]
            self.table[:, 0] = torch.where(better[:, None], found, self.table[:, 0])
            return
        self.table = self._top(torch.cat([self.table, torch.stack(new, dim=2).transpose(0, 1)], dim=1))

    def _top(self, candidates: Tensor) -> Tensor:
        """The best k of `(C, n, fields)`; of a row that is there twice, the last."""
        row, age = candidates[:, :, 1], candidates[:, :, 5]
        younger = age[:, None, :] < age[:, :, None]
        younger |= (age[:, None, :] == age[:, :, None]).triu(diagonal=1)
        later = ((row[:, :, None] == row[:, None, :]) & younger).any(dim=2)
        key = torch.where(later, -1.0, candidates[:, :, 0])  # ranks below an empty place, whose key is 0
        candidates = torch.cat([key[:, :, None], candidates[:, :, 1:]], dim=2)
        # Of equal ones the smaller row first, so that the order in which processes are asked does not matter.
        by_row = row.argsort(dim=1, stable=True)
        order = by_row.gather(1, key.gather(1, by_row).argsort(dim=1, descending=True, stable=True))[:, : self.k]
        return candidates.gather(1, order[:, :, None].expand(-1, -1, len(FIELDS)))

    def merged(self, tables: Tensor) -> Tensor:
        """The best k of several processes' tables.

        Args:
            tables: `(W, C, k, fields)`.

        Returns:
            `(C, k, fields)`.
        """
        candidates = tables.transpose(0, 1).flatten(1, 2)
        if self.k == 1:
            best = _best(candidates[:, :, 0], candidates[:, :, 1])
            return candidates[torch.arange(len(best), device=best.device), best][:, None]
        return self._top(candidates)


def _best(key: Tensor, row: Tensor) -> Tensor:
    """Where the largest key of each line of `(C, n)` is; of equal ones, that of the smallest row."""
    return torch.where(key == key.amax(dim=1, keepdim=True), row, torch.inf).argmin(dim=1)
