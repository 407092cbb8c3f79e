"""Lessons: hypotheses that rest on the same rows put together, and each lesson's rows in all of the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from ...progress import progress_bar
from ..harvesting.passes import Passes
from .attribution import Model, Shown, attributed
from .hypotheses import Analysis, Attribution, Hypothesis, View
from .sampling import sample
from .shadows import Beside


_OVERLAP = 0.5
_FEWEST = 5  # rows that a lesson is learned from
_IN_VAIN = 20  # single features that are tried and have no rows of their own, before the others are left
_NEARLY_ALL, _MORE, _FEW = 0.9, 1.5, 0.2  # of a lesson's rows, where a later hypothesis finds more of them
_TOLD = 0.75  # area under the ROC curve from which the prompt is a lesson's condition


@dataclass(frozen=True)
class Lesson:
    """Something that some rows teach, however many hypotheses say so.

    Attributes:
        hypotheses: Those that rest on its rows. The first, which stands for it, is the strongest of the conditional views if the prompts
            of its rows are like each other and unlike the rest, else the strongest of the global view.
        rows: `(n,)` int64, the rows that teach it, the surest first; none if no row stands out from chance.
        log_odds: `(n,)` float32, how sure that is.
        number: Its place among the audit's lessons, from 1.
    """

    hypotheses: list[Hypothesis]
    rows: NDArray[np.int64]
    log_odds: NDArray[np.float32]
    number: int = 0

    @property
    def first(self) -> Hypothesis:
        """The hypothesis that stands for it."""
        return self.hypotheses[0]

    @property
    def conditional(self) -> bool:
        """Whether it is taught under a condition."""
        return self.first.conditional

    @property
    def evidence(self) -> NDArray[np.int64]:
        """Its rows, or where none stands out, those of its first hypothesis."""
        return self.rows if len(self.rows) else self.first.evidence


def lessons(analysis: Analysis) -> list[Lesson]:
    """The lessons of an analysis, in the order of their strongest hypotheses; those without rows of their own come last."""
    return [
        Lesson([analysis.hypotheses[place] for place in one.hypotheses], one.rows, one.log_odds, number)
        for number, one in enumerate(analysis.attributions, 1)
    ]


def attribute(
    analysis: Analysis,
    passes: Passes,
    beside: Beside,
    progress: bool = False,
) -> list[Attribution]:
    """Explains the hypotheses by lessons, the strongest first.

    The strongest hypothesis that no lesson explains yet makes a new one: from its rows a small model learns what the lesson's rows
    show (see [`attributed`]), and finds the others. A hypothesis half of whose rows a lesson has is explained by it; where it
    finds many more rows beside nearly all of the lesson's, they become the lesson's (see [`_Draft.grown`]). The views
    take turns, as their strengths have different units; hypotheses with rows that stand out from chance come first, since the others
    are mostly shadows of these. Single features come between, and make a lesson only if its rows stand out: what they show faintly beside their
    cluster is mostly a shadow too. The models are learned on a sample of rows, and judge all rows in one more pass.

    Args:
        analysis: Hypotheses with their rows.
        passes: Gives the shards, and where each begins.
        beside: Of the analysis, empty: what holds among the rows that are no lesson's, surely.
        progress: Whether to show a bar.

    Returns:
        Lessons with rows, then those whose rows do not stand out from chance, if their first hypothesis holds among the others.
    """
    numbers = {id(hypothesis): number for number, hypothesis in enumerate(analysis.hypotheses)}
    views: tuple[View, ...] = ("feature", "prompt", "global")
    # one without rows lacks what rows elsewhere teach, and none of its own teaches the opposite
    tried = {
        view: [h for h in analysis.of(view) if h.q <= analysis.settings.max_q and len(h.evidence)]
        for view in (*views, "single")
    }
    in_turn = [h for turn in zip_longest(*(tried[view] for view in views)) for h in turn if h is not None]
    named = [h for h in in_turn if h.n_named]
    order = [numbers[id(h)] for h in (*named, *tried["single"], *(h for h in in_turn if not h.n_named))]
    if not order:
        return []
    drafts = _explained(analysis, order, _sample_shown(analysis, order, passes), progress)
    return _finished(analysis, drafts, passes, beside)


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


def _sample_shown(analysis: Analysis, order: Sequence[int], passes: Passes) -> Shown:
    """What the sampled rows show; of half of them, a quarter, ..., where they show too much."""
    settings = analysis.settings
    sampled = _sampled(analysis, order)
    luck, share = np.random.default_rng(settings.seed + 5).random(analysis.n_rows), 1.0
    parts: list[Shown] = []
    for place, shard in passes("Sampling lessons"):
        parts.append(Shown.of(shard, settings.tau, sampled[place]))
        while sum(part.size for part in parts) > settings.max_embedded:
            share /= 2
            sampled &= luck < share
            parts = [part.take(sampled[np.searchsorted(analysis.rows, part.rows)]) for part in parts]
    return Shown.stacked(parts).by_feature()


@dataclass
class _Draft:
    """A lesson in the making: its hypotheses, its rows in the sample, and if they stand out, its model and how well prompts tell them."""

    hypotheses: list[int]
    rows: NDArray[np.bool_]
    model: Model | None = None
    told: float = 0.5

    def has(self, rows: NDArray[np.bool_]) -> float:
        """The share of some rows that are its own; where its rows are all that a hypothesis rests on, of both together."""
        whole = rows if self.model is not None else rows | self.rows
        return float((rows & self.rows).sum() / max(1, whole.sum()))

    def grown(self, rows: NDArray[np.bool_], drafts: Sequence[_Draft]) -> bool:
        """Whether some rows are more of its own: nearly all that it has and half as many again, and none of another lesson's to speak of."""
        more = (rows & self.rows).sum() >= _NEARLY_ALL * self.rows.sum() and rows.sum() >= _MORE * self.rows.sum()
        return bool(more) and all(
            draft is self or (draft.rows & rows).sum() < _FEW * draft.rows.sum() for draft in drafts
        )


