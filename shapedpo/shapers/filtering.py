"""Filtering: pairs leave the data set before training."""

from __future__ import annotations

import io
import re
import tokenize
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from .base import ConceptSignal, Shaper, check_number, register


if TYPE_CHECKING:
    import pandas as pd


@register
@dataclass(frozen=True)
class Filter(Shaper):
    """Leave the pairs out of the data set that teach the concept most (to amplify: that teach against it most).

    Before the first step the reference reads all of the training data, once (with `precompute_ref_log_probs=True` this is the pass that is
    made anyway), scores are standardised over all of it, and the pairs leave. Epochs, steps and schedules are of the pairs that stay.
    Which rows left is written to `filtered.json` in the output folder and into each checkpoint, from which a resumed run takes them.

    Args:
        fraction: The top fraction of the (gated) pairs to leave out, between 0 and 1, by delta. A pair whose delta is not positive
            stays, however large the fraction.
        threshold: Leave out pairs whose delta is at least this, in standard deviations of the score.
        expression: Leave out the pairs for which this is true: an expression of [`pandas.DataFrame.eval`] over the data set's columns
            and `score_chosen`, `score_rejected`, `delta` and `gate` of the concept, such as `delta > 2 and cluster in [3, 17]`. It has no access
            to anything else: no `@name`, and no attribute whose name begins with an underscore. Give one of the three.

    Source: Bergen et al. (arXiv 2606.12360), example filtering (1, 3 or 5 %).
    """

    name: ClassVar[str] = "filter"
    fits_sft: ClassVar[bool] = True

    fraction: float | None = None
    threshold: float | None = None
    expression: str | None = None

    def __post_init__(self) -> None:
        owner = "Method 'filter'"
        given = [name for name in ("fraction", "threshold", "expression") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"{owner} takes one of `fraction`, `threshold` and `expression`, for example {{name: filter, fraction: 0.03}}; got "
                f"{' and '.join(given) or 'none'}."
            )
        if self.fraction is not None:
            check_number(owner, "fraction", self.fraction, 0, 1)
        elif self.threshold is not None:
            check_number(owner, "threshold", self.threshold, 0)
        elif not isinstance(self.expression, str) or not self.expression.strip():
            raise ValueError(f"{owner}: `expression` must be a text such as 'delta > 2', got {self.expression!r}.")
        elif _reaches_out(self.expression):
            raise ValueError(
                f"{owner}: `expression` may name columns and their methods, but no '@name' and no attribute that begins with '_', through which "
                f"it could call anything; got {self.expression!r}."
            )

    def leaves(self, signal: ConceptSignal, strength: float, columns: pd.DataFrame) -> Tensor:
        """Which pairs leave.

        Args:
            signal: The scores of all N pairs.
            strength: Its sign says whether to suppress (positive) or to amplify.
            columns: The columns of the data set that the expression may name.

        Returns:
            `(N,)` bool.
        """
        if self.expression is not None:
            chosen, rejected = signal.scores.cpu().chunk(2)
            table = columns.assign(
                score_chosen=chosen.numpy(),
                score_rejected=rejected.numpy(),
                delta=signal.delta.cpu().numpy(),
                gate=signal.gate.cpu().numpy(),
            )
            true = np.asarray(table.eval(self.expression))
            if true.dtype != bool or true.shape != (len(table),):
                raise TypeError("it must be true or false of each row, as 'delta > 2' is")
            return torch.from_numpy(true.copy()) & (signal.gate > 0).cpu()
        delta = (signal.delta if strength > 0 else -signal.delta).cpu()
        candidates = (signal.gate > 0).cpu() & (delta > 0)
        if self.threshold is not None:
            return candidates & (delta >= self.threshold)
        assert self.fraction is not None  # by __post_init__
        count = round(self.fraction * int((signal.gate > 0).sum()))
        # Stable, so that of equal deltas the first rows leave, on any machine.
        order = torch.where(candidates, delta, -torch.inf).argsort(descending=True, stable=True)[:count]
        found = torch.zeros_like(candidates)
        found[order] = True
        return found & candidates


def _reaches_out(expression: str) -> bool:
    """Whether an expression names Python's own variables (`@name`), or an attribute that begins with an underscore; in strings they are text."""
    try:
        words = [word.string for word in tokenize.generate_tokens(io.StringIO(expression.replace("`", "")).readline)]
    except (tokenize.TokenError, SyntaxError):
        return re.search(r"@|\.\s*_", expression) is not None
    return "@" in words or any(one == "." and other.startswith("_") for one, other in pairwise(words))
