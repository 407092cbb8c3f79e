"""The end of an audit in words: what the data teaches everywhere, under a condition, and in a few rows only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.sparse import csr_matrix

from .analysis.hypotheses import Analysis, Hypothesis
from .analysis.lessons import Lesson, lessons
from .analysis.statistics import LARGEST
from .harvesting.store import Harvest
from .prediction.run import Prediction


if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions

RARE = 0.01  # share of the rows below which a lesson is one that nobody would look for
_NAMED = 4  # features of a cluster
_TEXTS = 100  # rows that words are taken from
_WIDE = 110  # characters of a terminal from which on there is room for all columns


@dataclass(frozen=True)
class Finding:
    """A lesson in words.

    Attributes:
        lesson: The lesson; `lesson.first` has the numbers.
        where: Words of the prompts in its rows that other prompts have less; "all rows" in the global view.
        more, less: Words that the chosen completions of its rows have more, and less, than the rejected ones.
        response: What its response features are called; by their numbers where no label is known.
        example: The text of the most responsible row.
    """

    lesson: Lesson
    where: str
    more: list[str]
    less: list[str]
    response: str
    example: Mapping[str, str]

    @property
    def words(self) -> str:
        """What chosen has more of, and less of; by what its features are called where no word tells the sides apart."""
        if self.more or self.less:
            return " / ".join(", ".join(words) or "-" for words in (self.more, self.less))
        named = f"[{self.response}]"
        return f"{named} / -" if self.lesson.first.delta > 0 else f"- / {named}"


@dataclass(frozen=True)
class Summary:
    """What an audit ends with.

    Attributes:
        everywhere: What the data teaches whatever the prompt.
        conditional: What it teaches where a condition holds.
        rare: Lessons that fewer than 1 % of the rows teach, under a condition or not.
        analysis: What it is a summary of.
        prediction: What a run will change.
    """

    everywhere: list[Finding]
    conditional: list[Finding]
    rare: list[Finding]
    analysis: Analysis
    prediction: Prediction | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        analysis = self.analysis
        tested = sum(analysis.tested.values())
        significant = sum(hypothesis.q <= analysis.settings.max_q for hypothesis in analysis.hypotheses)
        parts: list[Any] = [
            f"{analysis.n_rows:,} pairs. Of {tested:,} hypotheses tested, {significant:,} hold (q {analysis.settings.max_q:g} or less, "
            f"d {analysis.settings.min_effect:g} or more)."
        ]
        if not tested:
            parts.append("Nothing could be tested: the pairs are too few, or too alike. What they teach is not known.")
            yield from parts
            return
        for title, findings in (
            ("Taught everywhere", self.everywhere),
            ("Taught under a condition", self.conditional),
            (f"Taught by less than {RARE:.0%} of the rows", self.rare),
        ):
            parts.append(
                self._table(title, findings, options.max_width >= _WIDE) if findings else f"{title}: nothing found"
            )
        if any((self.everywhere, self.conditional, self.rare)) and self.prediction and not self.prediction.scaled.any():
            parts.append(
                "Predicted changes: compare them with each other. How far a run goes is not in the data; a short run of it says (--pilot)."
            )
        if not significant:
            parts.append(
                "No difference between chosen and rejected completions stands out from what chance would make."
            )
        yield from parts

    def _table(self, title: str, findings: Sequence[Finding], wide: bool) -> Any:
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=title, title_justify="left", show_lines=True)
        for name in ("", "where", "chosen has more / less", *(["features"] if wide else []), "rows"):
            table.add_column(name, overflow="fold")
        for name in (*(["delta", "d"] if wide else []), "q", "predicted, sd"):
            table.add_column(name, justify="right", no_wrap=wide)
        for finding in findings:
            first = finding.lesson.first
            lesson = finding.lesson
            rows = f"{len(lesson.rows) or 'none stands out'}, e.g. {', '.join(map(str, lesson.evidence[:3]))}"
            cells = (str(lesson.number), finding.where, finding.words, *([finding.response] if wide else []), rows)
            d = f"{first.d:+.2f}" if abs(first.d) < LARGEST else f"{'-' if first.d < 0 else '+'}∞"
            sizes = (f"{first.delta:+.3f}", d) if wide else ()
            table.add_row(*map(escape, cells), *sizes, _q(first.q), self._predicted(first))
        return table

    def _predicted(self, hypothesis: Hypothesis) -> str:
        """The change of a hypothesis' response under its condition, in sd."""
        found = self.prediction and self.prediction.at(*self.analysis.predicted_as(hypothesis))
        return f"{found['score']:+.2f}" if found else ""