def _explained(analysis: Analysis, order: Sequence[int], shown: Shown, progress: bool) -> list[_Draft]:
    settings = analysis.settings
    drafts: list[_Draft] = []
    explained = np.zeros(len(shown.rows), bool)
    in_vain = 0
    for number in progress_bar(order, desc="Lessons", unit=" hypotheses", show=progress):
        single = analysis.hypotheses[number].view == "single"
        seeds = np.isin(shown.rows, analysis.hypotheses[number].evidence[: settings.lesson_rows])
        nearest = max(drafts, key=lambda draft: draft.has(seeds), default=None)
        if nearest and nearest.has(seeds) >= _OVERLAP:
            nearest.hypotheses.append(number)
            continue
        known = [draft for draft in drafts if draft.model is not None]
        if max(len(known), len(drafts) - len(known)) == settings.max_lessons or (single and in_vain == _IN_VAIN):
            continue
        new = seeds & ~explained
        found = None
        if new.sum() >= max(_FEWEST, _OVERLAP * seeds.sum()):
            aside = seeds & explained
            # of rows that show one feature many do so by chance
            found = attributed(shown, new, aside, settings.lesson_features, settings.max_chance, mixed=single)
        if found is None:
            if single:
                in_vain += 1
            else:
                drafts.append(_Draft([number], seeds))
            continue
        model, rows = found
        same = max(known, key=lambda draft: int((draft.rows & rows).sum()), default=None)
        if same and (same.rows & rows).sum() >= _OVERLAP * min(same.rows.sum(), rows.sum()):
            same.hypotheses.append(number)
            if not same.grown(rows, known):
                continue
            same.rows, same.model, same.told = rows, model, model.told_by_prompt(shown, rows)
        else:
            drafts.append(_Draft([number], rows, model, model.told_by_prompt(shown, rows)))
        explained |= rows
    return drafts


def _finished(
    analysis: Analysis,
    drafts: Sequence[_Draft],
    passes: Passes,
    beside: Beside,
) -> list[Attribution]:
    """The lessons with their rows in all of the data, and without what only seems taught where others are."""
    with_rows = [draft for draft in drafts if draft.model is not None]
    found: list[list[tuple[NDArray[np.int64], NDArray[np.float32]]]] = [[] for _ in with_rows]
    for place, shard in passes("Rows of lessons"):
        shown = Shown.of(shard, analysis.settings.tau).by_feature()
        rest = np.ones(len(shard.rows), bool)
        for draft, parts in zip(with_rows, found, strict=True):
            assert draft.model is not None
            real, mirrored = draft.model.log_odds(shown)
            which = draft.model.named(real, mirrored)
            parts.append((shard.rows[which], real[which].astype(np.float32)))
            # some of its rows are not sure enough to be named
            rest &= (real < draft.model.doubtful) | (real <= mirrored)
        if len(with_rows) < len(drafts):
            beside.add(place, shard, rest)
    finished = []
    for draft, parts in zip(with_rows, found, strict=True):
        rows, log_odds = (np.concatenate(part) for part in zip(*parts, strict=True))
        surest = np.argsort(-log_odds, kind="stable")
        # the kind that the lesson is of stands for it
        kind = sorted(
            draft.hypotheses, key=lambda number: analysis.hypotheses[number].conditional != (draft.told >= _TOLD)
        )
        finished.append(Attribution(kind, draft.told, rows[surest], log_odds[surest]))
    none = np.zeros(0, np.int64), np.zeros(0, np.float32)
    return finished + [
        Attribution(draft.hypotheses, draft.told, *none)
        for draft in drafts
        if draft.model is None and beside.holds(analysis.hypotheses[draft.hypotheses[0]])
    ]
