"""The tokens of a stream's latest rows: a stream cannot be asked for a row again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..prompts import ROW


SPANS = ("prompt", "chosen", "rejected")
WINDOWS = 4
"""Windows of the running estimates that rows are kept for: what is older counts next to nothing."""


class RecentRows:
    """Keeps the rows that pass through the collator, as its `further` (see [`~shapedpo.collator.ConceptCollator`]).

    Each process sees the rows of its own batches. Where worker processes make them (`dataloader_num_workers`), nothing is seen here.

    Args:
        window: Pairs that the running estimates reach back.
    """

    def __init__(self, window: int) -> None:
        self.most = WINDOWS * window
        self._rows: dict[int, dict[str, NDArray[np.int32]]] = {}

    def __call__(self, examples: Sequence[Mapping[str, Any]], batch: Mapping[str, Any]) -> dict[str, Tensor]:
        for example in examples:
            if ROW in example:
                ids = {name: np.array(example[f"{name}_ids"], np.int32) for name in SPANS if f"{name}_ids" in example}
                self._rows.pop(example[ROW], None)  # the latest are last
                self._rows[example[ROW]] = ids
        while len(self._rows) > self.most:
            del self._rows[next(iter(self._rows))]
        return {}

    def clear(self) -> None:
        """Forget the rows that were collated for something else than training."""
        self._rows.clear()

    def get(self, row: int) -> Mapping[str, NDArray[np.int32]]:
        """A row's tokens by span; none of a row that is not kept."""
        return self._rows.get(row, {})
