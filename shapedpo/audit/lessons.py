"""Hypotheses that say the same of the same rows, put together as lessons."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from .hypotheses import Analysis, Hypothesis, View


@dataclass(frozen=True)
class Lesson:
    """Something that some rows teach, however many hypotheses say so.

    Attributes:
        hypotheses: Those that rest on about the same rows, the strongest first.
    """

    hypotheses: list[Hypothesis]

    @property
    def first(self) -> Hypothesis:
        """The strongest of them, which stands for it."""
        return self.hypotheses[0]

    @property
    def rows(self) -> NDArray[np.int64]:
        """The rows that its strongest hypothesis names, the most responsible first. The others add rows of other lessons too."""
        return self.first.named


def lessons(analysis: Analysis, *views: View, max_q: float = 0.05, overlap: float = 0.5) -> list[Lesson]:
    """The lessons of some views, in the order of their strongest hypotheses; those that name no rows come last.

    Hypotheses below `max_q` are taken in the order of strength, those of several views by turns, as their strengths have different
    units. One that shares its rows with an earlier one joins its lesson: in the two conditional views if the shared rows are `overlap` of the
    smaller set, as the same rows meet many conditions; in the global view if they are `overlap` of both together, as every
    hypothesis there is about all rows. These are the rows that it names; if it names none, all that go its way.

    Args:
        analysis: The analysis.
        views: Which views; the global one only by itself.
        max_q: Largest q of a hypothesis.
        overlap: Share of rows in common.
    """
    if "global" in views and len(views) > 1:
        raise ValueError("The global view's lessons do not mix with conditional ones: ask for them separately.")
    turns = zip_longest(*([h for h in analysis.of(view) if h.q <= max_q] for view in views))
    found: list[tuple[set[int], list[Hypothesis]]] = []
    for hypothesis in (h for turn in turns for h in turn if h is not None):
        rows = set(hypothesis.evidence.tolist())
        if not rows:  # the condition lacks what rows elsewhere teach: no row of its own teaches the opposite
            continue
        for core, lesson in found:
            whole = len(rows | core) if hypothesis.view == "global" else min(len(rows), len(core))
            if len(rows & core) >= overlap * whole:
                lesson.append(hypothesis)
                break
        else:
            found.append((rows, [hypothesis]))
    found.sort(key=lambda lesson: not any(hypothesis.n_named for hypothesis in lesson[1]))
    return [Lesson(hypotheses) for _, hypotheses in found]
