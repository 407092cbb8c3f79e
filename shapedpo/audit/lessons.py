"""Hypotheses that say the same of the same rows, put together as lessons."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .hypotheses import Analysis, Hypothesis, View


@dataclass(frozen=True)
class Lesson:
    """Something that some rows teach, however many hypotheses say so.

    Attributes:
        hypotheses: Those that rest on about the same rows, the strongest first; all of one view.
    """

    hypotheses: list[Hypothesis]

    @property
    def first(self) -> Hypothesis:
        """The strongest of them, which stands for it."""
        return self.hypotheses[0]

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """The rows that any of them names, ascending."""
        return np.unique(np.concatenate([hypothesis.named for hypothesis in self.hypotheses]))


def lessons(analysis: Analysis, view: View, *, max_q: float = 0.05, overlap: float = 0.5) -> list[Lesson]:
    """The lessons of a view, in the order of their strongest hypotheses.

    Hypotheses below `max_q` are taken in the order of strength. One that shares its named rows with an earlier one joins its lesson:
    in the two conditional views if the shared rows are `overlap` of the smaller set, as the same rows meet many conditions; in the global view if
    they are `overlap` of both together, as every hypothesis there is about all rows. One that names no rows is left out.

    Args:
        analysis: The analysis.
        view: Which view.
        max_q: Largest q of a hypothesis.
        overlap: Share of rows in common.
    """
    found: list[list[Hypothesis]] = []
    cores: list[set[int]] = []
    for hypothesis in analysis.of(view):
        if hypothesis.q > max_q or not hypothesis.n_named:
            continue
        rows = set(hypothesis.named.tolist())
        for lesson, core in zip(found, cores, strict=True):
            shared = len(rows & core)
            whole = len(rows | core) if view == "global" else min(len(rows), len(core))
            if shared >= overlap * whole:
                lesson.append(hypothesis)
                break
        else:
            found.append([hypothesis])
            cores.append(rows)
    return [Lesson(hypotheses) for hypotheses in found]