def summarise(
    analysis: Analysis,
    harvest: Harvest,
    labels: Mapping[int, str] | None = None,
    *,
    prediction: Prediction | None = None,
    most: int = 10,
) -> Summary:
    """Put an analysis into words, with the harvest's texts.

    Args:
        analysis: The analysis.
        harvest: The harvest it was made of.
        labels: What features are called, by their numbers.
        prediction: What a run will change, to say it of each finding.
        most: Findings of each kind.
    """
    labels = labels or {}
    draw = np.random.default_rng(analysis.settings.seed)
    some = np.sort(draw.choice(analysis.rows, min(_TEXTS, len(analysis.rows)), replace=False))
    everywhere, conditional, rare = (found[:most] for found in _sorted(analysis))
    evidence = [lesson.evidence[:_TEXTS] for lesson in (*everywhere, *conditional, *rare)]
    rows = np.unique(np.concatenate([some, *evidence]))
    text_of = dict(zip(rows.tolist(), harvest.texts(rows), strict=True))
    others = [text_of[row]["prompt"] for row in some.tolist()]

    def finding(lesson: Lesson) -> Finding:
        first = lesson.first
        texts = [text_of[row] for row in lesson.evidence[:_TEXTS].tolist()]
        more, less = gained_and_lost(texts)
        if not first.conditional:
            where = "all rows"
        else:
            words = distinctive_words([text["prompt"] for text in texts], others)
            where = ", ".join(words) or _condition(analysis, first, labels)
        return Finding(
            lesson=lesson,
            where=where,
            more=more,
            less=less,
            response=feature_names(analysis.response_features(first), labels),
            example=texts[0],
        )

    return Summary(
        everywhere=[finding(lesson) for lesson in everywhere],
        conditional=[finding(lesson) for lesson in conditional],
        rare=[finding(lesson) for lesson in rare],
        analysis=analysis,
        prediction=prediction,
    )


def _sorted(analysis: Analysis) -> tuple[list[Lesson], list[Lesson], list[Lesson]]:
    """The lessons taught everywhere, under a condition, and by few rows."""
    found = lessons(analysis)
    kinds: tuple[list[Lesson], list[Lesson], list[Lesson]] = [], [], []
    for lesson in found:
        rare = 0 < len(lesson.rows) < RARE * analysis.n_rows
        kinds[2 if rare else int(lesson.conditional)].append(lesson)
    return kinds


def _q(q: float) -> str:
    return f"{q:.0e}" if q >= 1e-99 else "<1e-99"


def _condition(analysis: Analysis, hypothesis: Hypothesis, labels: Mapping[int, str]) -> str:
    if hypothesis.view == "feature":
        return f"data cluster {hypothesis.condition}"
    return "prompts with " + feature_names(analysis.condition_features(hypothesis), labels)


def feature_names(features: Sequence[int], labels: Mapping[int, str], most: int = _NAMED) -> str:
    """Some features by their labels, or numbers, and how many more there are."""
    named = sorted(features, key=lambda feature: feature not in labels)[:most]
    text = "; ".join(labels.get(feature, str(feature)) for feature in named)
    return text if len(features) <= most else f"{text} and {len(features) - most} more"


def lesson_words(lesson: Lesson, harvest: Harvest) -> tuple[list[str], list[str]]:
    """Words that the chosen completions of a lesson's rows have more than the rejected ones, and less, as the summary has them."""
    return gained_and_lost(harvest.texts(lesson.evidence[:_TEXTS]))


def gained_and_lost(texts: Sequence[Mapping[str, str]]) -> tuple[list[str], list[str]]:
    """Words that the chosen completions of some rows have more than the rejected ones, and less."""
    chosen, rejected = ([text[side] for text in texts] for side in ("chosen", "rejected"))
    return distinctive_words(chosen, rejected), distinctive_words(rejected, chosen)


def distinctive_words(texts: Sequence[str], others: Sequence[str], most: int = 4, least: float = 2.5) -> list[str]:
    """The words that are in more of the texts than of the others: see [`Words.distinctive`]."""
    places = np.arange(len(texts) + len(others))
    return Words([*texts, *others]).distinctive(places[: len(texts)], places[len(texts) :], most, least)


class Words:
    """The words of some texts. English function words are left out: they go with length.

    Args:
        texts: The texts.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        from sklearn.feature_extraction.text import CountVectorizer

        vectorizer = CountVectorizer(
            binary=True, stop_words="english", token_pattern=r"[^\W\d_]{2,}|[^\w\s]{2,}|[^\x00-\x7f]"
        )
        try:
            self.present = vectorizer.fit_transform(texts)  # (texts, words)
        except ValueError:  # no words at all
            self.present = csr_matrix((len(texts), 0))
        self.words = vectorizer.get_feature_names_out() if self.present.shape[1] else np.zeros(0, object)

    def distinctive(self, texts: ArrayLike, others: ArrayLike, most: int = 4, least: float = 2.5) -> list[str]:
        """The words that are in more of some texts than of others, by the log-odds ratio over its standard error.

        Args:
            texts: Which texts, by their places.
            others: What they are compared with.
            most: Number of words.
            least: Smallest ratio to its standard error.
        """
        which, rest = np.asarray(texts, np.int64), np.asarray(others, np.int64)
        a, b = (np.asarray(self.present[some].sum(axis=0)).ravel() + 0.5 for some in (which, rest))
        not_a, not_b = len(which) + 1 - a, len(rest) + 1 - b
        ratio = np.log(a / not_a * not_b / b) / np.sqrt(1 / a + 1 / not_a + 1 / b + 1 / not_b)
        found = np.flatnonzero(ratio >= least)
        best = found[np.lexsort((self.words[found], -ratio[found]))[:most]]
        return [str(word) for word in self.words[best]]
