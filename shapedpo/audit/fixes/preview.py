"""What the audit predicts after a fix, beside what it predicts now, without training."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..analysis.hypotheses import Analysis, Hypothesis
from ..analysis.lessons import lessons
from ..harvesting.store import Harvest
from ..labels.names import Labels, cluster_name
from ..prediction.run import Prediction, predict
from .targets import Target


if TYPE_CHECKING:
    from rich.table import Table

OTHERS = 6
"""How many of the clusters that move most are shown."""


@dataclass(frozen=True)
class Line:
    """Something that a run moves, and how far it is predicted to, in standard deviations of its score.

    Attributes:
        part: `target`, `other findings` or `largest other movements`.
        what: It, in words.
        now: The prediction for the data as they are.
        after: Those after each fix, in the order of [`Preview.fixes`].
    """

    part: str
    what: str
    now: float
    after: tuple[float, ...]


@dataclass(frozen=True)
class Preview:
    """Predictions before and after.

    Attributes:
        fixes: What each fix is called.
        lines: What they move.
    """

    fixes: tuple[str, ...]
    lines: list[Line]

    def __rich__(self) -> Table:
        from rich.markup import escape
        from rich.table import Table

        table = Table(title="Predicted change in training, in sd of the score", title_justify="left")
        table.add_column("")
        table.add_column("", overflow="fold")
        for name in ("as it is", *self.fixes):
            table.add_column(name, justify="right")
        before = ""
        for line in self.lines:
            if before and line.part != before:
                table.add_section()
            cells = (f"{value:+.2f}" for value in (line.now, *line.after))
            table.add_row("" if line.part == before else line.part, escape(line.what), *cells)
            before = line.part
        return table


def preview(
    harvest: Harvest,
    analysis: Analysis,
    targets: Sequence[Target],
    fixes: Mapping[str, tuple[NDArray[np.float64] | None, Collection[int]]],
    labels: Labels | None = None,
    now: Prediction | None = None,
    *,
    held_on: NDArray[np.bool_] | None = None,
    progress: bool = True,
) -> Preview:
    """Predict what fixes change.

    Args:
        harvest: The harvest.
        analysis: Its analysis.
        targets: The findings that are to be fixed.
        fixes: Row weights (in the order of `analysis.rows`) and held features of each fix, by what it is called.
        labels: What features and clusters are called.
        now: The prediction for the data as they are, if it is there already.
        held_on: The rows on which features are held (in the order of `analysis.rows`); all by default.
        progress: Whether to show progress bars.
    """
    labels = labels or Labels()
    before = now or predict(harvest, analysis, progress=progress)
    after = [
        predict(
            harvest, analysis, weights=weights, held=held, held_on=held_on if len(held) else None, progress=progress
        )
        for weights, held in fixes.values()
    ]

    lines: list[Line] = []
    seen: set[tuple[str, int]] = set()

    def add(part: str, what: str, kind: str, number: int, view: str = "global", condition: int = -1) -> None:
        seen.add((kind, number))
        found = [one.at(kind, number, view, condition) for one in (before, *after)]
        values = [one["score"] for one in found if one is not None]
        if len(values) == len(found):
            lines.append(Line(part, what, values[0], tuple(values[1:])))

    def add_response(part: str, one: Hypothesis) -> None:
        where = " (under its condition)" if one.conditional else ""
        add(part, cluster_name(one.response_cluster, analysis, labels) + where, *analysis.predicted_as(one))

    for one in targets:
        add_response("target", one.lesson.first)
        for feature in one.features:
            add("target", f"feature {feature}: {labels.features.get(feature, '?')}", "feature", feature)
    mine = [id(one.lesson.first) for one in targets]
    for lesson in lessons(analysis):
        if id(lesson.first) not in mine:
            add_response("other findings", lesson.first)
    clusters = [one.of("feature_cluster") for one in (before, *after)]
    moved = np.max([np.abs(one.score - clusters[0].score) for one in clusters[1:]], axis=0, initial=0)
    others = [place for place in np.argsort(-moved, kind="stable") if ("feature_cluster", int(place)) not in seen]
    for place in others[:OTHERS]:
        name = cluster_name(("feature", int(place)), analysis, labels)
        add("largest other movements", name, "feature_cluster", int(place))
    return Preview(tuple(fixes), lines)
