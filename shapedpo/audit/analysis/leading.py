"""The rows that score highest, kept while rows stream by."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy import sparse


class Leading:
    """The rows that score highest on each of some columns, kept while rows stream by.

    Args:
        n_columns: Number of columns.
        most: Rows that are kept of each.
        scores, rows: `(n, n_columns)` each, those kept so far; an empty place has a score of 0.
    """

    def __init__(
        self,
        n_columns: int,
        most: int,
        scores: NDArray[np.floating] | None = None,
        rows: NDArray[np.int64] | None = None,
    ) -> None:
        self.most = most
        self.scores: NDArray[np.floating] = np.zeros((0, n_columns)) if scores is None else scores
        self.rows: NDArray[np.int64] = np.zeros((0, n_columns), np.int64) if rows is None else rows

    def add(self, rows: NDArray[np.int64], scores: NDArray[np.floating], luck: NDArray[np.float64]) -> None:
        """Adds rows, `(n,)`, and their scores, `(n, n_columns)`, of which only those above 0 count.

        `luck`, `(n,)` in [0, 1), decides between equals.
        """
        broken = scores + np.where(scores > 0, 1e-6 * luck[:, None], 0.0)
        scores = np.concatenate([self.scores, broken])
        of = np.concatenate([self.rows, np.broadcast_to(rows[:, None], broken.shape)])
        if len(scores) > self.most:
            best = np.argpartition(-scores, self.most - 1, axis=0)[: self.most]
            scores, of = np.take_along_axis(scores, best, axis=0), np.take_along_axis(of, best, axis=0)
        self.scores, self.rows = scores, of

    def members(self, rows: NDArray[np.int64]) -> sparse.csr_matrix:
        """`(n, n_columns)`: 1 where a row is among a column's."""
        place = np.searchsorted(rows, self.rows)
        found = (self.scores > 0) & (place < len(rows)) & (rows[np.minimum(place, len(rows) - 1)] == self.rows)
        columns = np.broadcast_to(np.arange(self.rows.shape[1]), self.rows.shape)[found]
        shape = (len(rows), self.rows.shape[1])
        return sparse.csr_matrix((np.ones(len(columns)), (place[found], columns)), shape=shape)


class Responsible:
    """For each of some hypotheses, the rows whose scores are largest in size; of equals those that come first.

    Args:
        n: Number of hypotheses.
        most: Rows that are kept of each.
    """

    def __init__(self, n: int, most: int) -> None:
        self.n, self.most = n, most
        self.parts: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]] = []
        self.held, self.bound = 0, 10_000_000
        self.least = np.zeros(n, np.float32)

    def add(self, numbers: NDArray[np.int64], rows: NDArray[np.int64], scores: NDArray[np.float32]) -> None:
        """Adds scores, `(rows, numbers)`, for some hypotheses; rows in ascending order, also from call to call."""
        row, column = np.nonzero(np.abs(scores) > self.least[numbers])
        self.parts.append((numbers[column], rows[row], scores[row, column]))
        self.held += len(row)
        if self.held > self.bound:
            self._cut()
            self.bound = max(self.bound, 2 * self.held)

    def _cut(self) -> NDArray[np.int64]:
        """Keeps the largest; returns where each hypothesis' rows begin."""
        if not self.parts:
            return np.zeros(self.n + 1, np.int64)
        numbers, rows, scores = (np.concatenate(part) for part in zip(*self.parts, strict=True))
        size = np.abs(scores)
        # numpy sorts 16-bit numbers in linear time; rows come in ascending order, and stable sorts keep that among equals
        by_hypothesis = np.argsort(numbers.astype(np.min_scalar_type(self.n)), kind="stable")
        ends = np.cumsum(np.bincount(numbers, minlength=self.n))
        best = [own[np.argsort(-size[own], kind="stable")[: self.most]] for own in np.split(by_hypothesis, ends[:-1])]
        for number, own in enumerate(best):
            if len(own) == self.most:
                self.least[number] = size[own[-1]]
        kept = np.concatenate(best)
        self.parts, self.held = [(numbers[kept], rows[kept], scores[kept])], len(kept)
        return np.cumsum([0, *map(len, best)])

    def each(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Rows and scores of each hypothesis, the largest in size first."""
        begins = self._cut()
        _, rows, scores = self.parts[0] if self.parts else (begins[:0], begins[:0], self.least[:0])
        for start, end in pairwise(begins):
            yield rows[start:end], scores[start:end]


def beyond_chance(scores: NDArray[np.floating], max_chance: float) -> int:
    """How many of the largest scores can be named so that about `max_chance` of them are chance.

    Where the two completions of a pair differ by chance alone, a score is as likely below 0 as above, so the scores of `-c` and below
    tell how many of `c` and above are chance. The lowest such `c` is taken (Barber and Candes, 2015, knockoff+).

    Args:
        scores: `(n,)`, above 0 where the row goes the hypothesis' way.
        max_chance: Share that may be chance.
    """
    size = np.sort(np.abs(scores))[::-1]
    above = np.sort(scores[scores > 0])
    below = np.sort(-scores[scores < 0])
    for_c = len(above) - np.searchsorted(above, size, side="left")
    against = len(below) - np.searchsorted(below, size, side="left")
    fine = 1 + against <= max_chance * for_c
    return int(for_c[fine].max(initial=0))
