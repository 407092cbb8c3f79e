"""Lessons: hypotheses that rest on the same rows put together, and each lesson's rows in all of the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from .attribution import Model, Shown, attributed
from .hypotheses import Analysis, Attribution, Hypothesis, View
from .sampling import sample
from .settings import AuditSettings
from .store import Shard


MAX_Q = 0.05
"""Largest q value of a hypothesis that lessons are made of."""

_OVERLAP = 0.5
_FEWEST = 5  # rows that a lesson is learned from


@dataclass(frozen=True)
class Lesson:
    """Something that some rows teach, however many hypotheses say so.

    Attributes:
        hypotheses: Those that rest on its rows, the strongest first.
        rows: `(n,)` int64, the rows that teach it, the surest first; none if no row stands out from chance.
        log_odds: `(n,)` float32, how sure that is.
    """

    hypotheses: list[Hypothesis]
    rows: NDArray[np.int64]
    log_odds: NDArray[np.float32]

    @property
    def first(self) -> Hypothesis:
        """The strongest of its hypotheses, which stands for it."""
        return self.hypotheses[0]

    @property
    def evidence(self) -> NDArray[np.int64]:
        """Its rows, or where none stands out, those of its strongest hypothesis."""
        return self.rows if len(self.rows) else self.first.evidence


def lessons(analysis: Analysis, *views: View) -> list[Lesson]:
    """The lessons that were found in some views, in the order of their strongest hypotheses; those without rows of their own come last.

    What the global view has beside the lessons that hold under a condition is found after these: see [`attribute`].
    """
    found = [
        Lesson([analysis.hypotheses[number] for number in one.hypotheses], one.rows, one.log_odds)
        for one in analysis.attributions
    ]
    found = [lesson for lesson in found if lesson.first.view in views]
    return sorted(found, key=lambda lesson: not len(lesson.rows))


def attribute(
    analysis: Analysis, passes: Callable[..., Iterator[tuple[slice, Shard]]], progress: bool = False
) -> list[Attribution]:
    """Explains the hypotheses by lessons, the strongest first.

    The strongest hypothesis that no lesson explains yet makes a new one: from its rows a small model learns what the lesson's rows
    show (see [`attributed`]), and finds the others. A hypothesis half of whose rows a lesson has is explained by it. The conditional
    views come first, by turns, as their strengths have different units; what they explain is then not laid at the door of a global
    hypothesis. The models are learned on a sample of rows, and judge all rows in one more pass.

    Args:
        analysis: Hypotheses with their rows.
        passes: Gives the shards, and where each begins.
        progress: Whether to show a bar.
    """
    settings = analysis.settings
    views: tuple[View, ...] = ("feature", "prompt")
    numbers = {id(hypothesis): number for number, hypothesis in enumerate(analysis.hypotheses)}
    of_view = {view: [h for h in analysis.of(view) if h.q <= MAX_Q and len(h.evidence)] for view in (*views, "global")}
    turns = zip_longest(*(of_view[view] for view in views))
    order = [numbers[id(h)] for h in (*(h for turn in turns for h in turn), *of_view["global"]) if h is not None]
    if not order:
        return []
    sampled = _sampled(analysis, order)
    parts = [
        Shown.of(shard, settings.tau, sampled[place])
        for place, shard in passes("Sampling lessons")
        if sampled[place].any()
    ]
    drafts = _explained(analysis, order, Shown.stacked(parts), progress)
    return _finished(drafts, passes, settings)


def _sampled(analysis: Analysis, order: Sequence[int]) -> NDArray[np.bool_]:
    """Rows at random, and as many again of those that the strongest hypotheses rest on."""
    settings = analysis.settings
    chosen = sample(analysis.n_rows, settings.lesson_sample, settings.seed + 4)
    more = settings.lesson_sample
    for number in order:
        places = np.searchsorted(analysis.rows, analysis.hypotheses[number].evidence[: settings.lesson_rows])
        new = places[~chosen[places]][:more]
        chosen[new] = True
        more -= len(new)
    return chosen


@dataclass
class _Draft:
    """A lesson in the making: its hypotheses, its rows in the sample, and its model, if its rows stand out."""

    hypotheses: list[int]
    rows: NDArray[np.bool_]
    model: Model | None


def _explained(analysis: Analysis, order: Sequence[int], shown: Shown, progress: bool) -> list[_Draft]:
    settings = analysis.settings
    drafts: list[_Draft] = []
    explained = np.zeros(len(shown.rows), bool)
    for number in tqdm(order, "Lessons", unit=" hypotheses", disable=not progress):
        seeds = np.isin(shown.rows, analysis.hypotheses[number].evidence[: settings.lesson_rows])
        nearest = max(drafts, key=lambda draft: int((draft.rows & seeds).sum()), default=None)
        if nearest and (nearest.rows & seeds).sum() >= _OVERLAP * seeds.sum():
            nearest.hypotheses.append(number)
            continue
        if len(drafts) == settings.max_lessons:
            continue
        new = seeds & ~explained
        found = None
        if new.sum() >= max(_FEWEST, _OVERLAP * seeds.sum()):
            found = attributed(shown, new, seeds & explained, settings.lesson_features, settings.max_chance)
        if found is None:
            drafts.append(_Draft([number], seeds, None))
            continue
        model, rows = found
        known = [draft for draft in drafts if draft.model is not None]
        same = max(known, key=lambda draft: int((draft.rows & rows).sum()), default=None)
        if same and (same.rows & rows).sum() >= _OVERLAP * min(same.rows.sum(), rows.sum()):
            same.hypotheses.append(number)
        else:
            drafts.append(_Draft([number], rows, model))
            explained |= rows
    return drafts


def _finished(
    drafts: Sequence[_Draft], passes: Callable[..., Iterator[tuple[slice, Shard]]], settings: AuditSettings
) -> list[Attribution]:
    """The lessons with their rows in all of the data."""
    models = {place: draft.model for place, draft in enumerate(drafts) if draft.model is not None}
    rows: dict[int, list[NDArray[np.int64]]] = {place: [] for place in models}
    log_odds: dict[int, list[NDArray[np.float32]]] = {place: [] for place in models}
    if models:
        for _, shard in passes("Rows of lessons"):
            shown = Shown.of(shard, settings.tau)
            for place, model in models.items():
                real, mirrored = model.log_odds(shown)
                which = model.named(real, mirrored)
                rows[place].append(shard.rows[which])
                log_odds[place].append(real[which].astype(np.float32))
    finished = []
    for place, draft in enumerate(drafts):
        own = np.concatenate(rows[place]) if place in rows else np.zeros(0, np.int64)
        sure = np.concatenate(log_odds[place]) if place in rows else np.zeros(0, np.float32)
        surest = np.argsort(-sure, kind="stable")
        finished.append(Attribution(draft.hypotheses, own[surest], sure[surest]))
    return finished
